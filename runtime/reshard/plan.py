"""The plan of a reshard: which boxes go from which rank to which, and when.

    plan = plan_reshard(source, target)
    for step in plan.steps: ...

Planning is pure: it reads two manifests and touches neither tensors nor processes. Tensors that lie
alike share one table of moves, so many layers cost as much as the kinds of layer there are.

Invariants:

* Every element of the target is the target of one move.
* An element that a process holds and needs stays there. Every other one is moved once, so as few
  bytes move as can.
* In no step a process stages more than the limit.
* Equal manifests and options give equal plans, and equal digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from rolemesh.compiler.ir.boxes import Distribution, slab
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.manifest import Manifest, Part, Region
from rolemesh.compiler.ir.manifest_json import digest
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.reshard.moves import Ints, Moves, Places, UncoveredError, moves_between
from rolemesh.runtime.reshard.staging import Staged, stage

__all__ = ["STAGING_BYTES", "Plan", "Step", "Transfer", "plan_reshard"]

STAGING_BYTES = 256 << 20
"""Bytes that a process stages at most, unless the caller says otherwise."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """What brings one tensor of the target, or one part of it, in place.

    Attributes:
        source: The stored tensor of the source that has it.
        target: The stored tensor of the target.
        table: Its moves; shared with other tensors that lie alike.
    """

    source: str
    target: str
    table: Staged


class Step(NamedTuple):
    """Moves that are staged at once: one round of one transfer, or all of several.

    Attributes:
        first: Index of the first transfer.
        last: Index after the last one.
        round: The round; None for all rounds of the transfers, which have one at most.
    """

    first: int
    last: int
    round: int | None


@dataclass(frozen=True, eq=False)
class Plan:
    """All moves from one manifest to another.

    Attributes:
        source: The digest of the source manifest.
        target: The digest of the target manifest.
        places: Where the ranks of both are.
        limit: Bytes that a process stages at most.
        transfers: What is moved, by target tensor.
        steps: In which order. A step begins when the one before has ended.
    """

    source: str
    target: str
    places: Places
    limit: int
    transfers: tuple[Transfer, ...]
    steps: tuple[Step, ...]

    @cached_property
    def moved_bytes(self) -> int:
        """Bytes that go from one process to another."""
        return sum(self._per_table(lambda table: table.moved_bytes))

    @cached_property
    def kept_bytes(self) -> int:
        """Bytes that are needed where they are."""
        return sum(self._per_table(lambda table: table.kept_bytes))

    @cached_property
    def staged_bytes(self) -> int:
        """Most bytes that a process stages in a step."""
        return max((int(self._staged(step).max(initial=0)) for step in self.steps), default=0)

    @cached_property
    def received(self) -> tuple[tuple[int, int], ...]:
        """For each target rank, the bytes that come from other processes and those it holds."""
        found = np.zeros((2, len(self.places.targets)), np.int64)
        uses: dict[int, int] = {}
        for transfer in self.transfers:
            uses[id(transfer.table)] = uses.get(id(transfer.table), 0) + 1
        for table in {id(t.table): t.table for t in self.transfers}.values():
            away = table.rounds >= 0
            for row, which in enumerate((away, ~away)):
                times = table.nbytes[which] * uses[id(table)]
                np.add.at(found[row], table.moves.target[which], times)
        return tuple((moved, kept) for moved, kept in found.T.tolist())

    def moves(self, step: Step) -> Iterator[tuple[Transfer, Moves]]:
        """The moves of a step."""
        for transfer in self.transfers[step.first : step.last]:
            table = transfer.table
            if step.round is None:
                yield transfer, table.moves
            else:
                # Copies within a process stage nothing, and go with the first round.
                due = table.rounds == step.round
                if step.round == 0:
                    due |= table.rounds < 0
                yield transfer, table.moves.take(np.flatnonzero(due))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of everything in the plan, in hexadecimal."""
        numbers: dict[int, int] = {}
        listed = [
            (t.source, t.target, numbers.setdefault(id(t.table), len(numbers)))
            for t in self.transfers
        ]
        head = {
            "source": self.source,
            "target": self.target,
            "sources": self.places.sources,
            "targets": self.places.targets,
            "node_size": self.places.node_size,
            "limit": self.limit,
            "transfers": listed,
            "steps": self.steps,
        }
        found = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        for table in {id(t.table): t.table for t in self.transfers}.values():
            for column in (*table.moves.columns(), table.rounds):
                found.update(f"{column.shape}".encode())
                found.update(column.astype("<i8").tobytes())
        return found.hexdigest()

    def _per_table(self, measure: Callable[[Staged], int]) -> Iterator[int]:
        known: dict[int, int] = {}
        for transfer in self.transfers:
            key = id(transfer.table)
            if key not in known:
                known[key] = measure(transfer.table)
            yield known[key]

    def _staged(self, step: Step) -> Ints:
        """Most bytes that each process stages in a step."""
        peaks = [transfer.table.peaks for transfer in self.transfers[step.first : step.last]]
        return np.sum(peaks, axis=0)


def plan_reshard(
    source: Manifest,
    target: Manifest,
    *,
    processes: Mapping[int, int] | None = None,
    node_size: int = 8,
    staging: int = STAGING_BYTES,
) -> Plan:
    """The moves that bring every tensor of the target in place.

    Names are found among tensors, aliases and parts: a packed target may be filled from separate
    sources, and a part of a packed source may fill a target of its own. Tensors that only the
    source has are left out.

    Args:
        source: Where the tensors are.
        target: Where they go.
        processes: For target ranks that are the same process as a source rank, that source rank.
            None if ranks of one number are the same process; empty if no process is in both.
        node_size: Processes of a node. Of replicas, one on the same node is preferred.
        staging: Most bytes that a process may hold at once to send and to receive.

    Raises:
        RolemeshError: RM039 if a tensor is missing in the source or has another shape or dtype
            there, if no source rank holds a box that is needed, if `processes` names a rank that is
            not there, or if not even one element can be staged.
    """
    places = _places(source, target, processes, node_size)
    tables = _Tables(source, target, places, staging)
    transfers = tuple(
        Transfer(region.tensor, name, tables.between(name, part, region))
        for name in sorted(target.tensors)
        for part, region in _sources(source, target, name)
    )
    steps = _steps(transfers, staging)
    return Plan(digest(source), digest(target), places, staging, transfers, steps)


class _Tables:
    """One table for all tensors that lie alike."""

    def __init__(self, source: Manifest, target: Manifest, places: Places, staging: int) -> None:
        self.source = source
        self.target = target
        self.places = places
        self.staging = staging
        self.processes = max(*places.sources, *places.targets) + 1
        self._slabs: dict[tuple[int, int, int, int], Distribution] = {}
        self._moves: dict[tuple[int, int], Moves] = {}
        self._staged: dict[tuple[int, int, int], Staged] = {}

    def between(self, name: str, part: Part | None, region: Region) -> Staged:
        """The table of a target tensor, or of a part of it, that a region of the source fills."""
        have, need = self.source.tensors[region.tensor], self.target.tensors[name]
        a = self._cut(have.distribution, region.part)
        b = self._cut(need.distribution, part)
        itemsize = need.dtype.itemsize
        key = id(a), id(b), itemsize
        if key in self._staged:
            return self._staged[key]
        if itemsize > self.staging:
            raise _misfit(
                f"{self.staging} bytes of staging hold no element of {name}",
                where=f"{name}, {need.type}",
                why=f"an element has {itemsize} bytes",
                fix="allow more staging",
            )
        try:
            if key[:2] not in self._moves:
                self._moves[key[:2]] = moves_between(a, b, self.places)
        except UncoveredError as error:
            box = ", ".join(f"{start}:{start + size}" for start, size in error.box)
            raise _misfit(
                f"no rank of the source holds [{box}] of {name}",
                where=f"{_told(region)} of the source on mesh {self.source.mesh}, "
                f"rank {error.rank} of the target on mesh {self.target.mesh}",
                why="every element that the target needs must be somewhere",
                fix="give a source manifest whose boxes cover the tensor",
            ) from error
        moves = self._moves[key[:2]]
        staged = stage(moves, itemsize, self.staging, self.places, self.processes)
        return self._staged.setdefault(key, staged)

    def _cut(self, whole: Distribution, part: Part | None) -> Distribution:
        if part is None:
            return whole
        key = id(whole), part.dim, part.start, part.length
        if key not in self._slabs:
            self._slabs[key] = slab(whole, part.dim, part.start, part.length)
        return self._slabs[key]


def _sources(source: Manifest, target: Manifest, name: str) -> Iterator[tuple[Part | None, Region]]:
    """What fills a target tensor: the whole of it, or each of its parts."""
    tensor = target.tensors[name]
    for own in (name, *tensor.aliases):
        region = source.find(own)
        if region is not None:
            yield None, _checked(source, region, own, tensor.type)
            return
    found = [(part, source.find(part.name)) for part in tensor.parts]
    lacking = [part.name for part, region in found if region is None] or [name]
    if not tensor.parts or any(region is None for _, region in found):
        raise _misfit(
            f"the source has no tensor {name}",
            where=f"target {tensor.type} on mesh {target.mesh}; source on mesh {source.mesh}, "
            f"{len(source.tensors)} tensors",
            why=f"no tensor, alias or part of the source is called {', '.join(lacking)}",
            fix="give manifests of one model; name aliases and parts where names differ",
        )
    for part, region in found:
        assert region is not None
        yield part, _checked(source, region, part.name, _part_type(tensor.type, part))


def _checked(source: Manifest, region: Region, name: str, needed: TensorType) -> Region:
    """A region of the source that has the shape and dtype that the target needs."""
    has = source.tensors[region.tensor].type
    if region.part is not None:
        has = _part_type(has, region.part)
    for what, mine, theirs in (
        ("shape", list(has.shape), list(needed.shape)),
        ("dtype", has.dtype, needed.dtype),
    ):
        if mine != theirs:
            raise _misfit(
                f"{name} has another {what} in the source than in the target",
                where=f"source {_told(region)}: {has}; target: {needed}",
                why="a reshard moves elements and never converts them",
                fix="give manifests of one model in one dtype",
            )
    return region


def _part_type(whole: TensorType, part: Part) -> TensorType:
    shape = (*whole.shape[: part.dim], part.length, *whole.shape[part.dim + 1 :])
    return TensorType(shape, whole.dtype)


def _told(region: Region) -> str:
    return region.tensor if region.part is None else f"{region.part.name} in {region.tensor}"


def _places(
    source: Manifest, target: Manifest, processes: Mapping[int, int] | None, node_size: int
) -> Places:
    have, need = source.mesh.size, target.mesh.size
    if node_size < 1:
        raise _misfit(f"nodes of {node_size} processes", why="a node has one process at least")
    if processes is None:
        return Places(tuple(range(have)), tuple(range(need)), node_size)
    for mine, theirs in processes.items():
        for side, rank, mesh in (("target", mine, target.mesh), ("source", theirs, source.mesh)):
            if not 0 <= rank < mesh.size:
                raise _misfit(
                    f"the {side} has no rank {rank}",
                    where=f"target rank {mine} as the process of source rank {theirs}",
                    why=f"the {side} has ranks 0 to {mesh.size - 1}, on mesh {mesh}",
                    fix="name ranks that both manifests have",
                )
    if len(set(processes.values())) < len(processes):
        raise _misfit(
            "two ranks of the target are one process",
            where=f"processes {dict(processes)}",
            why="a process is one rank of a mesh",
            fix="give every target rank a source rank of its own, or none",
        )
    first = -(-have // node_size) * node_size  # new processes are on nodes of their own
    targets = tuple(processes.get(rank, first + rank) for rank in range(need))
    return Places(tuple(range(have)), targets, node_size)


def _steps(transfers: tuple[Transfer, ...], staging: int) -> tuple[Step, ...]:
    """Transfers in one step as long as they can be staged together."""
    steps: list[Step] = []
    first, staged = 0, np.zeros(0, np.int64)
    for index, transfer in enumerate(transfers):
        table = transfer.table
        if index > first:
            together = staged + table.peaks
            if table.count <= 1 and int(together.max(initial=0)) <= staging:
                staged = together
                continue
            steps.append(Step(first, index, None))
        first, staged = index, table.peaks
        if table.count > 1:
            steps += [Step(index, index + 1, number) for number in range(table.count)]
            first = index + 1
    if first < len(transfers):
        steps.append(Step(first, len(transfers), None))
    return tuple(steps)


def _misfit(what: str, *, where: str = "", why: str = "", fix: str = "") -> RolemeshError:
    return RolemeshError(
        "RM039", what, where=where or "plan_reshard", why=why, fix=fix or "give other options"
    )
