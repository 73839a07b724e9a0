"""What `rolemesh check` found out, as data, as JSON and as text.

Invariants: the JSON has exactly the keys of `CheckReport.as_json`'s docstring, and changes of it
raise `SCHEMA_VERSION`; no line of the text is longer than `WIDTH`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from rolemesh.compiler.ir.dialect import PLAIN
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.placement import Owner
from rolemesh.compiler.ir.program import InputKind, Program, tensor_type
from rolemesh.compiler.ir.tensor import dtype_name

__all__ = [
    "SCHEMA_VERSION",
    "WIDTH",
    "CheckReport",
    "CollectiveRow",
    "Description",
    "PhaseReport",
    "StoredRow",
    "collective_rows",
    "describe",
    "stored_rows",
]

SCHEMA_VERSION = 1
WIDTH = 120


@dataclass(frozen=True)
class CollectiveRow:
    """One distinct collective of a phase; layers that repeat it are counted.

    Attributes:
        op: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all` or `broadcast`.
        axis: Mesh axis, or several joined by commas.
        dim: Dim it gathers, scatters or splits; None for all_reduce and broadcast.
        shape: Local shape of what each rank puts in.
        dtype: Element type, for example `float32`.
        bytes: Bytes a rank receives in one of them (a non-owner, for broadcast).
        count: How many the program has.
        cause: Why it is there; numbers that differ from layer to layer are left out.
        module: Module path, with `*` for the number of a layer.
    """

    op: str
    axis: str
    dim: int | None
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    count: int
    cause: str
    module: str

    def as_json(self) -> dict[str, object]:
        """Everything but the module."""
        return {
            "op": self.op,
            "axis": self.axis,
            "dim": self.dim,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "bytes": self.bytes,
            "count": self.count,
            "cause": self.cause,
        }


@dataclass(frozen=True)
class StoredRow:
    """One stored tensor: a weight, a buffer, or a tensor that the model updates.

    Attributes:
        name: Its name.
        shape: Logical shape.
        layout: Its layout as text, for example `f32[112, (16@tp x 16)]`.
        bytes_local: Bytes on a rank; for a weight that one rank owns, on that rank.
        updated: Whether the model updates it.
        owned: Whether one rank owns it whole.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    bytes_local: int
    updated: bool = False
    owned: bool = False

    def as_json(self) -> dict[str, object]:
        """The row for the JSON report."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "layout": self.layout,
            "bytes_local": self.bytes_local,
        }


@dataclass(frozen=True)
class PhaseReport:
    """One phase, over all its steps and ranks.

    Attributes:
        phase: Its name.
        nodes: Ops of the sharded program, collectives included.
        steps: How many times it ran.
        output_error: Largest absolute difference of results from the single device's.
        state_error: The same of tensors that the model updates.
        collectives: What it moves.
        problems: What is not as it must be; empty if the phase is right.
    """

    phase: str
    nodes: int
    steps: int
    output_error: float
    state_error: float
    collectives: tuple[CollectiveRow, ...]
    problems: tuple[str, ...] = ()

    @property
    def max_abs_err(self) -> float:
        """The largest absolute difference of anything compared."""
        return max(self.output_error, self.state_error)

    def as_json(self) -> dict[str, object]:
        """The phase for the JSON report; an infinite error is null."""
        merged: dict[CollectiveRow, int] = {}
        for row in self.collectives:
            key = replace(row, module="", count=0)
            merged[key] = merged.get(key, 0) + row.count
        return {
            "phase": self.phase,
            "nodes": self.nodes,
            "max_abs_err": self.max_abs_err if math.isfinite(self.max_abs_err) else None,
            "collectives": [replace(row, count=n).as_json() for row, n in merged.items()],
        }


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        model: The MODEL argument.
        role: The role.
        mesh: Axis sizes by name.
        target: The lowering target.
        engine: How the ranks ran, in words.
        phases: One report per phase of the role that the case has.
        storage: Every stored tensor.
        tokens: For each step the greedy token of each sequence, chosen by the ranks where they ran
            it; empty tuples for a model without logits.
        problems: What is not as it must be outside of a phase.
    """

    model: str
    role: str
    mesh: Mapping[str, int]
    target: str
    engine: str
    phases: tuple[PhaseReport, ...]
    storage: tuple[StoredRow, ...]
    tokens: tuple[tuple[int, ...], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything compared is equal."""
        return not self.all_problems

    @property
    def all_problems(self) -> tuple[str, ...]:
        """Everything that is not as it must be, one sentence each."""
        return (*self.problems, *(p for phase in self.phases for p in phase.problems))

    def as_json(self) -> dict[str, object]:
        """The report for machines.

        `schema_version, ok, model, role, mesh, target,
        phases[{phase, nodes, max_abs_err, collectives[{op, axis, dim, shape, dtype, bytes, count,
        cause}]}], storage[{name, shape, layout, bytes_local}]`
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            "model": self.model,
            "role": self.role,
            "mesh": dict(self.mesh),
            "target": self.target,
            "phases": [phase.as_json() for phase in self.phases],
            "storage": [row.as_json() for row in self.storage],
        }

    def as_text(self) -> str:
        """The report for people."""
        mesh = ", ".join(f"{name}={size}" for name, size in self.mesh.items())
        lines = [f"{self.model}   role {self.role}   mesh({mesh})   {self.target}, {self.engine}"]
        for phase in self.phases:
            lines += ["", *_phase_lines(phase)]
        lines += ["", *_storage_lines(self.storage)]
        if any(self.tokens):
            first = " ".join(str(step[0]) for step in self.tokens)
            lines += ["", f"greedy tokens of sequence 0: {first}"]
        lines += ["", *(f"PROBLEM  {problem}" for problem in self.all_problems)]
        lines.append("equal to the single device" if self.ok else "NOT equal to the single device")
        return "\n".join(line[:WIDTH].rstrip() for line in lines)


# --------------------------------------------------------------------------------------------------
# From Programs.


@dataclass(frozen=True)
class Description:
    """What a report says of a sharded Program.

    Attributes:
        nodes: Number of ops, collectives included.
        collectives: What it moves.
        storage: What it stores.
    """

    nodes: int
    collectives: tuple[CollectiveRow, ...]
    storage: tuple[StoredRow, ...]


def describe(program: Program) -> Description:
    """What a report says of a partitioned Program."""
    return Description(sum(1 for _ in program.ops), collective_rows(program), stored_rows(program))


def collective_rows(program: Program) -> tuple[CollectiveRow, ...]:
    """The distinct collectives of a partitioned Program, in order of first appearance."""
    rows: dict[CollectiveRow, list[str]] = {}
    for entry in collectives(program):
        key = CollectiveRow(
            entry.op,
            ",".join(entry.axes),
            entry.dim,
            entry.shape,
            str(entry.dtype).removeprefix("torch."),
            entry.bytes_received,
            0,
            _INDEX.sub("[*]", _NUMBER.sub(r"\1", entry.cause)),
            _LAYER.sub(".*", entry.module),
        )
        rows.setdefault(key, []).append(entry.cause)
    return tuple(
        replace(key, count=len(causes), cause=causes[0] if len(set(causes)) == 1 else key.cause)
        for key, causes in rows.items()
    )


_NUMBER = re.compile(r"\b([A-Za-z]\w*?)_\d+\b")
"""FX's numbers in names of values, which differ from layer to layer."""
_INDEX = re.compile(r"\[\d+\]")
_LAYER = re.compile(r"(?<=[^.])\.\d+(?=\.|$)")


def stored_rows(program: Program) -> tuple[StoredRow, ...]:
    """The stored tensors of a partitioned Program, in order of first use."""
    mesh = program.the_mesh
    rows = []
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        if not entry.is_state and entry.kind is not InputKind.CONSTANT:
            continue
        value, layout = tensor_type(node), program.layout(node)
        local = math.prod(layout.local_shape(value.shape, mesh)) * value.dtype.itemsize
        text = layout.text(value, mesh)
        rows.append(
            StoredRow(entry.name, value.shape, text, local, entry.mutated, _is_owned(layout))
        )
    return tuple(rows)


def _is_owned(layout: Layout) -> bool:
    return any(isinstance(placement, Owner) for placement in layout.placements)


# --------------------------------------------------------------------------------------------------
# Text.


def _phase_lines(phase: PhaseReport) -> list[str]:
    facts = [
        f"phase {phase.phase}",
        f"{phase.nodes} nodes",
        f"{phase.steps} step{'s' * (phase.steps != 1)}",
        f"max abs error: results {phase.output_error:.1e}, state {phase.state_error:.1e}",
    ]
    head = ("count", "collective", "each rank sends", "bytes", "in", "because")
    rows = [
        (
            str(row.count),
            f"{row.op} {row.axis}" + ("" if row.dim is None else f" dim {row.dim}"),
            f"{_short(row.dtype)}{list(row.shape)}",
            f"{row.bytes:,}",
            _shortened(row.module.removesuffix(".*").rpartition(".")[2], 20),
            row.cause.partition(": follow")[0],
        )
        for row in phase.collectives
    ]
    total = sum(row.count * row.bytes for row in phase.collectives)
    number = sum(row.count for row in phase.collectives)
    routed = any(row.op == op.name for row in phase.collectives for op in PLAIN)
    return [
        "   ".join(facts),
        *_table(head, rows, right=(0, 3)),
        f"  {number} collectives, {total:,} bytes {'expected' if routed else 'received'} per rank",
    ]


def _storage_lines(storage: Sequence[StoredRow]) -> list[str]:
    groups: dict[tuple[str, str, bool, bool], list[StoredRow]] = {}
    for row in storage:
        layout = _OWNER.sub("owner(by layer)", row.layout)
        key = (_PLACE.sub("*", row.name), layout, row.updated, row.owned)
        groups.setdefault(key, []).append(row)
    rows = []
    for (pattern, layout, updated, owned), members in groups.items():
        kind = "updated" if updated else "layer-sharded" if owned else ""
        each = members[0].bytes_local
        local = str(len(members))
        rows.append((local, _named(pattern, members), layout, f"{each:,}", kind))
    weights = sum(row.bytes_local for row in storage if not row.updated and not row.owned)
    caches = sum(row.bytes_local for row in storage if row.updated)
    owned_bytes = sum(row.bytes_local for row in storage if row.owned)
    total = f"  bytes per rank: {weights:,} of weights, {caches:,} of updated tensors"
    if owned_bytes:
        total += f"; layer-sharded: {owned_bytes:,} on all ranks together"
    head = ("count", "stored tensor", "layout", "bytes each", "")
    return ["storage", *_table(head, rows, right=(0, 3)), total]


_OWNER = re.compile(r"\bowner\(\d+\)")
_PLACE = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\[)\d+(?=\])")


def _named(pattern: str, members: Iterable[StoredRow]) -> str:
    """The pattern of a group's names, with the range of its layers in place of a single `*`."""
    if pattern.count("*") != 1:
        return pattern
    numbers = sorted({int(found.group()) for row in members if (found := _PLACE.search(row.name))})
    return pattern.replace("*", _ranges(numbers))


def _ranges(numbers: Sequence[int]) -> str:
    """`0`, `0-6` or `1-3,5` for sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()
) -> list[str]:
    if not rows:
        return ["  none"]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(_shortened("  " + "  ".join(cells).rstrip(), WIDTH))
    return lines


def _short(dtype: str) -> str:
    return dtype_name(getattr(torch, dtype))


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
