"""Continuous batching on one replica: requests wait, take a slot, decode together, and leave.

A step first lets waiting requests into free slots, in order, and reads their prompts; then all
requests in slots take one decode step together. What a request generates does not depend on which
others are served, since rows of a batch do not see each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from rolemesh.compiler.engine.replica import Replica
from rolemesh.compiler.engine.sampling import Sampler, Sampling
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Completion", "Request", "Scheduler"]


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        prompt: Token ids.
        max_new_tokens: Most tokens to generate.
        stop: Token ids that end the generation; they are part of the result.
        sampling: How tokens are chosen.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Completion:
    """A finished request.

    Attributes:
        number: Its number.
        tokens: What was generated.
        stopped: Whether a stop token ended it, rather than its length.
    """

    number: int
    tokens: tuple[int, ...]
    stopped: bool


@dataclass
class _Running:
    """A request in a slot."""

    number: int
    request: Request
    slot: int
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)


class Scheduler:
    """The queue of one replica.

    Args:
        replica: The slots.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.waiting: deque[tuple[int, Request]] = deque()
        self.running: list[_Running] = []

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Refuse a request that can never be served.

        Raises:
            RolemeshError: RM004 if the role runs only one of the phases; RM034 for a bad prompt, or
                one that is too long for a slot together with what is to be generated.
        """
        for phase in ("prefill", "decode"):
            self.replica.role.tokens(phase)
        self.replica.check_tokens(request.prompt)
        # The last token that is generated is never read.
        needed = len(request.prompt) + request.max_new_tokens - 1
        most = self.replica.plan.max_len
        if request.max_new_tokens < 1 or needed > most:
            raise RolemeshError(
                "RM034",
                f"a prompt of {len(request.prompt)} tokens with {request.max_new_tokens} new ones "
                "cannot be served",
                where="rolemesh.Engine",
                why=f"a slot holds {most} tokens, and at least one token is generated",
                fix="ask for fewer tokens, or make the engine with a longer max_len",
            )

    def add(self, number: int, request: Request) -> None:
        """Queue a checked request under a number of its own."""
        self.waiting.append((number, request))

    def step(self) -> list[Completion]:
        """Let requests in, decode one token for each that runs, and return those that are done."""
        done = list(self._admit())
        if self.running:
            last = [[run.tokens[-1]] for run in self.running]
            logits = self.replica.decode(last, [run.slot for run in self.running])
            for run, row in zip(list(self.running), logits, strict=True):
                run.tokens.append(run.sampler(row[-1]))
                done.extend(self._finish(run))
        return done

    def _admit(self) -> Iterable[Completion]:
        while self.waiting and self.replica.free_slots:
            number, request = self.waiting.popleft()
            slot = self.replica.acquire()
            run = _Running(number, request, slot, Sampler(request.sampling))
            (logits,) = self.replica.prefill(request.prompt, slot)
            run.tokens.append(run.sampler(logits))
            self.running.append(run)
            yield from self._finish(run)

    def _finish(self, run: _Running) -> Iterable[Completion]:
        stopped = run.tokens[-1] in run.request.stop
        if stopped or len(run.tokens) == run.request.max_new_tokens:
            self.running.remove(run)
            self.replica.release(run.slot)
            yield Completion(run.number, tuple(run.tokens), stopped)
