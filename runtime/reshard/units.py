"""The moves of a plan between files, cut in units: what is read, put together and written at once.

A tensor is cut along its first dim, and where one row is too much along the next ones. Within such
a slab local tensors are contiguous on both sides: every part of a file is read at once, and so is
every part written. Ranks that hold the same share what is put together for them.

Invariants:

* The units of a plan write every element of the target files once, and read a byte of a source
  file once for each target tensor that it goes to.
* What a unit reads and writes has at most `limit` bytes, unless one element of a tensor needs more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rolemesh.compiler.ir.boxes import Grid
from rolemesh.compiler.ir.manifest import Manifest
from rolemesh.runtime.reshard.moves import Ints
from rolemesh.runtime.reshard.plan import Plan, Transfer

__all__ = ["Copy", "Extent", "Slab", "Task", "Unit", "slabs_of", "tasks_of", "units_of"]


class Extent(NamedTuple):
    """Consecutive elements of a local tensor.

    Attributes:
        transfer: Of a part that is read: which transfer of the task reads it. 0 if it is written.
        ranks: The ranks that have it; of a part that is read, one.
        piece: Which of their local tensors it is in.
        start: Its first element there.
        shape: Its own shape: whole in all dims but the first.
    """

    transfer: int
    ranks: tuple[int, ...]
    piece: int
    start: int
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements that it has, pads included."""
        return math.prod(self.shape)


class Copy(NamedTuple):
    """A box that goes from a part that is read to a part that is written.

    Attributes:
        read: Number of the part that is read.
        take: The box in it.
        write: Number of the part that is written.
        put: The box in that.
    """

    read: int
    take: tuple[slice, ...]
    write: int
    put: tuple[slice, ...]


@dataclass(frozen=True)
class Slab:
    """A slab of a target tensor.

    Attributes:
        reads: What is read.
        writes: What is written.
        copies: What goes where.
        filled: For each part that is written, whether copies fill all of it; pads are zeros.
    """

    reads: tuple[Extent, ...]
    writes: tuple[Extent, ...]
    copies: tuple[Copy, ...]
    filled: tuple[bool, ...]

    @property
    def elements(self) -> int:
        """Elements of all parts, which are in memory at once."""
        return sum(extent.elements for extent in (*self.reads, *self.writes))


class Task(NamedTuple):
    """One target tensor.

    Attributes:
        target: Its name.
        transfers: What fills it, with where in it each begins.
    """

    target: str
    transfers: tuple[tuple[Transfer, tuple[int, ...]], ...]


class Unit(NamedTuple):
    """What is done at once: slabs of tensors, with the tensor's task."""

    slabs: tuple[tuple[Task, Slab], ...]


def tasks_of(plan: Plan, target: Manifest) -> dict[str, Task]:
    """What fills each target tensor."""
    found: dict[str, list[Transfer]] = {}
    for transfer in plan.transfers:
        found.setdefault(transfer.target, []).append(transfer)
    tasks = {}
    for name, transfers in found.items():
        tensor = target.tensors[name]
        origin = [0] * len(tensor.distribution.shape)
        begins = [tuple(origin)]
        if len(transfers) > 1:  # the parts of a packed tensor, in order
            begins = [
                tuple(part.start if dim == part.dim else 0 for dim in range(len(origin)))
                for part in tensor.parts
            ]
        tasks[name] = Task(name, tuple(zip(transfers, begins, strict=True)))
    return tasks


def units_of(
    tasks: Sequence[Task], source: Manifest, target: Manifest, limit: int
) -> Iterator[Unit]:
    """Cut tasks into units, in order.

    Args:
        tasks: The tensors.
        source: The manifest of the source files.
        target: That of the target files.
        limit: Most bytes that a unit reads and writes.
    """
    known: dict[tuple[tuple[int, tuple[int, ...]], ...], tuple[Slab, ...]] = {}
    unit: list[tuple[Task, Slab]] = []
    held = 0
    for task in tasks:
        itemsize = target.tensors[task.target].dtype.itemsize
        # Tensors that lie alike share their tables, and so their slabs.
        key = tuple((id(transfer.table), begin) for transfer, begin in task.transfers)
        if key not in known:
            known[key] = tuple(slabs_of(task, source, target, limit // itemsize))
        for slab in known[key]:
            nbytes = slab.elements * itemsize
            if unit and held + nbytes > limit:
                yield Unit(tuple(unit))
                unit, held = [], 0
            unit.append((task, slab))
            held += nbytes
    if unit:
        yield Unit(tuple(unit))


def slabs_of(task: Task, source: Manifest, target: Manifest, limit: int) -> Iterator[Slab]:
    """Cut one target tensor into slabs of at most `limit` elements, read and written."""
    found = target.tensors[task.target].distribution
    groups = _groups(found.held)
    first_of = np.array([group[0] for group in groups], np.int64)
    table = _Table.of(task, first_of)
    if not len(table.transfer):
        return
    have = [source.tensors[t.source].distribution.held for t, _ in task.transfers]
    sides = _Sides(have, found.held, {group[0]: group for group in groups})
    box = [(0, extent) for extent in found.shape] or [(0, 1)]
    yield from _cut(table, sides, box, 0, limit)


def _groups(held: tuple[tuple[Grid, ...], ...]) -> list[tuple[int, ...]]:
    """Ranks that hold the same."""
    same: dict[tuple[Grid, ...], list[int]] = {}
    for rank, grids in enumerate(held):
        if grids:
            same.setdefault(grids, []).append(rank)
    return [tuple(ranks) for ranks in same.values()]


@dataclass(frozen=True, eq=False)
class _Table:
    """Moves of all transfers of a task, in the coordinates of the target tensor, a row each."""

    transfer: Ints
    ends: Ints  # source rank and local tensor, target rank and local tensor
    start: Ints
    size: Ints
    source_at: Ints
    target_at: Ints

    @classmethod
    def of(cls, task: Task, targets: Ints) -> _Table:
        """The moves to some target ranks."""
        tables = []
        for number, (transfer, begin) in enumerate(task.transfers):
            moves = transfer.table.moves
            moves = moves.take(np.flatnonzero(np.isin(moves.target, targets)))
            ends = np.stack(
                [moves.source, moves.source_piece, moves.target, moves.target_piece], axis=1
            )
            start = moves.start + np.array(begin, np.int64)
            boxes = [start, moves.size, moves.source_at, moves.target_at]
            if not begin:  # without dims: a vector of one element
                one = np.ones((len(moves), 1), np.int64)
                boxes = [one - 1, one, one - 1, one - 1]
            tables.append((np.full(len(moves), number, np.int64), ends, *boxes))
        return cls(*(np.concatenate(column) for column in zip(*tables, strict=True)))

    def within(self, dim: int, low: int, high: int) -> _Table:
        """The moves of the indices `[low, high)` of a dim."""
        first = np.maximum(self.start[:, dim], low)
        last = np.minimum(self.start[:, dim] + self.size[:, dim], high)
        rows = np.flatnonzero(first < last)
        skipped = (first - self.start[:, dim])[rows]
        boxes = [box[rows] for box in (self.start, self.size, self.source_at, self.target_at)]
        start, size, source_at, target_at = boxes
        for at in (start, source_at, target_at):
            at[:, dim] += skipped
        size[:, dim] = (last - first)[rows]
        return _Table(self.transfer[rows], self.ends[rows], start, size, source_at, target_at)


@dataclass(frozen=True)
class _Sides:
    """The local tensors on both sides, and the ranks that share a target's."""

    have: list[tuple[tuple[Grid, ...], ...]]
    need: tuple[tuple[Grid, ...], ...]
    group: dict[int, tuple[int, ...]]


def _cut(
    table: _Table, sides: _Sides, box: list[tuple[int, int]], dim: int, limit: int
) -> Iterator[Slab]:
    """Slabs of a box that is one index in all dims before `dim`."""
    low, high = box[dim]
    if low == high:
        return
    slab = _slab(table, sides, dim)
    much = slab.elements
    if not slab.copies:
        return
    if much <= limit or (high - low == 1 and dim == len(box) - 1):
        yield slab
    elif high - low == 1:
        yield from _cut(table, sides, box, dim + 1, limit)
    else:
        step = max(1, (high - low) * limit // much)
        for first in range(low, high, step):
            part = (first, min(first + step, high))
            inside = [*box[:dim], part, *box[dim + 1 :]]
            yield from _cut(table.within(dim, *part), sides, inside, dim, limit)


def _slab(table: _Table, sides: _Sides, dim: int) -> Slab:
    """The parts and copies of moves that are one index in all dims before `dim`."""
    size = table.size[:, dim]
    taking = _parts(
        np.concatenate([table.transfer[:, None], table.ends[:, :2]], axis=1),
        table.source_at,
        size,
        dim,
    )
    putting = _parts(table.ends[:, 2:], table.target_at, size, dim)
    reads, writes = [], []
    for (transfer, rank, piece), at, count in taking.parts:
        shape = sides.have[transfer][rank][piece].shape
        reads.append(_extent(transfer, (rank,), piece, shape, at, count, dim))
    for (rank, piece), at, count in putting.parts:
        shape = sides.need[rank][piece].shape
        writes.append(_extent(0, sides.group[rank], piece, shape, at, count, dim))
    copies = []
    volume = [0] * len(writes)
    boxes = zip(
        taking.of.tolist(),
        putting.of.tolist(),
        table.source_at[:, dim:].tolist(),
        table.target_at[:, dim:].tolist(),
        table.size[:, dim:].tolist(),
        strict=True,
    )
    for read, write, take, put, extent in boxes:
        take[0] -= taking.parts[read][1][dim]
        put[0] -= putting.parts[write][1][dim]
        copies.append(Copy(read, _box(take, extent), write, _box(put, extent)))
        volume[write] += math.prod(extent)
    filled = tuple(n == w.elements for n, w in zip(volume, writes, strict=True))
    return Slab(tuple(reads), tuple(writes), tuple(copies), filled)


class _Parts(NamedTuple):
    """Runs of indices of a dim of local tensors.

    Attributes:
        parts: For each, which local tensor, its first place there, and its length.
        of: For each move, the part that it lies in.
    """

    parts: list[tuple[tuple[int, ...], list[int], int]]
    of: Ints


def _parts(owners: Ints, at: Ints, size: Ints, dim: int) -> _Parts:
    """Join the indices along a dim that moves take from the same local tensor."""
    order = np.lexsort((at[:, dim], *owners.T[::-1]))
    of = np.zeros(len(order), np.int64)
    parts: list[tuple[tuple[int, ...], list[int], int]] = []
    end = 0
    keys, firsts, sizes = owners.tolist(), at[:, : dim + 1].tolist(), size.tolist()
    for row in order.tolist():
        key, first = tuple(keys[row]), firsts[row]
        stop = first[dim] + sizes[row]
        if parts and parts[-1][0] == key and first[dim] <= end:
            end = max(end, stop)
            parts[-1] = (key, parts[-1][1], end - parts[-1][1][dim])
        else:
            parts.append((key, first, sizes[row]))
            end = stop
        of[row] = len(parts) - 1
    return _Parts(parts, of)


def _extent(
    transfer: int,
    ranks: tuple[int, ...],
    piece: int,
    shape: tuple[int, ...],
    at: list[int],
    count: int,
    dim: int,
) -> Extent:
    shape = shape or (1,)
    start = 0
    for index, extent in zip(at, shape[: dim + 1], strict=True):
        start = start * extent + index
    inner = shape[dim + 1 :]
    return Extent(transfer, ranks, piece, start * math.prod(inner), (count, *inner))


def _box(at: list[int], extent: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(at, extent, strict=True))
