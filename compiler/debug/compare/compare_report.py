"""A comparison with the single device as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rolemesh.compiler.debug.compare.placed import Gap
from rolemesh.compiler.debug.compare.reports import NodeReport, StageReport
from rolemesh.compiler.debug.show.show import columns

__all__ = ["gap_text", "node_json", "node_lines", "report_json", "report_text"]

Report = Mapping[str, Sequence[StageReport]]
"""The stages of each phase."""


def report_json(report: Report) -> list[object]:
    """All stages of all phases and all their nodes, for programs."""
    return [
        {"phase": phase, "stages": [_stage_json(stage) for stage in stages]}
        for phase, stages in report.items()
    ]


def report_text(report: Report, *, everything: bool) -> str:
    """The comparison, for people.

    Args:
        report: The stages of each phase.
        everything: Whether to list every node that was compared.
    """
    return "\n\n".join(_phase_text(phase, stages, everything) for phase, stages in report.items())


def node_json(node: NodeReport) -> dict[str, object]:
    """One value that was compared; errors that are not finite are null."""
    return {
        "name": node.name,
        "op": node.op,
        "kind": node.kind,
        "module": node.module,
        "source": node.source,
        "reason": node.reason,
        "equal": node.gap.equal,
        "max_abs_err": _finite(node.gap.max_abs),
        "max_rel_err": _finite(node.gap.max_rel),
        "ranks": list(node.gap.ranks),
        "error": node.error,
    }


def node_lines(node: NodeReport) -> list[str]:
    """What differs, where it is from, and by how much, for people."""
    places = (("in", node.module), ("at", node.source))
    place = " ".join(f"{word} {part}" for word, part in places if part)
    lines = [f"%{node.name} = {node.op}   {node.kind}"]
    if place:
        lines.append(f"  {place}")
    if node.reason:
        lines.append(f"  inserted: {node.reason}")
    lines.append(f"  {f'raised {node.error}' if node.error else gap_text(node.gap)}")
    return lines


def gap_text(found: Gap) -> str:
    """A difference, for people."""
    ranks = ", ".join(map(str, found.ranks))
    where = f", on rank{'s' * (len(found.ranks) > 1)} {ranks}" if ranks else ""
    return f"max abs error {found.max_abs:.3g}, relative {found.max_rel:.3g}{where}"


def _stage_json(stage: StageReport) -> dict[str, object]:
    return {
        "stage": stage.stage,
        "ok": stage.ok,
        "how": stage.how,
        "error": stage.error,
        "compared": len(stage.nodes),
        "divergent": len(stage.divergent),
        "unmatched": list(stage.unmatched),
        "first": None if stage.first is None else node_json(stage.first),
        "nodes": [node_json(node) for node in stage.nodes],
    }


def _phase_text(phase: str, stages: Sequence[StageReport], everything: bool) -> str:
    head = ("stage", "compared", "differ", "unmatched", "largest error", "how")
    rows: list[tuple[str, ...]] = [head]
    for stage in stages:
        worst = stage.worst
        largest = "-" if worst is None else f"{worst.gap.max_rel:.1e}"
        counts = (len(stage.nodes), len(stage.divergent), len(stage.unmatched))
        rows.append((stage.stage, *(f"{n:,}" for n in counts), largest, stage.how))
    lines = [f"phase {phase}", *(f"  {line}" for line in columns(rows, {1, 2, 3, 4}))]
    broken = next((stage for stage in stages if not stage.ok), None)
    if broken is not None:
        lines += ["", f"  first difference, after {broken.stage}:"]
        if broken.first is not None:
            lines += [f"    {line}" for line in node_lines(broken.first)]
        else:
            lines.append(f"    the pass raised {broken.error}")
    if everything:
        for stage in stages:
            lines += ["", f"  {stage.stage}", *(f"    {line}" for line in _node_rows(stage))]
    return "\n".join(lines)


def _node_rows(stage: StageReport) -> list[str]:
    rows = [("node", "max abs", "relative", "ranks", "op", "module")]
    for node in stage.nodes:
        ranks = ",".join(map(str, node.gap.ranks)) or ("" if node.gap.equal else "all")
        errors = (f"{node.gap.max_abs:.1e}", f"{node.gap.max_rel:.1e}")
        rows.append((f"%{node.name}", *errors, ranks, node.op, node.module))
    return columns(rows, {1, 2})


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
