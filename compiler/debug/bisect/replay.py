"""A pass that raises, by itself: the passes that led to it, on the part of a Program they fail on.

Serialised Programs have no decisions, so what raises while decisions are made or carried out starts
from the seeded Program. What is left out is found by two searches: the shortest beginning of the
graph that fails, then what of that the last op needs; where every value has a layout, a graph can
be cut off anywhere, and `shrink` leaves out every op that the failure does not need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rolemesh.compiler.debug.bisect.repro import KIND, decode_stage, encode_stage
from rolemesh.compiler.debug.bisect.shrink import shrink
from rolemesh.compiler.debug.bisect.subgraph import Parts, cone
from rolemesh.compiler.debug.compare.reports import error_text
from rolemesh.compiler.debug.compare.stages import CAPTURE, PhaseRun
from rolemesh.compiler.dump.files import SCHEMA_VERSION
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.compiler.roles import role_named
from rolemesh.passes.absorb import Absorb
from rolemesh.passes.base import Pass
from rolemesh.passes.bucket import Bucket
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.compose import Compose
from rolemesh.passes.gather_once import GatherOnce
from rolemesh.passes.partition import Partition
from rolemesh.passes.prefetch import Prefetch
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.schedule import Schedule
from rolemesh.passes.seed import Seed
from rolemesh.passes.sink import Sink
from rolemesh.passes.verify import Verify

__all__ = ["Replay", "load_replay", "replay_of"]

_DECIDING = (Absorb.name, Propagate.name, PushBack.name, Partition.name)
_PASSES: Mapping[str, Callable[[], Pass]] = {
    Canonicalise.name: Canonicalise,
    Compose.name: Compose,
    Absorb.name: Absorb,
    Propagate.name: Propagate,
    PushBack.name: PushBack,
    Partition.name: Partition,
    GatherOnce.name: GatherOnce,
    Sink.name: Sink,
    Bucket.name: Bucket,
    Verify.name: Verify,
}
"""Passes without options on the command line."""
_BEFORE: Mapping[str, str] = {
    Canonicalise.name: CAPTURE,
    Absorb.name: Seed.name,
    Propagate.name: Seed.name,
    PushBack.name: Seed.name,
    Partition.name: Seed.name,
}
"""The stage that a pass is run again from; later ones are run from the stage before."""


@dataclass(frozen=True, eq=False)
class Replay:
    """A Program that passes fail on.

    Attributes:
        stage: The pass that raises.
        program: Where the passes start.
        passes: Their names and options, in order.
        error: What it raised.
    """

    stage: str
    program: Program
    passes: tuple[Mapping[str, Json], ...]
    error: str

    def run(self, program: Program | None = None) -> None:
        """Run the passes; what they raise is raised."""
        program = self.program if program is None else program
        for entry in self.passes:
            program = _pass(entry, program).apply(program)

    def write(self, path: Path) -> None:
        """Write the data file."""
        passes: list[Json] = [dict(entry) for entry in self.passes]
        data: dict[str, Json] = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "stage": self.stage,
            "error": self.error,
            "passes": passes,
            "before": encode_stage(self.program),
        }
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def load_replay(data: Mapping[str, Any]) -> Replay:
    """What `Replay.write` wrote.

    Raises:
        ValueError: If it is nothing of the kind; KeyError or TypeError likewise.
    """
    program = decode_stage(data["before"])
    return Replay(data["stage"], program, tuple(data["passes"]), data["error"])


def replay_of(run: PhaseRun) -> Replay:
    """The failure of a phase's pass by itself, on as small a Program as is found."""
    failure = run.failure
    assert failure is not None
    name = failure.step.name
    *_, before = run.programs
    start = run.programs[_BEFORE.get(name, before)]
    chain = _DECIDING[: _DECIDING.index(name)] if name in _DECIDING else ()
    chain = (*(step for step in chain if step in run.programs), name)
    passes = tuple(_entry(step, run) for step in chain)
    replay = Replay(name, start, passes, error_text(failure.error))
    if name == Seed.name:  # it reads the classes of stored tensors off the whole graph
        return replay
    return Replay(name, _smallest(replay), passes, replay.error)


def _entry(name: str, run: PhaseRun) -> Mapping[str, Json]:
    assert run.failure is not None
    step = run.failure.step
    if isinstance(step, Prefetch | Schedule):
        return {"pass": name, "window": step.window}
    if name == Seed.name:
        options = run.options
        return {
            "pass": name,
            "role": options.role,
            "phase": run.phase,
            "axis": options.role_axis,
            "mesh": dict(zip(options.mesh.names, options.mesh.sizes, strict=True)),
        }
    return {"pass": name}


def _pass(entry: Mapping[str, Any], program: Program) -> Pass:
    name = entry["pass"]
    if name in (Prefetch.name, Schedule.name):
        return (Prefetch if name == Prefetch.name else Schedule)(entry["window"])
    if name == Seed.name:
        role = role_named(entry["role"])
        mesh = Mesh(entry["mesh"])
        return Seed(mesh, role.uses(entry["phase"], mesh, entry["axis"]))
    return _PASSES[name]()


def _smallest(replay: Replay) -> Program:
    """As small a part of a replay's Program as fails likewise; all of it if no part does."""
    program = replay.program
    cuttable = bool(program.layouts) and replay.stage not in _DECIDING
    parts = Parts(program, lambda _: cuttable)
    ops = [node.name for node in program.ops]

    def fails(part: Program) -> bool:
        try:
            replay.run(part)
        except Exception as error:  # noqa: BLE001 - what is looked for
            return error_text(error) == replay.error
        return False

    def beginning(count: int) -> Program:
        kept = set(ops[:count])
        ends = [
            name
            for name in ops[:count]
            if isinstance(parts.nodes[name].meta.get("type"), TensorType)
            and not any(user.name in kept for user in parts.nodes[name].users)
        ]
        return parts.part(ops[:count], ends)

    if not fails(beginning(len(ops))):
        return program
    low, high = 0, len(ops)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(beginning(middle)) else (middle, high)
    last = ops[high - 1]
    needed = cone(program, last, ())
    leading = [name for name in ops[:high] if name in needed]
    if not fails(parts.part(leading, [last])):
        return beginning(high)
    if cuttable:
        leading = shrink(leading, lambda keep: fails(parts.part([*keep, last], [last])))
    return parts.part([*leading, last], [last])
