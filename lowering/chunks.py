"""Cutting tensors into the chunks of a shard and putting them together again.

All functions see the dim of a `Shard` as `[outer, size, inner]`; chunks are `ceil(size / parts)`
units each. Pads repeat the last real unit, so that a padded index is always one that occurs (see
`compiler/ir/placement.py`).

Sizes may be `SymInt`s, when a target traces a graph for any size. Then nothing here asks whether a
size divides: a graph that held for some sizes only would be the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Owner, Partial, Placement, Segmented, Shard

__all__ = [
    "assemble",
    "chunk_units",
    "cut",
    "cut_one",
    "fill_pads",
    "holds",
    "join",
    "poison_pads",
    "radix",
    "reduce_values",
    "scatter",
    "scatter_one",
]


def chunk_units(size: int, parts: int) -> int:
    """Units of one chunk, `ceil(size / parts)`."""
    if statically_known_true(size % parts == 0):
        return size // parts
    return (size + parts - 1) // parts


def _expose(x: torch.Tensor, shard: Shard, units: int) -> torch.Tensor:
    shape = x.shape
    inner = shape[shard.dim] // (shard.outer * units) if units else 1
    return x.reshape(*shape[: shard.dim], shard.outer, units, inner, *shape[shard.dim + 1 :])


def _merge(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.reshape(
        *x.shape[:dim], x.shape[dim] * x.shape[dim + 1] * x.shape[dim + 2], *x.shape[dim + 3 :]
    )


def cut(x: torch.Tensor, shard: Shard | Segmented, parts: int) -> list[torch.Tensor]:
    """The padded chunks of `x`, one per rank, each contiguous.

    Args:
        x: Tensor whose dim `shard.dim` has extent `outer * size * inner`.
        shard: The factor to cut, or the segments.
        parts: Number of chunks.

    Returns:
        `parts` tensors with extent `outer * ceil(size / parts) * inner` at the dim; of segments,
        the chunks one after the other.
    """
    if isinstance(shard, Segmented):
        return [cut_one(x, shard, parts, index) for index in range(parts)]
    view = _expose(x, shard, shard.size)
    axis = shard.dim + 1
    units = chunk_units(shard.size, parts)
    if not statically_known_true(parts * units == shard.size):
        picks = torch.arange(parts * units, device=x.device)
        view = view.index_select(axis, picks.clamp_max(shard.size - 1))
    pieces = view.split_with_sizes([units] * parts, axis)  # together, as fusions look for
    return [_merge(piece, shard.dim).contiguous() for piece in pieces]


def cut_one(x: torch.Tensor, shard: Shard | Segmented, parts: int, index: int) -> torch.Tensor:
    """The padded chunk of `x` at `index`, contiguous; see `cut`."""
    if isinstance(shard, Segmented):
        pieces = zip(shard.segments, x.split(shard.lengths, shard.dim), strict=True)
        chunks = [
            cut_one(piece, s.shard(shard.dim), parts // s.copies, index // s.copies)
            if s.size
            else piece
            for s, piece in pieces
        ]
        return torch.cat(chunks, shard.dim)
    view = _expose(x, shard, shard.size)
    axis = shard.dim + 1
    units = chunk_units(shard.size, parts)
    if statically_known_true((index + 1) * units <= shard.size):
        view = view.narrow(axis, index * units, units)
    else:
        picks = torch.arange(units, device=x.device) + index * units
        view = view.index_select(axis, picks.clamp_max(shard.size - 1))
    return _merge(view, shard.dim).contiguous()


def join(chunks: Sequence[torch.Tensor], shard: Shard | Segmented) -> torch.Tensor:
    """The inverse of `cut`: chunks of all ranks, in order, without their pads."""
    if isinstance(shard, Segmented):
        held = shard.held(len(chunks))
        pieces = zip(*(chunk.split(held, shard.dim) for chunk in chunks), strict=True)
        whole = [
            join(copies[:: s.copies], s.shard(shard.dim)) if s.size else copies[0]
            for s, copies in zip(shard.segments, pieces, strict=True)
        ]
        return torch.cat(whole, shard.dim)
    units = chunk_units(shard.size, len(chunks))
    axis = shard.dim + 1
    view = torch.cat([_expose(chunk, shard, units) for chunk in chunks], axis)
    if not statically_known_true(units * len(chunks) == shard.size):
        # Not `narrow`: whether that is contiguous would depend on whether the size divides.
        view = view.index_select(axis, torch.arange(shard.size, device=view.device))
    return _merge(view, shard.dim).contiguous()


def fill_pads(
    x: torch.Tensor, shard: Shard | Segmented, parts: int, index: int, value: float
) -> torch.Tensor:
    """A copy of chunk `index` of `parts` with its pads set to `value`."""
    if isinstance(shard, Segmented):
        pieces = zip(shard.segments, x.split(shard.held(parts), shard.dim), strict=True)
        filled = [
            fill_pads(piece, s.shard(shard.dim), parts // s.copies, index // s.copies, value)
            if s.size
            else piece
            for s, piece in pieces
        ]
        return torch.cat(filled, shard.dim)
    units = chunk_units(shard.size, parts)
    if statically_known_true((index + 1) * units <= shard.size):
        return x
    view = _expose(x, shard, units)
    real = torch.arange(units, device=x.device) < shard.size - index * units
    real = real.reshape(units, *[1] * (view.ndim - shard.dim - 2))
    return _merge(torch.where(real, view, view.new_full((), value)), shard.dim)


def holds(layout: Layout, mesh: Mesh, rank: int) -> bool:
    """Whether a rank holds any of a tensor: all do, unless ranks own it."""
    coordinate = mesh.coordinate(rank)
    return all(
        not isinstance(placement, Owner) or placement.rank == coordinate[axis]
        for axis, placement in enumerate(layout.placements)
    )


def scatter(x: torch.Tensor, layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """Each rank's local tensor of `x` in `layout`, fresh storage for every rank.

    Raises:
        ValueError: If the layout has a partial placement, which has no unique scattering.
    """
    return [scatter_one(x, layout, mesh, rank) for rank in range(mesh.size)]


def scatter_one(x: torch.Tensor, layout: Layout, mesh: Mesh, rank: int) -> torch.Tensor:
    """The local tensor of one rank; see `scatter`."""
    if any(isinstance(p, Partial) for p in layout.placements):
        raise ValueError(f"a partial value cannot be scattered: {layout}")
    coordinate = mesh.coordinate(rank)
    local = x
    # Innermost digit first, so that outer ones keep their place.
    for shard, axes in _groups(layout.canonical(mesh)):
        parts, index = _joint(axes, coordinate, mesh)
        local = cut_one(local, radix(shard, parts), parts, index)
    for axis, placement in enumerate(layout.placements):
        if isinstance(placement, Segmented):
            local = cut_one(local, placement, mesh.sizes[axis], coordinate[axis])
    return local.clone(memory_format=torch.contiguous_format)


def assemble(
    locals_: Sequence[torch.Tensor], layout: Layout, shape: Sequence[int], mesh: Mesh
) -> torch.Tensor:
    """The whole tensor of logical `shape` from every rank's local one.

    Pending reductions are performed; of replicas, the first rank's is taken.
    """
    layout = layout.canonical(mesh)
    values: dict[tuple[int, ...], torch.Tensor] = {
        mesh.coordinate(rank): local for rank, local in enumerate(locals_)
    }
    for index, placement in enumerate(layout.placements):
        if not isinstance(placement, Shard):
            values = _combine(values, index, placement)
    for shard, axes in reversed(_groups(layout)):
        parts = math.prod(mesh.sizes[i] for i in axes)
        merged: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for coordinate in sorted(values):
            key = tuple(0 if i in axes else c for i, c in enumerate(coordinate))
            merged.setdefault(key, []).append(values[coordinate])
        values = {key: join(chunks, radix(shard, parts)) for key, chunks in merged.items()}
    whole = values[(0,) * len(mesh.names)]
    if tuple(whole.shape) != tuple(shape):
        raise ValueError(f"local tensors make up {list(whole.shape)}, not {list(shape)}")
    return whole


def poison_pads(locals_: Sequence[torch.Tensor], layout: Layout, mesh: Mesh) -> list[torch.Tensor]:
    """Local tensors with NaN in every pad, for tests: pads of floats must not be read."""
    layout = layout.canonical(mesh)
    poisoned = []
    for rank, local in enumerate(locals_):
        coordinate = mesh.coordinate(rank)
        value = local
        if local.is_floating_point():
            for index, placement in enumerate(layout.placements):
                axes = layout.joint_axes(index)
                if isinstance(placement, Shard | Segmented) and axes[0] == index:
                    parts, position = _joint(axes, coordinate, mesh)
                    shard = layout.local_shard(index, mesh)
                    value = fill_pads(value, shard, parts, position, float("nan"))
        poisoned.append(value)
    return poisoned


def radix(shard: Shard, parts: int) -> Shard:
    """The digit of an even shard alone: what lies within it may have been cut already."""
    return shard._replace(size=parts) if statically_known_true(shard.size % parts == 0) else shard


def _groups(layout: Layout) -> list[tuple[Shard, tuple[int, ...]]]:
    """Distinct shards with their axes, innermost first."""
    dims = sorted({p.dim for p in layout.placements if isinstance(p, Shard)})
    return [entry for dim in dims for entry in reversed(layout.shards_of(dim))]


def _joint(axes: tuple[int, ...], coordinate: tuple[int, ...], mesh: Mesh) -> tuple[int, int]:
    parts, index = 1, 0
    for axis in axes:
        parts *= mesh.sizes[axis]
        index = index * mesh.sizes[axis] + coordinate[axis]
    return parts, index


def _combine(
    values: dict[tuple[int, ...], torch.Tensor], axis: int, placement: Placement
) -> dict[tuple[int, ...], torch.Tensor]:
    groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for coordinate in sorted(values):
        key = (*coordinate[:axis], 0, *coordinate[axis + 1 :])
        groups.setdefault(key, []).append(values[coordinate])
    if isinstance(placement, Owner):
        return {key: members[placement.rank] for key, members in groups.items()}
    if isinstance(placement, Segmented):
        return {key: join(members, placement) for key, members in groups.items()}
    if not isinstance(placement, Partial):
        return {key: members[0] for key, members in groups.items()}
    return {key: reduce_values(members, placement.op) for key, members in groups.items()}


def reduce_values(values: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """The elementwise `sum`, `avg`, `max` or `min` of equally shaped tensors, in order."""
    total = values[0]
    for value in values[1:]:
        if op in ("sum", "avg"):
            total = total + value
        else:
            total = torch.maximum(total, value) if op == "max" else torch.minimum(total, value)
    return total / len(values) if op == "avg" else total
