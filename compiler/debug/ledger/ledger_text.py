"""A ledger as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from rolemesh.compiler.debug.layers import folded
from rolemesh.compiler.debug.ledger.ledger import Entry, Ledger, Work, totals
from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.debug.show.select import ROOT
from rolemesh.compiler.debug.show.show import columns

__all__ = ["ledger_json", "ledger_text"]


def ledger_json(ledger: Ledger) -> dict[str, object]:
    """All collectives and all totals, for programs."""
    return {
        "program": ledger.program,
        "stage": ledger.stage,
        "mesh": dict(ledger.mesh),
        "sizes": dict(ledger.sizes),
        "bytes": ledger.received,
        "without": {name: list(nodes) for name, nodes in ledger.without.items()},
        "collectives": [
            {**dataclasses.asdict(entry), "layer": entry.layer} for entry in ledger.entries
        ],
        "totals": {
            by: [dataclasses.asdict(total) for total in totals(ledger.entries, by)]
            for by in ("op", "axis", "layer", "module")
        },
    }


def ledger_text(ledger: Ledger, by: str, painter: Painter) -> str:
    """The ledger, for people.

    Args:
        ledger: The ledger.
        by: `module` (collectives of like layers on one row), `none` (each on its own), `op` or
            `layer` (totals alone).
        painter: For the axes of the mesh.
    """
    sizes = " ".join(f"{name}={size}" for name, size in ledger.sizes.items())
    lines = [painter.bold(f"{ledger.program}, {ledger.stage}") + f"   {sizes}"]
    if not ledger.entries:
        return f"{lines[0]}\n  no collectives"
    if by in ("module", "none"):
        lines += [painter.kind(line) for line in _rows(ledger.entries, fold=by == "module")]
        lines.append("")
        by = "op"
    table = [("total", "count", "bytes", "formula")]
    table += [
        (t.key, f"{t.count:,}", f"{t.received:,}", t.formula) for t in totals(ledger.entries, by)
    ]
    table.append(("all", f"{len(ledger.entries):,}", f"{ledger.received:,}", ""))
    lines += [f"  {line}" for line in columns(table, {1, 2})]
    for name, nodes in ledger.without.items():
        some = ", ".join(f"%{node}" for node in nodes[:3]) + (", .." if len(nodes) > 3 else "")
        lines.append(
            f"  {len(nodes)} formulas have no {name} ({some}): what depends on {name} in a way "
            "that no sharding rule tells has its traced size there"
        )
    return "\n".join(lines)


def _rows(entries: Sequence[Entry], *, fold: bool) -> Iterator[str]:
    """Two lines per row: what and how much, then the formula and why."""
    groups: dict[object, list[Entry]] = {}
    for entry in entries:
        alike = (folded(entry.module), entry.text, entry.shape, entry.dtype, entry.formula)
        groups.setdefault(alike if fold else entry.node, []).append(entry)
    header = ("count", "collective", "each rank sends", "bytes", "window", "independent", "in")
    cells = [header]
    for group in groups.values():
        first = group[0]
        modules = len({entry.module for entry in group})
        name = (folded(first.module) if modules > 1 else first.module) or ROOT
        cells.append(
            (
                str(len(group)),
                first.text,
                first.sent,
                f"{first.received:,}",
                _work(min((entry.window for entry in group), key=_amount)),
                _work(min((entry.independent for entry in group), key=_amount)),
                f"{name} x {modules}" if modules > 1 else name,
            )
        )
    lines = columns(cells, {0, 3})
    yield f"  {lines[0]}"
    for group, line in zip(groups.values(), lines[1:], strict=True):
        yield f"  {line}"
        first = group[0]
        most = "" if first.most is None else f" expected, at most {first.most:,}"
        yield f"         %{first.node} = {first.formula}{most}: {first.cause}"


def _amount(work: Work) -> tuple[int, int]:
    return work.flops, work.ops


def _work(work: Work) -> str:
    """`12 ops, 3.4 MFLOP`; of a window over layers, their number too."""
    if not work.ops:
        return "-"
    flops = next((f"{work.flops / n:.1f} {u}FLOP" for u, n in _UNITS if work.flops >= n), "0 FLOP")
    layers = f", {work.layers} layers" if work.layers > 1 else ""
    return f"{work.ops} op{'s' * (work.ops > 1)}, {flops}{layers}"


_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))
