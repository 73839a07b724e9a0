"""Manifests from the placements of DTensors, and back.

Boxes are computed as torch does it, axis by axis from the left: `Shard` cuts what is there into
`torch.chunk`s, `_StridedShard` cuts it into `split_factor` chunks and each of them again. Where a
layout of rolemesh has the same boxes, the tensor gets that layout; uneven nested chunks have none,
and only boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from rolemesh.compiler.ir.boxes import Distribution, Grid, Run, distribute, select
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor, bad_manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Placement, Replicate, Shard, ceil_div
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.groups import mesh_of

__all__ = ["PlacedTensor", "from_dtensors", "from_placements", "to_placements"]


class PlacedTensor(NamedTuple):
    """What a DTensor says about itself.

    Attributes:
        type: Its (whole) shape and dtype.
        placements: One for each axis of its mesh.
    """

    type: TensorType
    placements: tuple[TorchPlacement, ...]


def from_dtensors(
    tensors: Mapping[str, DTensor], *, role: str = "", generation: int = 0
) -> Manifest:
    """The manifest of DTensors, for example of `model.state_dict()` under FSDP2.

    Args:
        tensors: DTensors on one mesh, by name. One that is there under several names is tied.
        role: The role that they are for.
        generation: The generation of the weights.

    Raises:
        RolemeshError: RM038 for no tensors, several meshes, or a pending reduction; RM015 for a
            mesh without names.
    """
    meshes = list(dict.fromkeys(tensor.device_mesh for tensor in tensors.values()))
    if len(meshes) != 1:
        raise bad_manifest(
            f"the DTensors are on {len(meshes)} meshes",
            where="from_dtensors",
            why="a manifest describes one mesh",
            fix="give DTensors of one mesh, and a manifest for each mesh",
        )
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    placed = {
        first: PlacedTensor(
            TensorType(tuple(tensors[first].shape), tensors[first].dtype),
            tuple(tensors[first].placements),
        )
        for first, *_ in names.values()
    }
    aliases = {first: tuple(others) for first, *others in names.values()}
    return from_placements(meshes[0], placed, aliases=aliases, role=role, generation=generation)


def from_placements(
    mesh: Mesh | DeviceMesh,
    tensors: Mapping[str, PlacedTensor],
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
    role: str = "",
    generation: int = 0,
) -> Manifest:
    """The manifest of tensors that lie as DTensor placements say.

    Args:
        mesh: The mesh.
        tensors: The tensors, by name.
        aliases: Other names of tied tensors.
        role: The role that they are for.
        generation: The generation of the weights.

    Raises:
        RolemeshError: RM038 for placements that do not fit a tensor or are pending reductions, and
            for aliases of a tensor that is not there.
    """
    named = mesh_of(mesh) if isinstance(mesh, DeviceMesh) else mesh
    known: dict[tuple[tuple[int, ...], tuple[TorchPlacement, ...]], Distribution] = {}
    stored = {}
    for name, (kind, placements) in tensors.items():
        key = kind.shape, placements
        if key not in known:
            known[key] = _distribution(name, kind, placements, named)
        stored[name] = StoredTensor(kind.dtype, known[key], tuple((aliases or {}).get(name, ())))
    for name in aliases or {}:
        if name not in stored:
            raise bad_manifest(
                f"aliases for {name}, which is no tensor",
                where="from_placements",
                why=f"there are {len(stored)} tensors, such as {', '.join(sorted(stored)[:3])}",
                fix="give the other names of a tensor that is there",
            )
    return Manifest(named, stored, role, generation)


def to_placements(manifest: Manifest, name: str) -> tuple[TorchPlacement, ...]:
    """DTensor placements that put a tensor's elements where the manifest says.

    Args:
        manifest: The manifest.
        name: The name of a stored tensor, or an alias of one.

    Raises:
        RolemeshError: RM038 if there is no such tensor or no placements put it there: it is owned
            by one rank, in segments, or has uneven chunks of a factor of a dim.
    """
    region = manifest.find(name)
    if region is None or region.part is not None:
        raise bad_manifest(
            f"the manifest has no tensor {name}",
            where="to_placements",
            why=f"it has {len(manifest.tensors)} others",
            fix="name a stored tensor or an alias",
        )
    tensor, mesh = manifest.tensors[region.tensor], manifest.mesh
    found = tensor.distribution
    placements = None if found.layout is None else _guessed(found.layout, found.shape, mesh)
    if placements is not None and _same_boxes(found, _boxes(found.shape, placements, mesh)):
        return placements
    layout = "boxes of no layout" if found.layout is None else found.layout.text(tensor.type, mesh)
    raise bad_manifest(
        f"DTensor has no placements for {name}",
        where=f"{name}: {layout}, on mesh {mesh}",
        why="DTensor knows replicated, sharded and evenly strided dims on each axis",
        fix="reshard to a layout of those",
    )


def _distribution(
    name: str, kind: TensorType, placements: tuple[TorchPlacement, ...], mesh: Mesh
) -> Distribution:
    fits = len(placements) == len(mesh.names)
    for placement in placements:
        if isinstance(placement, TorchShard | _StridedShard):
            fits = fits and 0 <= placement.dim < len(kind.shape)
        elif not isinstance(placement, TorchReplicate):
            fits = False
    if not fits:
        raise bad_manifest(
            f"the placements of {name} are not those of a stored tensor",
            where=f"{name}: {kind}, {placements} on mesh {mesh}",
            why="a stored tensor is replicated, sharded or strided on each axis of the mesh",
            fix="reduce partial tensors, and give one placement for each axis",
        )
    found = _boxes(kind.shape, placements, mesh)
    layout = _layout(kind.shape, placements, mesh)
    if layout is not None:
        same = distribute(layout, kind.shape, mesh)
        if _same_boxes(same, found):
            return same
    return found


def _same_boxes(a: Distribution, b: Distribution) -> bool:
    """Whether ranks hold the same in the same places, whatever their pads."""
    return [[grid.runs for grid in grids] for grids in a.held] == [
        [grid.runs for grid in grids] for grids in b.held
    ]


def _boxes(
    shape: tuple[int, ...], placements: tuple[TorchPlacement, ...], mesh: Mesh
) -> Distribution:
    """What every rank holds, by the algorithm of torch."""
    held = []
    for rank in range(mesh.size):
        runs: list[tuple[Run, ...]] = [(Run(0, n, 0),) if n else () for n in shape]
        local = list(shape)
        for placement, ranks, index in zip(
            placements, mesh.sizes, mesh.coordinate(rank), strict=True
        ):
            if not isinstance(placement, TorchShard | _StridedShard):
                continue
            dim = placement.dim
            factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            parts, at = [], 0
            for chunk in range(factor):
                low, high = _chunk(0, local[dim], factor, chunk)
                low, high = _chunk(low, high, ranks, index)
                parts.append((low, high, at))
                at += high - low
            runs[dim], local[dim] = select(runs[dim], parts), at
        held.append((Grid(tuple(local), tuple(runs)),) if all(runs) else ())
    return Distribution(shape, None, tuple(held))


def _chunk(low: int, high: int, parts: int, index: int) -> tuple[int, int]:
    """The chunk at `index` of `[low, high)`, as `torch.chunk` cuts it."""
    units = ceil_div(high - low, parts)
    return min(low + index * units, high), min(low + (index + 1) * units, high)


def _layout(
    shape: tuple[int, ...], placements: tuple[TorchPlacement, ...], mesh: Mesh
) -> Layout | None:
    """The layout that placements stand for if all chunks are even, and perhaps if they are not."""
    found: list[Placement] = []
    for placement, ranks in zip(placements, mesh.sizes, strict=True):
        if not isinstance(placement, TorchShard | _StridedShard) or ranks == 1:
            found.append(REPLICATE)
            continue
        # The split factor counts what is outside of the cut in what is left of the dim: digits that
        # axes before this one took are outside of it, too.
        outer = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        taken = sorted(
            (before.outer, mesh.sizes[axis])
            for axis, before in enumerate(found)
            if isinstance(before, Shard) and before.dim == placement.dim
        )
        for position, count in taken:
            outer *= count if position <= outer else 1
        extent = shape[placement.dim]
        if not extent or extent % outer:
            return None
        found.append(Shard(placement.dim, outer, extent // outer))
    layout = Layout(tuple(found))
    try:
        layout.check(shape, mesh)
    except RolemeshError:
        return None
    return layout


def _guessed(
    layout: Layout, shape: tuple[int, ...], mesh: Mesh
) -> tuple[TorchPlacement, ...] | None:
    """The placements that a layout stands for if all chunks are even; None if there are none."""
    placements = layout.canonical(mesh).placements
    found: list[TorchPlacement] = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            found.append(TorchReplicate())
        elif isinstance(placement, Shard):
            before = math.prod(
                mesh.sizes[other]
                for other, digit in enumerate(placements[:axis])
                if isinstance(digit, Shard)
                and digit.dim == placement.dim
                and digit.outer < placement.outer
            )
            factor = placement.outer // before
            found.append(
                TorchShard(placement.dim)
                if factor == 1
                else _StridedShard(placement.dim, split_factor=factor)
            )
        else:
            return None
    return tuple(found)
