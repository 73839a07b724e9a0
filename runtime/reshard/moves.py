"""The moves that bring one tensor from its boxes on source ranks to its boxes on target ranks.

For each local tensor of the target, its runs are cut at every boundary of the source: each cell of
the resulting grid lies whole in a source rank's local tensor or not at all. A cell comes from the
best rank that has it (`Places`), and neighbouring slabs of cells that come from the same places
become one. So every element of the target is the target of one move.

Tables are arrays with a row per move, since a tensor between hundreds of ranks has many.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rolemesh.compiler.ir.boxes import Distribution, Grid, Run

__all__ = ["Ints", "Moves", "Places", "UncoveredError", "moves_between"]

Ints = NDArray[np.int64]

_CELLS = 1 << 22
"""Most pairs of a cell and a source rank that are compared at a time, for bounded memory."""


class UncoveredError(Exception):
    """No source rank has a box of the target.

    Attributes:
        rank: The target rank that needs it.
        box: Its first index and its extent, per dim.
    """

    def __init__(self, rank: int, box: tuple[tuple[int, int], ...]) -> None:
        super().__init__(rank, box)
        self.rank = rank
        self.box = box


@dataclass(frozen=True)
class Places:
    """Where ranks are, which decides who sends.

    Attributes:
        sources: The process of each source rank.
        targets: The process of each target rank.
        node_size: Processes of a node, which are numbered one after the other.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    node_size: int

    def preference(self, target: int) -> Ints:
        """For each source rank its place in the order in which a target rank asks for a box.

        Its own process is first, then its node, then the others; among equals the next one after
        it, so that the targets of replicas ask different ranks.
        """
        process = self.targets[target]
        sources = np.array(self.sources, dtype=np.int64)
        count = len(self.sources)
        after = (np.arange(count) - target) % count
        far = np.where(sources // self.node_size == process // self.node_size, 1, 2)
        return after + count * np.where(sources == process, 0, far)


@dataclass(frozen=True, eq=False)
class Moves:
    """A table of moves, a row per move.

    A box is given per dim; a tensor without dims has one element and boxes without columns.

    Attributes:
        source: The rank that has the box.
        source_piece: Which of the rank's local tensors it is in.
        target: The rank that needs it.
        target_piece: Which of the rank's local tensors it goes to.
        start: First indices of the box in the whole tensor.
        size: Extents of the box.
        source_at: First indices in the source's local tensor.
        target_at: First indices in the target's local tensor.
    """

    source: Ints
    source_piece: Ints
    target: Ints
    target_piece: Ints
    start: Ints
    size: Ints
    source_at: Ints
    target_at: Ints

    def __len__(self) -> int:
        return len(self.source)

    @property
    def elements(self) -> Ints:
        """Elements of each move."""
        return self.size.prod(axis=1, dtype=np.int64)

    def columns(self) -> tuple[Ints, ...]:
        """All arrays, in the order above."""
        return (
            self.source,
            self.source_piece,
            self.target,
            self.target_piece,
            self.start,
            self.size,
            self.source_at,
            self.target_at,
        )

    def take(self, rows: Ints) -> Moves:
        """The table of some rows."""
        return Moves(*(column[rows] for column in self.columns()))


def moves_between(source: Distribution, target: Distribution, places: Places) -> Moves:
    """The moves of one tensor, ordered by target rank and position.

    Args:
        source: Where its elements are.
        target: Where they go; of the same shape.
        places: Where the ranks are.

    Raises:
        UncoveredError: If no source rank has some box of the target.
    """
    holders = _Holders(source)
    parts: list[Moves] = []
    for rank, grids in enumerate(target.held):
        preference = holders.preference(places, rank) if grids else None
        for piece, grid in enumerate(grids):
            assert preference is not None
            parts.append(holders.fetch(rank, piece, grid, preference))
    dims = len(target.shape)
    if not parts:
        none, boxes = np.zeros(0, np.int64), np.zeros((0, dims), np.int64)
        return Moves(none, none, none, none, boxes, boxes, boxes, boxes)
    columns = zip(*(part.columns() for part in parts), strict=True)
    found = Moves(*(np.concatenate(column) for column in columns))
    _check_volumes(found, target)
    return found


def _check_volumes(moves: Moves, target: Distribution) -> None:
    """The moves of a rank have as many elements as it needs; they are disjoint by construction."""
    needs = [sum(grid.elements for grid in grids) for grids in target.held]
    found = np.zeros(len(needs), np.int64)
    np.add.at(found, moves.target, moves.elements)
    assert found.tolist() == needs, "every element of the target is moved once"


@dataclass(frozen=True, eq=False)
class _Along:
    """One dim of the source: cut at every boundary of a run of any local tensor.

    Attributes:
        edges: The boundaries.
        runs: For each interval between two, and each local tensor, which of its runs has the
            interval; -1 if none has.
        at: Where the interval begins in the local tensor.
    """

    edges: Ints
    runs: Ints
    at: Ints


class _Holders:
    """The local tensors of a source, by dim."""

    def __init__(self, source: Distribution) -> None:
        found = [
            (rank, piece, grid)
            for rank, grids in enumerate(source.held)
            for piece, grid in enumerate(grids)
        ]
        self.ranks = np.array([rank for rank, _, _ in found], dtype=np.int64)
        self.pieces = np.array([piece for _, piece, _ in found], dtype=np.int64)
        self.dims = len(source.shape)
        dims = range(max(1, self.dims))
        self.along = [_along([_of(grid)[dim] for _, _, grid in found]) for dim in dims]

    def preference(self, places: Places, rank: int) -> Ints:
        """The place of each local tensor in the order in which a target rank asks."""
        return places.preference(rank)[self.ranks] * (1 + len(self.ranks)) + self.pieces

    def fetch(self, rank: int, piece: int, grid: Grid, preference: Ints) -> Moves:
        """The moves that fill one local tensor of the target."""
        cut = [_cut(runs, a.edges) for runs, a in zip(_of(grid), self.along, strict=True)]
        chosen = self._choose(rank, cut, preference)
        for dim in range(chosen.ndim):
            cut[dim], chosen = self._join(dim, cut[dim], chosen)
        index = np.indices(chosen.shape).reshape(chosen.ndim, -1)
        holder = chosen.ravel()
        rows = len(holder)
        start, size, source_at, target_at = (
            np.empty((rows, chosen.ndim), np.int64) for _ in range(4)
        )
        for dim, (cells, along) in enumerate(zip(cut, self.along, strict=True)):
            pick = index[dim]
            start[:, dim] = cells.start[pick]
            size[:, dim] = cells.size[pick]
            target_at[:, dim] = cells.local[pick]
            interval = cells.interval[pick]
            source_at[:, dim] = (
                along.at[interval, holder] + cells.start[pick] - along.edges[interval]
            )
        boxes = (box[:, : self.dims] for box in (start, size, source_at, target_at))
        return Moves(
            self.ranks[holder],
            self.pieces[holder],
            np.full(rows, rank, np.int64),
            np.full(rows, piece, np.int64),
            *boxes,
        )

    def _choose(self, rank: int, cut: list[_Cells], preference: Ints) -> Ints:
        """The local tensor that each cell comes from."""
        shape = tuple(len(cells.start) for cells in cut)
        count = len(preference)
        chosen = np.empty(shape, np.int64)
        if not count:
            raise UncoveredError(
                rank, tuple((int(c.start[0]), int(c.size[0])) for c in cut)[: self.dims]
            )
        order = np.argsort(preference)
        rest = int(np.prod(shape[1:], dtype=np.int64)) * count
        step = max(1, _CELLS // rest)
        for first in range(0, shape[0], step):
            has = np.ones((1,) * (len(shape) + 1), bool)
            for dim, (cells, along) in enumerate(zip(cut, self.along, strict=True)):
                interval = cells.interval[first : first + step] if dim == 0 else cells.interval
                held = (along.runs[interval] >= 0)[:, order] & (interval >= 0)[:, None]
                has = has & held.reshape(
                    *(-1 if other == dim else 1 for other in range(len(shape))), count
                )
            best = has.argmax(axis=-1)
            covered = np.take_along_axis(has, best[..., None], axis=-1)[..., 0]
            if not covered.all():
                cell = [int(n) for n in np.argwhere(~covered)[0]]
                cell[0] += first
                box = [(int(c.start[n]), int(c.size[n])) for c, n in zip(cut, cell, strict=True)]
                raise UncoveredError(rank, tuple(box[: self.dims]))
            chosen[first : first + step] = order[best]
        return chosen

    def _join(self, dim: int, cells: _Cells, chosen: Ints) -> tuple[_Cells, Ints]:
        """Make one of neighbouring slabs along a dim that go from one place to one place."""
        count = len(cells.start)
        if count == 1:
            return cells, chosen
        slabs = np.moveaxis(chosen, dim, 0).reshape(count, -1)
        run = self.along[dim].runs[cells.interval[:, None], slabs]
        same = (slabs[1:] == slabs[:-1]).all(axis=1) & (run[1:] == run[:-1]).all(axis=1)
        same &= cells.start[1:] == cells.start[:-1] + cells.size[:-1]
        same &= cells.local[1:] == cells.local[:-1] + cells.size[:-1]
        firsts = np.flatnonzero(np.concatenate([[True], ~same]))
        size = np.add.reduceat(cells.size, firsts)
        joined = _Cells(cells.start[firsts], size, cells.local[firsts], cells.interval[firsts])
        return joined, np.take(chosen, firsts, axis=dim)


@dataclass(frozen=True, eq=False)
class _Cells:
    """The indices of a target's local tensor along a dim, cut at the source's boundaries.

    Attributes:
        start: First indices in the whole tensor.
        size: Numbers of indices.
        local: First indices in the local tensor.
        interval: The source's interval that each lies in; -1 if it lies in none.
    """

    start: Ints
    size: Ints
    local: Ints
    interval: Ints


def _of(grid: Grid) -> tuple[tuple[Run, ...], ...]:
    """The runs of a grid; of a tensor without dims, those of a vector of one element."""
    return grid.runs or ((Run(0, 1, 0),),)


def _along(holders: list[tuple[Run, ...]]) -> _Along:
    edges = _edges(chain.from_iterable(holders))
    runs = np.full((max(1, len(edges) - 1), len(holders)), -1, np.int64)
    at = np.zeros_like(runs)
    for holder, held in enumerate(holders):
        for number, run in enumerate(held):
            first, last = np.searchsorted(edges, [run.start, run.start + run.length])
            runs[first:last, holder] = number
            at[first:last, holder] = run.local + edges[first:last] - run.start
    return _Along(edges, runs, at)


def _edges(runs: Iterable[Run]) -> Ints:
    return np.array(
        sorted({edge for start, length, _ in runs for edge in (start, start + length)}), np.int64
    )


def _cut(runs: tuple[Run, ...], edges: Ints) -> _Cells:
    starts, sizes, locals_ = [], [], []
    for start, length, local in runs:
        first, last = np.searchsorted(edges, [start + 1, start + length])
        begins = np.concatenate([[start], edges[first:last]])
        starts.append(begins)
        sizes.append(np.diff(begins, append=start + length))
        locals_.append(begins - start + local)
    start_at = np.concatenate(starts)
    interval = np.searchsorted(edges, start_at, side="right") - 1
    interval[interval >= len(edges) - 1] = -1
    return _Cells(start_at, np.concatenate(sizes), np.concatenate(locals_), interval)
