"""Differences of two stages as text and as JSON: totals, then rows by module with layers folded.

A row stands for all nodes of like modules that differ in like manner, and shows the first of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rolemesh.compiler.debug.diff.differences import Change, Difference, Kind
from rolemesh.compiler.debug.layers import folded
from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.debug.show.select import ROOT
from rolemesh.compiler.debug.show.show import columns
from rolemesh.compiler.memory import MemoryAnalysis

__all__ = ["difference_json", "difference_text"]

_SIGNS: Mapping[Kind, str] = {
    Kind.ADDED: "+",
    Kind.REMOVED: "-",
    Kind.MOVED: ">",
    Kind.CHANGED: "~",
    Kind.RESHARDED: "@",
    Kind.DECIDED: "*",
}
_SHOWN = 3
"""Ops named in a row for several; the rest is counted."""


def difference_json(found: Difference) -> dict[str, object]:
    """Everything that differs, for programs; nothing is folded."""
    left, right = found.left, found.right
    memory = [None if held is None else dataclasses.asdict(held) for held in found.memory]
    return {
        "equal": not found,
        "before": {"program": left.program, "stage": left.name, "nodes": len(left.nodes)},
        "after": {"program": right.program, "stage": right.name, "nodes": len(right.nodes)},
        "mesh": {"before": dict(found.meshes[0]), "after": dict(found.meshes[1])},
        "sizes": {"before": dict(found.sizes[0]), "after": dict(found.sizes[1])},
        "placed": {"before": found.placed[0], "after": found.placed[1]},
        "counts": {kind.value: n for kind, n in _counts(found).items()},
        "changes": [
            {**dataclasses.asdict(change), "kind": change.kind.value} for change in found.changes
        ],
        "collectives": {
            key: {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
            for key, (before, after) in found.traffic.items()
        },
        "bytes": {"before": found.received[0], "after": found.received[1]},
        "memory": {"before": memory[0], "after": memory[1]},
    }


def difference_text(
    found: Difference, names: tuple[str, str], painter: Painter, *, full: bool = False
) -> str:
    """What differs, for people.

    Args:
        found: The differences.
        names: What to call the two stages.
        painter: For the axes of both meshes.
        full: Whether every node has a row of its own.
    """
    title = painter.bold(f"{names[0]} -> {names[1]}")
    if not found:
        return f"{title}: no difference"
    return "\n".join([title, *_totals(found), *_modules(found.changes, painter, full=full)])


def _counts(found: Difference) -> dict[Kind, int]:
    nodes = Counter(kind for kind, _, _ in {(c.kind, c.node, c.other) for c in found.changes})
    return {kind: nodes[kind] for kind in Kind if nodes[kind]}


def _totals(found: Difference) -> Iterator[str]:
    counts = _counts(found)
    said = ", ".join(f"{n:,} {kind.value}" for kind, n in counts.items() if kind != Kind.TOKENS)
    sizes = len(found.left.nodes), len(found.right.nodes)
    yield f"  nodes {sizes[0]:,} -> {sizes[1]:,}: {said or 'all the same'}"
    if Kind.TOKENS in counts:
        before, after = (
            " ".join(f"{name}={sizes[name]}" for name in "BT") for sizes in found.sizes
        )
        yield f"  {before} -> {after}: so {counts[Kind.TOKENS]:,} nodes have other sizes"
    if found.meshes[0] != found.meshes[1]:
        yield f"  mesh {_mesh(found.meshes[0])} -> {_mesh(found.meshes[1])}"
    if found.placed[0] != found.placed[1]:
        yield f"  only the {'second' if found.placed[1] else 'first'} has layouts"
    yield from _traffic(found)
    yield from _memory(found.memory)


def _mesh(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items()) or "none"


def _traffic(found: Difference) -> Iterator[str]:
    if all(before == after for before, after in found.traffic.values()):
        return
    rows = [
        (key, _change(before.count, after.count), _change(before.received, after.received))
        for key, (before, after) in found.traffic.items()
        if before != after
    ]
    counts = [sum(pair[side].count for pair in found.traffic.values()) for side in (0, 1)]
    rows.append(("all", _change(*counts), _change(*found.received)))
    header = ("collectives", "count", "bytes a rank receives")
    yield from (f"  {line}" for line in columns([header, *rows], set()))


def _memory(memory: tuple[MemoryAnalysis | None, MemoryAnalysis | None]) -> Iterator[str]:
    if memory[0] == memory[1]:
        return
    rows = [("bytes a rank holds", "")]
    for field in ("weights", "caches", "pool", "temporaries", "total"):
        before, after = (None if held is None else getattr(held, field) for held in memory)
        if before != after:
            rows.append((field, _change(before, after)))
    yield from (f"  {line}" for line in columns(rows, set()))


def _change(before: int | None, after: int | None) -> str:
    sides = ["-" if value is None else f"{value:,}" for value in (before, after)]
    return sides[0] if before == after else " -> ".join(sides)


def _modules(changes: Sequence[Change], painter: Painter, *, full: bool) -> Iterator[str]:
    modules: dict[str, list[Change]] = {}
    for change in changes:
        if change.kind != Kind.TOKENS:
            name = change.module if full else folded(change.module)
            modules.setdefault(name, []).append(change)
    for name, members in modules.items():
        modules_here = {change.module for change in members}
        alike = f"{name} x {len(modules_here)}" if len(modules_here) > 1 else members[0].module
        yield ""
        yield painter.bold(alike or ROOT)
        rows: dict[object, list[Change]] = {}
        for change in members:
            rows.setdefault(change if full else _alike(change), []).append(change)
        order = list(_SIGNS)
        groups = sorted(rows.values(), key=lambda group: order.index(group[0].kind))
        cells = [_cells(group) for group in groups]
        for group, line in zip(groups, columns(cells, {1}), strict=True):
            yield f"  {_painted(group[0].kind, line, painter)}"


def _alike(change: Change) -> object:
    """What rows have in common."""
    match change.kind:
        case Kind.RESHARDED:
            return change.kind, re.sub(r"%\w+", "%", change.what)
        case Kind.DECIDED:
            return change.kind, change.before, change.after
        case _:
            return change.kind, change.op, change.what


def _cells(group: Sequence[Change]) -> tuple[str, str, str, str]:
    first = group[0]
    ops = [*dict.fromkeys(_packet(change.op) for change in group)]
    more = f" and {len(ops) - _SHOWN} more" if len(ops) > _SHOWN else ""
    named = ", ".join(ops[:_SHOWN]) + more
    match first.kind:
        case Kind.RESHARDED:
            head, detail = first.what, named
        case Kind.DECIDED:
            head, detail = f"{first.before} -> {first.after}", named
        case _:
            head, detail = named, "" if first.what == "op" else first.what
    return _SIGNS[first.kind], str(len(group)), head, f"{detail}  {_example(group)}".strip()


def _packet(op: str) -> str:
    """An op without its overload, and aten's without the namespace."""
    return ".".join(op.split(".")[:2]).removeprefix("aten.")


def _example(group: Sequence[Change]) -> str:
    first = group[0]
    shown = first.node if first.op == "output" else f"%{first.node}"
    if first.kind == Kind.DECIDED:
        return shown
    both = " -> ".join(filter(None, [first.before, first.after]))
    variants = len({(change.before, change.after) for change in group}) - 1
    more = f" and {variants} more" if variants else ""
    return f"{shown} {both}{more}".rstrip()


def _painted(kind: Kind, line: str, painter: Painter) -> str:
    if kind == Kind.ADDED:
        return painter.added(line)
    return painter.removed(line) if kind == Kind.REMOVED else painter.kind(line)
