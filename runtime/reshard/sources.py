"""What a checkpoint on disk holds: a manifest, and where in which file each local tensor lies.

| kind | what is there |
|---|---|
| `rank` | `manifest.json`, and a safetensors file for each rank |
| `safetensors` | one file, or several with an index; tensors are whole |
| `dcp` | a folder of torch.distributed.checkpoint |

Invariants:

* No tensor is read. Every local tensor of the manifest has its place, and lies within its file.
* What is there besides tensors (manifest, index, metadata) has been checked against the checksums,
  if there are any, before it is parsed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rolemesh.compiler.ir.boxes import Distribution, Grid, Run
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.checkpoint.files import INDEX, SINGLE, listed, open_checkpoint
from rolemesh.runtime.reshard.checksums import (
    CHECKSUMS,
    Checksums,
    bad_checkpoint,
    read_checksums,
    sums_of,
)
from rolemesh.runtime.reshard.dcp import FILES, files_of, from_checkpoint
from rolemesh.runtime.reshard.dcp_files import METADATA, chunk_places, read_metadata
from rolemesh.runtime.reshard.files import read_manifest

__all__ = [
    "MANIFEST",
    "Place",
    "Source",
    "in_file",
    "local_names",
    "open_rank_source",
    "open_source",
    "rank_file",
]

MANIFEST = "manifest.json"

Place = tuple[str, int, int]
"""A local tensor: its tensor's name, its rank, and which of the rank's local tensors it is."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be read.

    Attributes:
        kind: `rank`, `safetensors` or `dcp`.
        folder: The folder that its files are in.
        manifest: Where its tensors are: a rank for each file with tensors.
        files: The files with tensors, by rank.
        others: The files without.
        at: Where the bytes of each local tensor begin in its rank's file.
        checksums: Those of all files; None if nobody recorded any.
    """

    kind: str
    folder: Path
    manifest: Manifest
    files: tuple[str, ...]
    others: tuple[str, ...]
    at: Mapping[Place, int] = field(repr=False)
    checksums: Checksums | None

    def names_at(self, rank: int, start: int, stop: int) -> str:
        """Names the tensors whose bytes lie between two places of a file, for messages."""
        found = []
        for (name, owner, piece), at in self.at.items():
            if owner == rank:
                grid = self.manifest.tensors[name].distribution.held[rank][piece]
                kind = TensorType(grid.shape, self.manifest.tensors[name].dtype)
                if at < stop and start < at + kind.nbytes:
                    found.append(name)
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return ", ".join(found[:3]) + more if found else "no tensor, but what describes them"


def open_source(path: str | os.PathLike[str]) -> Source:
    """Find out what a checkpoint holds.

    Args:
        path: A safetensors file or an index, or a folder with a safetensors checkpoint, a
            checkpoint of torch.distributed.checkpoint, or files of ranks and their manifest.

    Raises:
        RolemeshError: RM032 if there is no such thing, or a file is missing, cut short or damaged;
            RM038 if its manifest is, or chunks of a checkpoint do not make up their tensors.
    """
    start = Path(path)
    if (start / MANIFEST).is_file():
        return open_rank_source(start)
    if (start / METADATA).is_file():
        return _dcp_source(start)
    return _safetensors_source(start)


def rank_file(rank: int, ranks: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}-of-{ranks:05d}.safetensors"


def local_names(manifest: Manifest, rank: int) -> Iterator[tuple[str, int, str]]:
    """The tensors of a rank's file: tensor, which local tensor of it, and its name in the file.

    A second local tensor of `w` is `w[1]`.

    Raises:
        RolemeshError: RM032 if two have one name.
    """
    taken: dict[str, str] = {}
    for name, tensor in manifest.tensors.items():
        for piece in range(len(tensor.distribution.held[rank])):
            own = f"{name}[{piece}]" if piece else name
            if own in taken:
                raise bad_checkpoint(
                    f"rank {rank} has two tensors called {own}",
                    where=f"{name} and {taken[own]}",
                    why="a file has one tensor of a name",
                    fix="rename one of them",
                )
            taken[own] = name
            yield name, piece, own


def open_rank_source(folder: Path, only: Sequence[int] | None = None) -> Source:
    """Find out what files of ranks hold.

    Args:
        folder: Their folder.
        only: The ranks whose files are looked at; all if None. Others have no places.

    Raises:
        RolemeshError: As `open_source`.
    """
    checksums = _checked(folder, (MANIFEST,), missing_ok=only is not None)
    if checksums is None:
        raise bad_checkpoint(
            f"{folder} has no {CHECKSUMS}",
            where=str(folder),
            why=f"it is written with {MANIFEST} and the files of the ranks",
        )
    manifest = read_manifest(folder / MANIFEST)
    ranks = manifest.mesh.size
    files = tuple(rank_file(rank, ranks) for rank in range(ranks))
    looked = range(ranks) if only is None else [rank for rank in only if rank < ranks]
    _require(folder, tuple(files[rank] for rank in looked))
    _require_listed(folder, files, checksums)
    at: dict[Place, int] = {}
    for rank in looked:
        file = files[rank]
        entries = open_checkpoint(folder / file).entries
        for name, piece, own in local_names(manifest, rank):
            tensor = manifest.tensors[name]
            needed = TensorType(tensor.distribution.held[rank][piece].shape, tensor.dtype)
            found = entries.get(own)
            if found is None or found.type != needed:
                raise bad_checkpoint(
                    f"{file} does not have {own} as the manifest says",
                    where=f"{folder / file}: {'nothing' if found is None else found.type}; "
                    f"manifest: {needed}",
                    why="the file or the manifest is another checkpoint's",
                )
            at[name, rank, piece] = found.start
    return Source("rank", folder, manifest, files, (MANIFEST,), at, checksums)


def _safetensors_source(path: Path) -> Source:
    folder = path if path.is_dir() else path.parent
    index = path.name if path.suffix == ".json" else INDEX
    whole = (path.is_dir() and not (path / SINGLE).is_file()) or path.suffix == ".json"
    others = (index,) if whole and (folder / index).is_file() else ()
    if others:
        _require(folder, _indexed(folder / index))
    checksums = _checked(folder, others)
    entries = open_checkpoint(path).entries
    files = tuple(sorted({Path(entry.file).name for entry in entries.values()}))
    if not files:
        files = (path.name,) if path.is_file() and not others else ()
    mesh = Mesh({FILES: max(1, len(files))})
    known: dict[tuple[tuple[int, ...], str], Distribution] = {}
    tensors, at = {}, {}
    for name, entry in entries.items():
        rank = files.index(Path(entry.file).name)
        key = entry.type.shape, files[rank]
        if key not in known:
            known[key] = in_file(entry.type.shape, rank, mesh.size)
        tensors[name] = StoredTensor(entry.type.dtype, known[key])
        if known[key].held[rank]:
            at[name, rank, 0] = entry.start
    _require_listed(folder, files, checksums)
    return Source("safetensors", folder, Manifest(mesh, tensors), files, others, at, checksums)


def _dcp_source(folder: Path) -> Source:
    checksums = _checked(folder, (METADATA,))
    metadata = read_metadata(folder)
    manifest = from_checkpoint(metadata)
    files = files_of(metadata)
    _require(folder, files)
    _require_listed(folder, files, checksums)
    at: dict[Place, int] = {}
    counts: dict[tuple[str, int], int] = {}
    for name, chunk, file, offset in chunk_places(folder, metadata):
        if 0 in chunk.sizes:
            continue
        rank = files.index(file)
        piece = counts.get((name, rank), 0)
        counts[name, rank] = piece + 1
        at[name, rank, piece] = offset
    return Source("dcp", folder, manifest, files, (METADATA,), at, checksums)


def in_file(shape: tuple[int, ...], rank: int, files: int) -> Distribution:
    """All of a tensor in one of several files."""
    grid = Grid(shape, tuple((Run(0, extent, 0),) for extent in shape))
    mine = (grid,) if all(shape) else ()
    return Distribution(shape, None, tuple(mine if n == rank else () for n in range(files)))


def _indexed(index: Path) -> tuple[str, ...]:
    """The files that an index names; what is wrong with it is reported where it is read."""
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        return tuple(sorted(set(files)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()


def _checked(
    folder: Path, others: tuple[str, ...], *, missing_ok: bool = False
) -> Checksums | None:
    """The checksums of a folder, once its small files are found to agree with them."""
    checksums = read_checksums(folder)
    if checksums is None:
        return None
    _require(folder, others if missing_ok else tuple(checksums.files))
    _require_listed(folder, others, checksums)
    for name in others:
        try:
            found = sums_of(folder / name, checksums.block)
        except OSError as error:
            raise bad_checkpoint(
                f"{folder / name} cannot be read", where=str(folder / name), why=str(error)
            ) from error
        if found != checksums.files[name]:
            raise bad_checkpoint(
                f"{name} is damaged",
                where=str(folder / name),
                why="its bytes are not those whose checksum was recorded",
            )
    return checksums


def _require(folder: Path, files: tuple[str, ...]) -> None:
    """All files are there."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise bad_checkpoint(
            f"the checkpoint lacks {len(missing)} of its {len(files)} files",
            where=f"{folder}: {listed(missing)}",
            why="every file that holds tensors, or that checksums were recorded of, must be there",
        )


def _require_listed(folder: Path, files: tuple[str, ...], checksums: Checksums | None) -> None:
    """All files have checksums, if any has."""
    unknown = [] if checksums is None else [file for file in files if file not in checksums.files]
    if unknown:
        raise bad_checkpoint(
            f"{CHECKSUMS} does not list {len(unknown)} files of the checkpoint",
            where=f"{folder}: {listed(unknown)}",
            why="they were added, or written by something else, after the checksums",
            fix=f"if the files are known to be good, delete {CHECKSUMS} and record it anew",
        )
