"""What the page shows of a run, as one compact JSON object.

A node hardly changes from stage to stage, and layers repeat. So each distinct value (a name, a
type, a decision) is written once in `values`, each distinct version of a node is one row of
`records` that points into it, and a stage is the list of its rows:

    values    any JSON; number 0 is null
    fields    what the columns of a record are
    records   rows of numbers of values, without trailing zeros
    programs  each with its stages: {"pass", "number", "rows", "outputs", "rules", "timeline"}

A stage's `timeline` is null before partition; then it has for each rank and stream one number of a
value: a flat list with five numbers for each event (row in the stage, start and duration in
nanoseconds, number of its kind in `kinds`, bytes received).

Torch is not imported. The same run gives the same object.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rolemesh.compiler.debug.timeline.timeline import timeline
from rolemesh.compiler.dump.reader import Node, RecordedProgram, Stage

__all__ = ["FIELDS", "PAGE_DATA_VERSION", "page_data"]

PAGE_DATA_VERSION = 1

FIELDS = (
    "name",
    "op",
    "module",
    "source",
    "kinds",
    "layouts",
    "operands",
    "call",
    "local",
    "decision",
    "needs",
    "seed",
    "collective",
    "flops",
    "reason",
    "value",
    "user",
)
"""Columns of a record: fields of a node in a stage's file, but for `operands` and `call`, which are
names and text in place of arguments."""


class _Table:
    """Distinct values, numbered in the order they came."""

    def __init__(self) -> None:
        self.values: list[Any] = [None]
        self._texts: dict[str, int] = {}
        self._others: dict[str, int] = {}
        self._key = json.JSONEncoder(ensure_ascii=False).encode

    def number(self, value: object) -> int:
        """The value's number; 0 for what is empty."""
        if value is None or value == "" or value == []:
            return 0
        known = self._texts if isinstance(value, str) else self._others
        key = value if isinstance(value, str) else self._key(value)
        found = known.get(key)
        if found is None:
            found = known[key] = len(self.values)
            self.values.append(value)
        return found


def page_data(
    programs: Iterable[RecordedProgram], title: str, wrote: str | None = None
) -> Mapping[str, Any]:
    """The data of a page.

    Args:
        programs: The programs to show.
        title: What the run is called.
        wrote: The versions that wrote it, if they are known.

    Raises:
        RolemeshError: RM035 if a stage cannot be read.
    """
    table = _Table()
    records: dict[tuple[int, ...], int] = {}
    entries = [_program(program, table, records) for program in programs]
    return {
        "version": PAGE_DATA_VERSION,
        "title": title,
        "wrote": wrote or "",
        "fields": list(FIELDS),
        "values": table.values,
        "records": [list(record) for record in records],
        "programs": entries,
    }


def _program(
    program: RecordedProgram, table: _Table, records: dict[tuple[int, ...], int]
) -> dict[str, Any]:
    mesh: Mapping[str, int] = {}
    inputs: dict[str, str] = {}
    stages = []
    for stage in program.stages():
        mesh = stage.mesh or mesh
        inputs |= {entry["node"]: entry["name"] for entry in stage.head["inputs"]}
        stages.append(_stage(stage, table, records))
    return {
        "id": program.id,
        "role": program.role,
        "phase": program.phase,
        "mesh": dict(mesh),
        "inputs": inputs,
        "stages": stages,
    }


def _stage(stage: Stage, table: _Table, records: dict[tuple[int, ...], int]) -> dict[str, Any]:
    rows = []
    for node in stage.nodes.values():
        row = _record(node, stage, table)
        rows.append(records.setdefault(row, len(records)))
    outputs = [_argument(output["value"]) for output in stage.head["outputs"]]
    return {
        "pass": stage.name,
        "number": stage.number,
        "rows": rows,
        "outputs": [text.removeprefix("%") for text in outputs],
        "timeline": _timeline(stage, table),
    }


def _record(node: Node, stage: Stage, table: _Table) -> tuple[int, ...]:
    decision = node.decision
    derived: dict[str, object] = {
        "operands": list(dict.fromkeys(node.operands)),
        "call": _call(node),
        "decision": decision and {**decision, "rule": stage.rules[decision["rule"]]},
    }
    found = [table.number(derived.get(name, node.data.get(name))) for name in FIELDS]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _call(node: Node) -> str:
    """The arguments as text; a node among them as %name."""
    positional = [_argument(value) for value in node.data.get("args", ())]
    named = [f"{name}={_argument(value)}" for name, value in node.data.get("kwargs", {}).items()]
    return ", ".join(positional + named)


def _argument(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, dict) and "node" in value:
        return f"%{value['node']}"
    if isinstance(value, dict) and len(value) == 1:
        ((kind, inner),) = value.items()
        return f"{kind} {_argument(inner)}" if isinstance(inner, list) else str(inner)
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _timeline(stage: Stage, table: _Table) -> dict[str, Any] | None:
    if "partition" not in stage.head["history"]:
        return None
    row = {name: number for number, name in enumerate(stage.nodes)}
    kinds: dict[str, int] = {}
    streams: dict[tuple[int, str], list[int]] = {}
    for event in timeline(stage):
        kind = kinds.setdefault(event.kind, len(kinds))
        times = round(1000 * event.start), round(1000 * event.duration)
        found = streams.setdefault((event.rank, event.stream), [])
        found += (row[event.name], *times, kind, event.received)
    return {
        "kinds": list(kinds),
        "streams": [[rank, name, table.number(flat)] for (rank, name), flat in streams.items()],
    }
