"""Cutting tensors into the chunks of a shard and putting them together again.

All functions see the dim of a `Shard` as `[outer, size, inner]`; chunks are `ceil(size / parts)`
units each. Pads are zero for floating-point tensors and repeat the last real unit for integers and
booleans, so that a padded index is always one that occurs (see `compiler/ir/layout.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rolemesh.compiler.ir.layout import (
    Layout,
    Owner,
    Partial,
    Placement,
    Shard,
    ceil_div,
)
from rolemesh.compiler.ir.mesh import Mesh

__all__ = [
    "assemble",
    "cut",
    "fill_pads",
    "join",
    "poison_pads",
    "reduce_values",
    "scatter",
    "scatter_one",
]


def _expose(x: torch.Tensor, shard: Shard, units: int) -> torch.Tensor:
    shape = x.shape
    inner = shape[shard.dim] // (shard.outer * units) if units else 1
    return x.reshape(*shape[: shard.dim], shard.outer, units, inner, *shape[shard.dim + 1 :])


def _merge(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.reshape(
        *x.shape[:dim], x.shape[dim] * x.shape[dim + 1] * x.shape[dim + 2], *x.shape[dim + 3 :]
    )


def cut(x: torch.Tensor, shard: Shard, parts: int) -> list[torch.Tensor]:
    """The padded chunks of `x`, one per rank, each contiguous.

    Args:
        x: Tensor whose dim `shard.dim` has extent `outer * size * inner`.
        shard: The factor to cut.
        parts: Number of chunks.

    Returns:
        `parts` tensors with extent `outer * ceil(size / parts) * inner` at the dim.
    """
    view = _expose(x, shard, shard.size)
    axis = shard.dim + 1
    missing = ceil_div(shard.size, parts) * parts - shard.size
    if missing:
        if x.is_floating_point() or x.is_complex():
            pad_shape = [*view.shape]
            pad_shape[axis] = missing
            pad = view.new_zeros(pad_shape)
        else:
            last = view.narrow(axis, shard.size - 1, 1)
            pad = last.expand([*view.shape[:axis], missing, *view.shape[axis + 1 :]])
        view = torch.cat([view, pad], axis)
    return [_merge(piece, shard.dim).contiguous() for piece in view.chunk(parts, axis)]


def join(chunks: Sequence[torch.Tensor], shard: Shard) -> torch.Tensor:
    """The inverse of `cut`: chunks of all ranks, in order, without their pads."""
    units = ceil_div(shard.size, len(chunks))
    axis = shard.dim + 1
    view = torch.cat([_expose(chunk, shard, units) for chunk in chunks], axis)
    if units * len(chunks) != shard.size:
        view = view.narrow(axis, 0, shard.size)
    return _merge(view, shard.dim).contiguous()


def fill_pads(x: torch.Tensor, shard: Shard, parts: int, index: int, value: float) -> torch.Tensor:
    """A copy of chunk `index` of `parts` with its pads set to `value`."""
    units = ceil_div(shard.size, parts)
    real = min(max(shard.size - index * units, 0), units)
    if real == units:
        return x
    view = _expose(x, shard, units)
    axis = shard.dim + 1
    pad_shape = [*view.shape]
    pad_shape[axis] = units - real
    view = torch.cat([view.narrow(axis, 0, real), view.new_full(pad_shape, value)], axis)
    return _merge(view, shard.dim)


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
        local = cut(local, _radix(shard, parts), parts)[index]
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
        values = {key: join(chunks, _radix(shard, parts)) for key, chunks in merged.items()}
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
                if isinstance(placement, Shard) and axes[0] == index:
                    parts, position = _joint(axes, coordinate, mesh)
                    shard = layout.local_shard(index, mesh)
                    value = fill_pads(value, shard, parts, position, float("nan"))
        poisoned.append(value)
    return poisoned


def _radix(shard: Shard, parts: int) -> Shard:
    """The digit of an even shard alone: what lies within it may have been cut already."""
    return Shard(shard.dim, shard.outer, parts) if shard.size % parts == 0 else shard


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
