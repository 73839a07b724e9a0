"""Collectives of a GE graph where all ranks are threads of this process.

Ranks meet in a collective: the last one to arrive makes everybody's result, in rank order. Between
collectives they take turns, in the same order in every run. (Threads that run small ops at the same
time fight over the interpreter's lock: 4 ranks took twice as long without turns.)

Invariants: only the rank that has the turn computes; when no rank can go on, those that wait fail
at once; no two ranks get the same memory.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TypeVar

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.chunks import reduce_values
from rolemesh.runtime.ge.communicator import Communicator, Request, group_ranks

__all__ = ["Rendezvous", "run_ranks"]

T = TypeVar("T")


def run_ranks(
    size: int, function: Callable[[int, Communicator], T], *, timeout: float = 300.0
) -> list[T]:
    """Run a function on all ranks, each in a thread with a copy of the caller's context.

    Args:
        size: Number of ranks.
        function: Called with a rank and its communicator.
        timeout: Seconds that a rank waits for others in a collective, or for its turn, and that a
            failure waits for the other ranks to end.

    Returns:
        What each rank returned.

    Raises:
        BaseException: What the first rank to fail raised; the others fail because of it.
    """
    return Rendezvous(size, timeout=timeout).run(function)


class Rendezvous:
    """Where the ranks of this process meet.

    Args:
        size: Number of ranks.
        timeout: As in `run_ranks`.
    """

    def __init__(self, size: int, *, timeout: float = 300.0) -> None:
        self.size = size
        self.timeout = timeout
        self._lock = threading.Lock()
        self._woken = [threading.Condition(self._lock) for _ in range(size)]
        self._done = threading.Condition(self._lock)
        self._meetings: dict[str, _Meeting] = {}
        self._turn: int | None = None
        self._ready: set[int] = set()
        self._ended: dict[int, str] = {}
        self._threads: list[threading.Thread] = []

    def communicator(self, rank: int) -> Communicator:
        """What a rank exchanges through, in every `run`; outside of them it cannot."""
        return _Rank(self, rank)

    def run(self, function: Callable[[int, Communicator], T]) -> list[T]:
        """Run a function on all ranks; see `run_ranks`."""
        self._meetings.clear()
        self._ended.clear()
        self._turn, self._ready = None, set(range(self.size))
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def on_rank(rank: int) -> None:
            try:
                self._start(rank)
                results[rank] = function(rank, self.communicator(rank))
                how = "has finished"
            except BaseException as error:  # noqa: BLE001 - it is raised again by the caller
                error.add_note(f"on rank {rank} of {self.size}")
                errors.append(error)
                how = f"failed: {type(error).__name__}: {error}".split("\n", 1)[0]
            if self._is_rank(rank):  # not one that was given up
                self._end(rank, how)

        self._threads = [
            threading.Thread(
                target=contextvars.copy_context().run,
                args=(on_rank, rank),
                name=f"rolemesh-rank-{rank}",
                daemon=True,
            )
            for rank in range(self.size)
        ]
        for thread in self._threads:
            thread.start()
        try:
            with self._lock:
                self._done.wait_for(lambda: len(self._ended) == self.size or bool(errors))
                self._done.wait_for(lambda: len(self._ended) == self.size, self.timeout)
        finally:
            for rank in range(self.size):  # after an interrupt nobody is waited for any more
                self._end(rank, "was given up")
            self._threads = []
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(self.size)]

    def exchange(self, rank: int, request: Request, wire: torch.Tensor) -> torch.Tensor:
        """One rank's part in a collective; see `Communicator.exchange`."""
        members = self._members(rank, request)
        with self._lock:
            if self._turn != rank or not self._is_rank(rank):
                raise _failure(
                    f"{request.node} is not called from inside a run of its ranks",
                    request,
                    f"rank {rank} takes part in none that goes on",
                    "a graph keeps the communicator it was loaded with: run it with the same "
                    "rendezvous",
                )
            meeting = self._meetings.setdefault(request.group, _Meeting(members))
            meeting.wires[rank] = wire
            meeting.requests[rank] = request
            self._arrived(meeting)
            if rank in self._ready:
                self._ready.remove(rank)  # it keeps the turn
            else:
                self._pass_turn()
            if not self._await_turn(rank):
                late = [str(member) for member in members if member not in meeting.wires]
                said = f"rank {', '.join(late)} did not arrive" if late else "all have arrived"
                self._close(meeting, f"in {self.timeout:g} s {said}, and {self._holder()}")
            if meeting.failure:
                raise _failure(
                    f"{request.node} cannot take place on rank {rank}",
                    request,
                    meeting.failure,
                    "all ranks of a group must issue the same collectives in the same order",
                )
            return meeting.results.pop(rank)

    def _start(self, rank: int) -> None:
        with self._lock:
            if self._turn is None:
                self._pass_turn()
            if not self._await_turn(rank):
                raise RolemeshError(
                    "RM030",
                    what=f"rank {rank} could not start in {self.timeout:g} s",
                    where=f"{self.size} ranks as threads of this process",
                    why=self._holder(),
                    fix="see what that rank does; between collectives, only one rank computes",
                )

    def _end(self, rank: int, how: str) -> None:
        """Record that a rank takes part in nothing more."""
        with self._lock:
            self._ended.setdefault(rank, how)
            self._ready.discard(rank)
            for meeting in list(self._meetings.values()):
                if rank in meeting.members:
                    self._close(meeting, self._absence(rank))
            if self._turn in (rank, None):
                self._pass_turn()
            self._done.notify_all()

    def _arrived(self, meeting: _Meeting) -> None:
        """Hold or cancel a meeting if that is decided, now that another rank has arrived."""
        gone = [member for member in meeting.members if member in self._ended]
        difference = meeting.difference()
        if gone or difference:
            self._close(meeting, self._absence(gone[0]) if gone else difference)
        elif len(meeting.wires) == len(meeting.members):
            meeting.results = meeting.exchanged()
            self._close(meeting)

    def _close(self, meeting: _Meeting, failure: str = "") -> None:
        """Let those who have come to a meeting go on, or fail."""
        meeting.failure = failure
        for rank, request in meeting.requests.items():
            self._ready.add(rank)
            self._meetings.pop(request.group, None)

    def _pass_turn(self) -> None:
        """Give the turn to the lowest rank that can go on."""
        if not self._ready and self._meetings:
            waits = "; ".join(
                f"rank {rank} in {request.node} of group {request.group}"
                for meeting in self._meetings.values()
                for rank, request in meeting.requests.items()
            )
            for meeting in list(self._meetings.values()):
                self._close(meeting, f"all ranks wait, in different groups: {waits}")
        self._turn = min(self._ready, default=None)
        if self._turn is not None:
            self._ready.remove(self._turn)
            self._woken[self._turn].notify()

    def _await_turn(self, rank: int) -> bool:
        return self._woken[rank].wait_for(lambda: self._turn == rank, self.timeout)

    def _is_rank(self, rank: int) -> bool:
        """Whether the present thread is that rank in the run that goes on."""
        return rank < len(self._threads) and self._threads[rank] is threading.current_thread()

    def _holder(self) -> str:
        return f"rank {self._turn} has not come to its next collective"

    def _absence(self, rank: int) -> str:
        return f"rank {rank} does not take part: it {self._ended[rank]}"

    def _members(self, rank: int, request: Request) -> tuple[int, ...]:
        _, ranks = group_ranks(request.group)
        if rank not in ranks or len(set(ranks)) != len(ranks) or max(ranks) >= self.size:
            raise _failure(
                f"{request.node} names a group that rank {rank} of {self.size} is not in",
                request,
                f"its ranks are {list(ranks)}",
                "convert the graph for this rank and this mesh",
            )
        return ranks


@dataclass(frozen=True)
class _Rank:
    """One rank's way into a rendezvous; a `Communicator`."""

    rendezvous: Rendezvous
    rank: int

    def exchange(self, request: Request, wire: torch.Tensor) -> torch.Tensor:
        """See `Communicator.exchange`."""
        return self.rendezvous.exchange(self.rank, request, wire)


@dataclass
class _Meeting:
    """One collective of one group, while its members arrive.

    Attributes:
        members: Ranks of the group, in its order.
        requests: What each rank that has arrived asks for.
        wires: What each rank puts in.
        results: What each rank gets, once all have arrived.
        failure: Why it cannot take place; empty if it can.
    """

    members: tuple[int, ...]
    requests: dict[int, Request] = field(default_factory=dict)
    wires: dict[int, torch.Tensor] = field(default_factory=dict)
    results: dict[int, torch.Tensor] = field(default_factory=dict)
    failure: str = ""

    def difference(self) -> str:
        """What differs between those who have arrived; empty if nothing does."""
        said: dict[object, str] = {}
        for rank, request in self.requests.items():
            wire = self.wires[rank]
            shape = [] if request.kind == "all_to_all" else list(wire.shape)
            same = replace(request, node="", send_counts=(), receive_counts=())
            said.setdefault(
                (same, wire.dtype, tuple(shape)),
                f"rank {rank} asks for {request.kind} {request.reduction}".rstrip()
                + (f" from position {request.root}" if request.kind == "broadcast" else "")
                + f" of {wire.dtype} {list(wire.shape)} in {request.node}",
            )
        if len(said) > 1:
            return "; ".join(said.values())
        if len(self.wires) == len(self.members):
            return self._uneven()
        return ""

    def _uneven(self) -> str:
        """Which rank sends another number of elements than its partner expects, if one does."""
        if self.requests[self.members[0]].kind != "all_to_all":
            return ""
        sent = [self._counts(rank, self.requests[rank].send_counts) for rank in self.members]
        expected = [self._counts(rank, self.requests[rank].receive_counts) for rank in self.members]
        for i, source in enumerate(self.members):
            if sum(sent[i]) != self.wires[source].numel():
                return f"rank {source} sends {sent[i]} of {self.wires[source].numel()} elements"
            for j, target in enumerate(self.members):
                if sent[i][j] != expected[j][i]:
                    return (
                        f"rank {source} sends {sent[i][j]} elements to rank {target}, "
                        f"which expects {expected[j][i]}"
                    )
        return ""

    def _counts(self, rank: int, counts: Sequence[int]) -> list[int]:
        size = len(self.members)
        return list(counts or [self.wires[rank].numel() // size] * size)

    def exchanged(self) -> dict[int, torch.Tensor]:
        """What each member gets, in memory of its own."""
        wires = [self.wires[rank] for rank in self.members]
        request = self.requests[self.members[0]]
        size = len(wires)
        match request.kind:
            case "all_gather":
                parts = [torch.cat(wires) for _ in wires]
            case "broadcast":
                parts = [wires[request.root].clone() for _ in wires]
            case "all_reduce":
                total = _reduced(wires, request.reduction)
                parts = [total.clone() for _ in wires]
            case "reduce_scatter":
                blocks = _reduced(wires, request.reduction).chunk(size)
                parts = [block.clone() for block in blocks]
            case "all_to_all":
                cut = [
                    wire.split(self._counts(rank, self.requests[rank].send_counts))
                    for rank, wire in zip(self.members, wires, strict=True)
                ]
                parts = [torch.cat([pieces[index] for pieces in cut]) for index in range(size)]
            case _:
                raise ValueError(f"{request.node}: unknown collective {request.kind}")
        return dict(zip(self.members, parts, strict=True))


def _reduced(wires: Sequence[torch.Tensor], reduction: str) -> torch.Tensor:
    """The reduction in rank order, as lock-step execution does it."""
    return reduce(torch.mul, wires) if reduction == "prod" else reduce_values(wires, reduction)


def _failure(what: str, request: Request, why: str, fix: str) -> RolemeshError:
    where = f"{request.kind} in group {request.group}"
    return RolemeshError("RM030", what=what, where=where, why=why, fix=fix)
