"""The compiled programs of an engine: found by what they were made for, made at first use.

A program is made for a phase, a number of rows and of tokens per row, and two plain values. It is
then replayed: which requests it serves, where their tokens go and what they attend to is data. The
number of tokens of a prefill program is symbolic, unless the engine pads to fixed sizes.

Ranks are processes, or all of them run in lock-step in this process. Where ranks are processes, the
stored tensors that a program meets for the first time and that have no bytes get this rank's shard
before it runs: weights from the loader, caches as zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch

from rolemesh.compiler.api import Sharded, lockstep, lower, shard
from rolemesh.compiler.capture.entry import Captured
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.engine.cache import Batch, Tables
from rolemesh.compiler.engine.serving import ServingModel
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.pipeline import MeshLike
from rolemesh.passes.cost import CostTable

__all__ = ["ProgramKey", "ProgramOptions", "Programs"]

Place = Callable[[Program, list[torch.Tensor]], None]
"""Told of a new Program and its inputs before it first runs."""


class ProgramKey(NamedTuple):
    """What a program was made for.

    Attributes:
        phase: Phase of the role.
        rows: Requests in a call.
        tokens: Tokens of each request; None for any number.
        fresh: Whether requests are at their start, which matters to models with states only.
        last: Whether it returns the last token's logits only.
    """

    phase: str
    rows: int
    tokens: int | None
    fresh: bool
    last: bool


@dataclass(frozen=True)
class ProgramOptions:
    """What decides the programs, as in `rolemesh.shard` and `rolemesh.lower`.

    Attributes:
        mesh: The mesh as the user gave it.
        role: The role.
        axis: Mesh axis the role uses.
        target: What programs are compiled to.
        target_options: The target's options.
        annotations: `P` by name pattern.
        costs: Prices of collectives.
        prefetch: Layers ahead that broadcasts of layer-sharded weights start.
        in_lockstep: Whether all ranks run in this process.
        any_length: Whether one prefill program serves all numbers of tokens.
    """

    mesh: MeshLike
    role: str
    axis: str
    target: str
    target_options: Mapping[str, object] | None
    annotations: Mapping[str, P]
    costs: CostTable | None
    prefetch: int | None
    in_lockstep: bool
    any_length: bool


class Programs:
    """The programs of one engine.

    Args:
        serving: What is compiled.
        options: How.
        place: Called with each new program, before it first runs.
    """

    def __init__(self, serving: ServingModel, options: ProgramOptions, place: Place) -> None:
        self.serving = serving
        self.options = options
        self.place = place
        self.made: dict[ProgramKey, Callable[..., object]] = {}

    def __call__(
        self, phase: str, batch: Batch, tables: Tables, *, fresh: bool, last: bool
    ) -> torch.Tensor:
        """Logits `[rows, tokens or 1, vocabulary]` of a batch; the tables get its tokens."""
        key = self.prepare(phase, batch, tables, fresh=fresh, last=last)
        with torch.no_grad():
            logits = self.made[key](*batch, tables, fresh, last)
        assert isinstance(logits, torch.Tensor)
        # A rank's results may lie in memory that the next replay writes to.
        return logits.clone()

    def prepare(
        self, phase: str, batch: Batch, tables: Tables, *, fresh: bool, last: bool
    ) -> ProgramKey:
        """Make sure that there is a program for a call, without running it."""
        rows, tokens = batch.size
        symbolic = self.options.any_length and phase == "prefill"
        key = ProgramKey(phase, rows, None if symbolic else tokens, fresh, last)
        if key not in self.made:
            if symbolic:
                for tensor in batch[:-1]:
                    torch._dynamo.mark_dynamic(tensor, 1)
            with torch.no_grad():
                self.made[key] = self._make(phase, (*batch, tables, fresh, last))
        return key

    def _make(self, phase: str, arguments: tuple[object, ...]) -> Callable[..., object]:
        options = self.options
        traced = trace(self.serving, *arguments)
        sharded = shard(
            traced,
            options.mesh,
            options.role,
            phase=phase,
            axis=options.axis,
            annotations=options.annotations,
            costs=options.costs,
            prefetch=options.prefetch,
        )
        self.place(sharded.program, _inputs(traced, arguments))
        return self._runner(sharded)

    def _runner(self, sharded: Sharded) -> Callable[..., object]:
        options = self.options
        if options.in_lockstep and options.target == "eager":
            return functools.partial(lockstep, sharded)
        lowered = lower(sharded, options.target, options.target_options)
        return lowered.lockstep() if options.in_lockstep else lowered.compile()


class _Stopped(BaseException):
    """Ends a call of the traced model before anything runs."""


def _inputs(traced: Traced, arguments: tuple[object, ...]) -> list[torch.Tensor]:
    """The tensors that a Program's inputs are bound to."""
    found: list[torch.Tensor] = []

    def stop(captured: Captured, inputs: list[torch.Tensor]) -> NoReturn:
        found.extend(inputs)
        raise _Stopped

    try:
        traced.entry.call(stop, *arguments)
    except _Stopped:
        return found
    raise AssertionError("the traced model calls its executor")
