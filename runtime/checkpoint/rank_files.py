"""Loading files of ranks, which `rolemesh.reshard` writes: every rank reads its own, and no more.

The files hold the tensors of a model under its own names, cut as a layout manifest says, so nothing
is converted, cut or sent. Ranks whose layouts are others reshard the files first.

Invariants:

* A rank reads the manifest, the checksums and its file; every byte of them is checked.
* Nothing is read of the file before manifest and model are found to fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from rolemesh.compiler.ir.boxes import Grid, distribute
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.checkpoint.files import listed
from rolemesh.runtime.checkpoint.pieces import as_bytes, empty_local
from rolemesh.runtime.reshard.inputs import InputFile, open_inputs
from rolemesh.runtime.reshard.moves import Places, moves_between
from rolemesh.runtime.reshard.sources import MANIFEST, Source, open_rank_source, open_source

__all__ = ["fill_from_rank_files", "has_rank_files", "load_rank_file"]


def has_rank_files(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of files of ranks."""
    return Path(path, MANIFEST).is_file()


def load_rank_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    layouts: Mapping[str, Layout],
    mesh: Mesh,
    rank: int,
    *,
    cast: bool = False,
    advance: Callable[[int], object] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """A rank's shards.

    Args:
        path: The folder.
        tensors: All tensors that it must have, by name, a tied one under each of its names.
        layouts: Layout of each tensor to load, under any of its names.
        mesh: The mesh.
        rank: The rank.
        cast: Load floating-point tensors of another floating-point dtype too.
        advance: Called with each number of bytes that were read.

    Returns:
        The shards, by one name of each tensor in `layouts`.

    Raises:
        RolemeshError: RM032 or RM038 if files cannot be read or are damaged, RM033 if they do not
            fit the tensors, the layouts or the mesh.
    """
    source = open_rank_source(Path(path), (rank,))
    manifest = source.manifest
    wanted = _wanted(tensors, layouts)
    problems = _misfits(manifest, tensors, wanted, mesh, rank, cast=cast)
    if problems:
        raise _unfit(source, mesh, problems)
    names, found = _stored(manifest, tensors), {}
    with ExitStack() as stack:
        (file,) = open_inputs(source, stack, (rank,))
        places = []
        for name, layout in wanted.items():
            own = names[id(tensors[name])]
            stored = manifest.tensors[own]
            kind = TensorType(stored.distribution.shape, stored.dtype)
            found[name] = empty_local(kind, layout, mesh, rank)
            for piece, _ in enumerate(stored.distribution.held[rank]):
                places.append((source.at[own, rank, piece], name))
        for at, name in sorted(places):
            _read(file, found[name], at)
            advance(found[name].nbytes)
        file.sweep()
    return {name: local.to(tensors[name].dtype) for name, local in found.items()}


def fill_from_rank_files(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    cast: bool = False,
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Fill whole tensors from the files of all ranks, whatever their mesh.

    Args:
        path: The folder.
        tensors: As for `load_rank_file`, with their storage.
        cast: As for `load_rank_file`.
        advance: Called with each number of bytes that were read.

    Raises:
        RolemeshError: As `load_rank_file`, before a tensor is written to unless a file is damaged.
    """
    source = open_source(path)
    alone = Mesh({"rank": 1})
    whole = Layout.replicated(alone)
    wanted = _wanted(tensors, dict.fromkeys(tensors, whole))
    problems = _misfits(source.manifest, tensors, wanted, None, 0, cast=cast)
    if problems:
        raise _unfit(source, alone, problems)
    names = _stored(source.manifest, tensors)
    with ExitStack() as stack:
        files = open_inputs(source, stack)
        for name in wanted:
            own = names[id(tensors[name])]
            stored = source.manifest.tensors[own]
            found = stored.distribution
            places = Places(tuple(range(len(found.held))), (0,), len(found.held))
            moves = moves_between(found, distribute(whole, found.shape, alone), places)
            have: dict[tuple[int, int], torch.Tensor] = {}
            columns = (moves.source, moves.source_piece, moves.source_at, moves.start, moves.size)
            for rank, piece, take, put, size in zip(*(c.tolist() for c in columns), strict=True):
                if (rank, piece) not in have:
                    local = torch.empty(found.held[rank][piece].shape, dtype=stored.dtype)
                    _read(files[rank], local, source.at[own, rank, piece])
                    advance(local.nbytes)
                    have[rank, piece] = local
                to = tensors[name].detach()[_box(put, size)]
                to.copy_(have[rank, piece][_box(take, size)])
        for file in files:
            file.sweep()


def _read(file: InputFile, local: torch.Tensor, at: int) -> None:
    file.read(as_bytes(local).numpy().data, at)


def _box(at: list[int], size: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(at, size, strict=True))


def _wanted(
    tensors: Mapping[str, torch.Tensor], layouts: Mapping[str, Layout]
) -> dict[str, Layout]:
    """The layout of each tensor to load, under one name."""
    found: dict[int, str] = {}
    for name in layouts:
        if name in tensors:
            found.setdefault(id(tensors[name]), name)
    return {name: layouts[name] for name in found.values()}


def _stored(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> dict[int, str]:
    """The tensors of the files that are tensors of the model, by any of their names."""
    found: dict[int, str] = {}
    for name, tensor in tensors.items():
        region = manifest.find(name)
        if region is not None and region.part is None:
            found.setdefault(id(tensor), region.tensor)
    return found


def _misfits(
    manifest: Manifest,
    tensors: Mapping[str, torch.Tensor],
    wanted: Mapping[str, Layout],
    mesh: Mesh | None,
    rank: int,
    *,
    cast: bool,
) -> list[str]:
    """What of the files is not as the model has it; layouts count if there is a mesh."""
    if mesh is not None and manifest.mesh != mesh:
        return [f"mesh: the files are for {manifest.mesh}, the model is on {mesh}"]
    problems = [
        f"extra: {name}"
        for name, tensor in manifest.tensors.items()
        if not {name, *tensor.aliases} & tensors.keys()
    ]
    names = _stored(manifest, tensors)
    for name, layout in wanted.items():
        own = names.get(id(tensors[name]))
        if own is None:
            problems.append(f"missing: {name}")
            continue
        stored = manifest.tensors[own]
        kind = TensorType(tuple(tensors[name].shape), tensors[name].dtype)
        both = f"the files have {stored.type}, the model {kind}"
        castable = cast and stored.dtype.is_floating_point and kind.dtype.is_floating_point
        if stored.type.shape != kind.shape:
            problems.append(f"shape: {name}: {both}")
        elif stored.dtype != kind.dtype and not castable:
            problems.append(f"dtype: {name}: {both}")
        elif mesh is not None:
            here = distribute(layout, kind.shape, mesh).held[rank]
            there = stored.distribution.held[rank]
            if here != there:
                problems.append(
                    f"layout: {name} on rank {rank}: the files have {_told(there)}, the model "
                    f"{_told(here)}"
                )
    return problems


def _told(grids: tuple[Grid, ...]) -> str:
    runs = [[[list(run) for run in runs] for runs in grid.runs] for grid in grids]
    return f"{runs} (first index, length, place, per dim)" if runs else "nothing"


def _unfit(source: Source, mesh: Mesh, problems: list[str]) -> RolemeshError:
    return RolemeshError(
        "RM033",
        what=f"the files of ranks in {source.folder} do not fit the model",
        where=listed(problems),
        why=f"each rank of mesh {mesh} loads its own file, as it is",
        fix="reshard them to the manifest of this model: rolemesh.reshard(folder, "
        "rolemesh.manifest(sharded, model), out)",
    )
