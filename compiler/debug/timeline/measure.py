"""The measured timeline of a phase: its ranks as processes over gloo, under torch.profiler.

This process captures and shards the phase; then it forks, so that the ranks share the Program. Each
rank runs its part a few times on the case's own arguments, node by node, and records the last run;
each run updates copies of its own of a cache, so that all do the same.
An op's event is the time its nodes of the rank's graph take on the rank's thread; a collective's is
the time gloo takes for it on a thread of its own, from when it gets to it until the data is there.

Clocks: all ranks run on one machine, whose monotonic clock they share. Each rank finds by how much
its profiler's clock is ahead of that one.

Invariants: the same nodes have events as in the simulated timeline; each collective of the Program
has one. Ops are run one by one by Python, which takes time between them that no event has.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import fx
from torch.profiler import ProfilerActivity, profile, record_function

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.entry import Captured
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.timeline.timeline import (
    COMMUNICATION,
    COMPUTE,
    WAIT,
    Event,
    is_free,
    received_by,
)
from rolemesh.compiler.dump.reader import Stage, open_stage
from rolemesh.compiler.dump.stage_json import StageEncoder
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.roles import role_named
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example
from rolemesh.lowering.targets import NoOptions, Runnable, Target
from rolemesh.lowering.write_back import copy_back, write_in_place
from rolemesh.runtime.config import Config
from rolemesh.runtime.groups import groups_for
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.rank import RankProgram
from rolemesh.runtime.store import default_store

__all__ = ["measure"]

_RUNS = 3
"""Runs of a rank; all but the last one warm up."""

_OP, _CLOCK, _WIRE = "rolemesh.op ", "rolemesh.clock", "gloo:"
"""What names of the profiler's records start with."""


class _Span(NamedTuple):
    """Something a rank did, in nanoseconds of the machine's monotonic clock."""

    name: str
    start: int
    end: int


def measure(
    options: CheckOptions, phase: str | None, progress: Callable[[str], None]
) -> tuple[Stage, list[Event]]:
    """Run a phase of a role on one process per rank.

    Args:
        options: The model, the role, the mesh and sizes.
        phase: The phase; None if the role has only one.
        progress: Called with what is being done.

    Returns:
        The partitioned stage, and the events of all ranks, by rank, then by start; time starts
        with the first of them.

    Raises:
        RolemeshError: RM018 for a phase that the role or the case does not have; for what cannot
            be compiled; RM013 if a rank fails.
    """
    role = role_named(options.role)
    progress(f"loading {options.model}")
    case = options.load()
    phase = _phase(phase, [name for name in role.phases if name in case.phases], options)
    args, kwargs = case.phases[phase]
    with torch.no_grad():
        progress(f"compiling {phase}")
        traced = trace(case.model, *args, **kwargs)
        sharded = shard(traced, options.mesh, role.name, phase=phase, optimise=options.optimise)
        progress(f"running {phase} on {options.mesh.size} ranks")
        seconds = Config.read().timeout
        spans = run_processes(
            _rank,
            options.mesh.size,
            (sharded, args, kwargs),
            timeout=2 * seconds,
            collective_timeout=seconds,
            fork=True,
        )
    stage = _stage(sharded)
    return stage, _events(stage, sharded, cast("list[list[_Span]]", spans))


def _phase(asked: str | None, phases: Sequence[str], options: CheckOptions) -> str:
    if asked is not None and asked in phases:
        return asked
    if asked is None and len(phases) == 1:
        return phases[0]
    raise RolemeshError(
        "RM018",
        what="no phase is named" if asked is None else f"there is no phase {asked!r} to measure",
        where=f"{options.model}, role {options.role!r}",
        why=f"there are {', '.join(phases) or 'none'}",
        fix="name one of them with --program",
    )


def _stage(sharded: Sharded) -> Stage:
    """The stage that runs, as a run directory would have it."""
    encoder = StageEncoder()
    encoder.encode(sharded.decided, "decided", 0)  # formulas follow its rules
    text = encoder.encode(sharded.program, sharded.program.history[-1], 1)
    return open_stage(text, "the program that was measured").program().stage()


# --------------------------------------------------------------------------------------------------
# In the rank's process.


def _rank(sharded: Sharded, args: tuple[object, ...], kwargs: Mapping[str, object]) -> list[_Span]:
    """What this rank did in its last run."""
    names = frozenset(node.name for node in sharded.program.ops)
    spans: list[_Span] = []

    def lower(
        module: fx.GraphModule, examples: Sequence[Example], signature: Signature, options: object
    ) -> Runnable:
        write_in_place(module.graph, signature.mutated)
        kept = copy_back(module.graph, signature.mutated)
        recorded = _Recorded(module, names)
        updated = frozenset(signature.mutated.values())

        def once(*args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
            own = [
                arg.clone() if index in updated and isinstance(arg, torch.Tensor) else arg
                for index, arg in enumerate(args)
            ]
            return signature.all_outputs(kept, recorded(*own), own)

        return once

    def run(captured: Captured, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        values = captured.program.values(inputs)
        groups = groups_for(sharded.program.the_mesh)
        target = Target("recorded", lower, pooled=True)
        program = RankProgram(sharded.program, target, NoOptions(), groups, values)
        for _ in range(_RUNS - 1):
            program(inputs, default_store())
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            marks = _mark_clock()
            results = program(inputs, default_store())
        spans.extend(_spans(recorded, marks))
        return results

    sharded.traced.entry.call(run, *args, **kwargs)
    return spans


class _Recorded:
    """A bound graph that is run node by node, each recorded for the Program's node it is of."""

    def __init__(self, module: fx.GraphModule, names: frozenset[str]) -> None:
        self.interpreter = _Interpreter(module)
        waiting: list[str] = []
        for node in module.graph.nodes:  # the node that has the name comes last of its nodes
            if node.op in ("call_function", "get_attr"):
                waiting.append(node.name)
                if node.name in names:
                    self.interpreter.owners |= dict.fromkeys(waiting, node.name)
                    waiting.clear()

    def __call__(self, *args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            return cast("tuple[torch.Tensor | None, ...]", self.interpreter.run(*args))


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.owners: dict[str, str] = {}

    def run_node(self, node: fx.Node) -> object:
        if node.name not in self.owners:
            return super().run_node(node)
        with record_function(_OP + self.owners[node.name]):
            return super().run_node(node)


def _mark_clock() -> list[int]:
    """Readings of the monotonic clock, each just before a record of the profiler."""
    readings = []
    for _ in range(16):
        readings.append(time.monotonic_ns())
        with record_function(_CLOCK):
            pass
    return readings


def _spans(recorded: profile, marks: Sequence[int]) -> list[_Span]:
    """The profiler's records of ops and of gloo on the monotonic clock, in order."""
    found = [
        _Span(event.name, round(event.time_range.start * 1000), round(event.time_range.end * 1000))
        for event in recorded.events()
        if event.name.startswith((_OP, _CLOCK, _WIRE))
    ]
    found.sort(key=lambda span: span.start)
    clocks = [span.start for span in found if span.name == _CLOCK]
    # A record starts a little after its reading, so the smallest difference is the nearest one.
    ahead = min(there - here for there, here in zip(clocks, marks, strict=True))
    return [_Span(s.name, s.start - ahead, s.end - ahead) for s in found if s.name != _CLOCK]


# --------------------------------------------------------------------------------------------------
# All ranks together.


def _events(stage: Stage, sharded: Sharded, ranks: Sequence[Sequence[_Span]]) -> list[Event]:
    zero = min(span.start for spans in ranks for span in spans)
    events = []
    for rank, spans in enumerate(ranks):
        moved = _wired(stage, [span for span in spans if span.name.startswith(_WIRE)], rank)
        ops = [span._replace(name=span.name.removeprefix(_OP)) for span in spans
               if span.name.startswith(_OP)]  # fmt: skip
        found = []
        for span in _merged(moved):
            node = stage.nodes[span.name]
            received = received_by(node, sharded.program.the_mesh, rank)
            kind = str((node.collective or {})["op"])
            found.append(_event(rank, COMMUNICATION, span, zero, kind, node.module, received))
        events += _in_lanes(found)
        for span in _merged(ops):
            node = stage.nodes[span.name]
            if node.collective is None and not is_free(node):
                kind = WAIT if node.op == "mesh.wait" else COMPUTE
                events.append(_event(rank, COMPUTE, span, zero, kind, node.module, 0))
    return sorted(events, key=lambda event: (event.rank, event.start, event.end))


def _event(
    rank: int, stream: str, span: _Span, zero: int, kind: str, module: str, received: int
) -> Event:
    start, duration = (span.start - zero) / 1000, (span.end - span.start) / 1000
    return Event(rank, stream, span.name, start, duration, kind, module, received)


def _wired(stage: Stage, spans: Sequence[_Span], rank: int) -> list[_Span]:
    """What gloo did, by the names of the nodes it did it for: it takes up exchanges in order."""
    issued = [
        node.name
        for node in stage.nodes.values()
        if node.collective is not None
        for _ in node.collective["axes"]  # an exchange for each
    ]
    assert len(spans) == len(issued), (
        f"rank {rank} recorded {len(spans)} of {len(issued)} exchanges"
    )
    return [span._replace(name=name) for span, name in zip(spans, issued, strict=True)]


def _merged(spans: Sequence[_Span]) -> list[_Span]:
    """One span for each name, from the first start to the last end."""
    parts: dict[str, list[_Span]] = defaultdict(list)
    for span in spans:
        parts[span.name].append(span)
    return [
        _Span(name, min(span.start for span in found), max(span.end for span in found))
        for name, found in parts.items()
    ]


def _in_lanes(events: Sequence[Event]) -> list[Event]:
    """Collectives of one rank, those that ran at the same time on streams of their own."""
    ends: list[float] = []
    found = []
    for event in sorted(events, key=lambda event: event.start):
        lane = next((i for i, end in enumerate(ends) if end <= event.start), len(ends))
        ends[lane : lane + 1] = [event.end]
        stream = COMMUNICATION if lane == 0 else f"{COMMUNICATION} {lane + 1}"
        found.append(replace(event, stream=stream))
    return found
