"""Which boxes of a tensor every rank holds, and where they lie in the rank's local tensor.

What a rank holds is a list of grids. A grid is one local tensor: along each dim it has runs of
indices, and its boxes are all combinations of one run per dim. A layout gives a rank one grid at
most; a checkpoint cut in chunks may give it several.

Invariants:

* Runs of a dim are disjoint in the tensor and in the local tensor, in the order of the local
  tensor; two neighbours in both are one run.
* A grid has at least one element. Pads belong to no run.
* The boxes of a layout are the cuts of `rolemesh.lowering.chunks.scatter_one`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    Owner,
    Placement,
    Replicate,
    Segmented,
    Shard,
    ceil_div,
)

__all__ = ["Distribution", "Grid", "Run", "distribute", "select", "slab"]


class Run(NamedTuple):
    """Consecutive indices of a dim that are consecutive in a local tensor, too.

    Attributes:
        start: The first index in the whole tensor.
        length: How many there are.
        local: The first index in the local tensor.
    """

    start: int
    length: int
    local: int


class Grid(NamedTuple):
    """One local tensor.

    Attributes:
        shape: Its shape, pads included.
        runs: What it holds, per dim.
    """

    shape: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]

    @property
    def elements(self) -> int:
        """Elements of the tensor that it holds."""
        return math.prod(sum(run.length for run in runs) for runs in self.runs)


@dataclass(frozen=True)
class Distribution:
    """Where the elements of tensors of one shape lie.

    Attributes:
        shape: The shape of the whole tensor.
        layout: The layout that the boxes are derived from; None if they are those of no layout.
        held: What each rank holds, by rank.
    """

    shape: tuple[int, ...]
    layout: Layout | None
    held: tuple[tuple[Grid, ...], ...]


@lru_cache(maxsize=4096)
def distribute(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> Distribution:
    """The boxes that a layout gives every rank.

    Args:
        layout: A layout of stored tensors: replicated, sharded, segmented or owned axes.
        shape: The shape of the whole tensor.
        mesh: The mesh.

    Raises:
        RolemeshError: RM009 or RM021 if the layout does not fit the shape.
        ValueError: If it has a pending sum or routed rows, which no stored tensor has, or an owner
            that the mesh lacks.
    """
    layout.check(shape, mesh)
    for placement, ranks in zip(layout.placements, mesh.sizes, strict=True):
        if not isinstance(placement, Owner):
            if not isinstance(placement, Replicate | Shard | Segmented):
                raise ValueError(f"no tensor is stored as {placement}")
        elif not 0 <= placement.rank < ranks:
            raise ValueError(f"{placement} names a rank of an axis that has {ranks}")
    canonical = layout.canonical(mesh)
    local = layout.local_shape(shape, mesh)
    held = []
    for rank in range(mesh.size):
        coordinate = mesh.coordinate(rank)
        owns = all(
            not isinstance(placement, Owner) or placement.rank == coordinate[axis]
            for axis, placement in enumerate(layout.placements)
        )
        runs = tuple(
            _runs(dim, extent, canonical.placements, mesh, coordinate)
            for dim, extent in enumerate(shape)
        )
        held.append((Grid(local, runs),) if owns and all(runs) else ())
    return Distribution(shape, layout, tuple(held))


def slab(whole: Distribution, dim: int, start: int, length: int) -> Distribution:
    """The indices `[start, start + length)` of a dim as a tensor of its own.

    Local tensors stay as they are: the runs say where in them the slab lies.
    """
    held = []
    for grids in whole.held:
        kept = []
        for grid in grids:
            cut = tuple(
                Run(max(run.start, start) - start, stop - begin, run.local + begin - run.start)
                for run in grid.runs[dim]
                if (begin := max(run.start, start)) < (stop := min(_stop(run), start + length))
            )
            if cut:
                kept.append(grid._replace(runs=(*grid.runs[:dim], cut, *grid.runs[dim + 1 :])))
        held.append(tuple(kept))
    shape = (*whole.shape[:dim], length, *whole.shape[dim + 1 :])
    return Distribution(shape, None, tuple(held))


def select(runs: Sequence[Run], parts: Iterable[tuple[int, int, int]]) -> tuple[Run, ...]:
    """The runs of a local tensor made of parts of another.

    Args:
        runs: Runs of the other one.
        parts: For each part, its first index in the other one, the index after its last one, and
            its first index in the new one; in order.
    """
    found: list[Run] = []
    for begin, end, at in parts:
        for run in runs:
            low, high = max(run.local, begin), min(run.local + run.length, end)
            if low >= high:
                continue
            start, local = run.start + low - run.local, at + low - begin
            last = found[-1] if found else None
            if last is not None and (_stop(last), last.local + last.length) == (start, local):
                found[-1] = last._replace(length=last.length + high - low)
            else:
                found.append(Run(start, high - low, local))
    return tuple(found)


def _stop(run: Run) -> int:
    return run.start + run.length


def _runs(
    dim: int,
    extent: int,
    placements: tuple[Placement, ...],
    mesh: Mesh,
    coordinate: tuple[int, ...],
) -> tuple[Run, ...]:
    """The runs of a dim that the rank at a coordinate holds."""
    cuts = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, Segmented) and placement.dim == dim:
            return _segment_runs(placement, mesh.sizes[axis], coordinate[axis])
        if isinstance(placement, Shard) and placement.dim == dim:
            cuts.append((placement, mesh.sizes[axis], coordinate[axis]))
    return _shard_runs(extent, tuple(cuts))


@lru_cache(maxsize=65536)
def _shard_runs(extent: int, cuts: tuple[tuple[Shard, int, int], ...]) -> tuple[Run, ...]:
    """The runs of a dim that shards cut, each given with its axis's ranks and the position there.

    As in `scatter_one`, the innermost digit is cut first, so that outer ones keep their place.
    """
    runs: tuple[Run, ...] = (Run(0, extent, 0),) if extent else ()
    length = extent
    for shard in sorted({shard for shard, _, _ in cuts}, reverse=True):
        parts, index = 1, 0
        for other, ranks, position in cuts:
            if other == shard:
                parts, index = parts * ranks, index * ranks + position
        size = parts if shard.size % parts == 0 else shard.size
        inner, units = length // (shard.outer * size), ceil_div(size, parts)
        runs = select(runs, _chunk(shard.outer, size, inner, units, index))
        length = shard.outer * units * inner
    return runs


@lru_cache(maxsize=4096)
def _segment_runs(placement: Segmented, ranks: int, position: int) -> tuple[Run, ...]:
    parts: list[tuple[int, int, int]] = []
    offset = at = 0
    for segment, held in zip(placement.segments, placement.held(ranks), strict=True):
        if segment.size:
            inner = segment.length // (segment.outer * segment.size)
            units = ceil_div(segment.size, ranks // segment.copies)
            index = position // segment.copies
            chunk = _chunk(segment.outer, segment.size, inner, units, index)
        else:
            chunk = [(0, segment.length, 0)]
        parts += [(offset + begin, offset + end, at + to) for begin, end, to in chunk]
        offset, at = offset + segment.length, at + held
    return select((Run(0, offset, 0),), parts)


def _chunk(outer: int, size: int, inner: int, units: int, index: int) -> list[tuple[int, int, int]]:
    """The parts of a dim, seen as `[outer, size, inner]`, that make up its chunk at `index`."""
    first, last = min(index * units, size), min((index + 1) * units, size)
    return [
        ((o * size + first) * inner, (o * size + last) * inner, o * units * inner)
        for o in range(outer)
        if last > first
    ]
