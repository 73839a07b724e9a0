"""A run at a glance: its programs, their stages, and how many ops of which kind a pass changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.debug.show.show import columns
from rolemesh.compiler.dump.reader import RecordedProgram, Run

__all__ = ["ProgramSummary", "StageSummary", "summarise", "summary_text"]

_SHOWN = 4
"""Ops named in a line of text; the rest is counted."""


@dataclass(frozen=True)
class StageSummary:
    """One stage.

    Attributes:
        number: Its number.
        name: The pass.
        ops: How many ops the Program has after it.
        collectives: How many of them communicate.
        bytes: Bytes that a rank receives in all of them.
        change: By op, how many more there are than after the pass before; no zeros.
    """

    number: int
    name: str
    ops: int
    collectives: int
    bytes: int
    change: Mapping[str, int]


@dataclass(frozen=True)
class ProgramSummary:
    """One program.

    Attributes:
        id: `<role>/<phase>`.
        mesh: Axis sizes by name.
        stages: Its stages.
    """

    id: str
    mesh: Mapping[str, int]
    stages: Sequence[StageSummary]


def summarise(run: Run) -> list[ProgramSummary]:
    """All programs of a run.

    Raises:
        RolemeshError: RM035 if a stage cannot be read.
    """
    return [_program(program) for program in run.programs]


def _program(program: RecordedProgram) -> ProgramSummary:
    stages: list[StageSummary] = []
    before: Counter[str] | None = None
    for entry, stage in zip(program.entry["stages"], program.stages(), strict=True):
        ops = Counter(node.op for node in stage.nodes.values() if node.op != "input")
        change = {} if before is None else _difference(before, ops)
        numbers = entry["nodes"], entry["collectives"], entry["bytes"]
        stages.append(StageSummary(stage.number, stage.name, *numbers, change))
        before = ops
    return ProgramSummary(program.id, program.entry.get("mesh", {}), stages)


def _difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """What changed most comes first."""
    found = {op: after[op] - before[op] for op in [*before, *after] if after[op] != before[op]}
    return dict(sorted(found.items(), key=lambda pair: (-abs(pair[1]), pair[0])))


def summary_text(programs: Sequence[ProgramSummary], painters: Mapping[str, Painter]) -> str:
    """A table per program.

    Args:
        programs: The programs.
        painters: By id of a program, the colours of its mesh's axes.
    """
    lines: list[str] = []
    for program in programs:
        painter = painters[program.id]
        axes = (painter.axis(axis, f"{axis}={size}") for axis, size in program.mesh.items())
        lines += [f"{painter.bold(program.id)}  {', '.join(axes)}"]
        head = ("stage", "ops", "collectives", "bytes", "change")
        rows = [
            (
                f"{stage.number:03}_{stage.name}",
                f"{stage.ops:,}",
                f"{stage.collectives:,}",
                f"{stage.bytes:,}",
                _change(stage.change),
            )
            for stage in program.stages
        ]
        first, *rest = columns([head, *rows], right={1, 2, 3})
        lines += [f"  {painter.dim(first)}", *(f"  {line}" for line in rest), ""]
    return "\n".join(lines).rstrip()


def _change(change: Mapping[str, int]) -> str:
    parts = [f"{n:+} {op}" for op, n in list(change.items())[:_SHOWN]]
    if len(change) > _SHOWN:
        parts.append(f"{len(change) - _SHOWN} more")
    return ", ".join(parts)
