"""A stage as text: node by node, or collapsed by module.

The Program's own text (`NNN_<pass>.txt`) folds values that are used once into expressions, for
reading. Here every node has a line of its own, for finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.debug.show.collapse import ModuleRow
from rolemesh.compiler.debug.show.select import ROOT, modules_of, stored_names
from rolemesh.compiler.dump.files import stage_name
from rolemesh.compiler.dump.reader import Node, Stage

__all__ = ["argument_text", "columns", "heading", "modules_text", "nodes_text"]

_CAP = 44
"""Characters up to which columns of nodes are aligned."""


def heading(stage: Stage, painter: Painter) -> str:
    """The line that says which stage it is."""
    mesh = ", ".join(painter.axis(axis, f"{axis}={size}") for axis, size in stage.mesh.items())
    name = stage_name(stage.data["number"], stage.name)
    where = painter.bold(f"{stage.program}  {name}")
    return f"{where}  {mesh or 'no mesh yet'}"


def nodes_text(stage: Stage, nodes: Sequence[Node], painter: Painter) -> str:
    """A line per node, listed under its module: source line, name, types, op and why it is there.

    Args:
        stage: The stage.
        nodes: The nodes to list.
        painter: Colours of the mesh's axes.
    """
    modules, stored = modules_of(stage), stored_names(stage)
    groups = [
        (module, _main_file(members), members)
        for module, members in (
            (module, list(group)) for module, group in groupby(nodes, lambda n: modules[n.name])
        )
    ]
    cells = {
        node.name: (_place(node, file), f"%{node.name}", ", ".join(node.kinds))
        for _, file, members in groups
        for node in members
    }
    widths = [min(max(map(len, column)), _CAP) for column in zip(*cells.values(), strict=True)]
    lines = [heading(stage, painter)]
    for module, file, members in groups:
        lines.append(f"  {painter.bold(module or ROOT)}" + (f"   {file}" if file else ""))
        for node in members:
            place, name, kinds = cells[node.name]
            call = _call(node, stored)
            lines.append(
                f"    {place.rjust(widths[0])}  {name.ljust(widths[1])}  "
                f"{painter.kind(kinds)}{' ' * (widths[2] - len(kinds))}  "
                f"{painter.bold(call) if node.collective is not None else call}"
            )
            note = _note(node)
            if note:
                lines.append(" " * (widths[0] + 8) + painter.dim(note))
    lines.append(f"{len(nodes):,} of {len(stage.nodes):,} nodes")
    return "\n".join(lines)


def _main_file(nodes: Sequence[Node]) -> str:
    """The file that most of the nodes are from, which stands next to their module."""
    counts = Counter(filter(None, (node.source.rpartition(":")[0] for node in nodes)))
    return counts.most_common(1)[0][0] if counts else ""


def _place(node: Node, file: str) -> str:
    """The line, with its file where that is another."""
    own, _, line = node.source.rpartition(":")
    return line if own == file else node.source


def _call(node: Node, stored: Mapping[str, str]) -> str:
    if node.op == "input":
        return f"input {stored.get(node.name, '')}".rstrip()
    arguments = [argument_text(value) for value in node.data.get("args", [])]
    keywords = node.data.get("kwargs", {})
    arguments += [f"{name}={argument_text(value)}" for name, value in keywords.items()]
    return f"{node.op}({', '.join(arguments)})"


def argument_text(value: object) -> str:
    """An argument of a node, as the stage's JSON has it, in short."""
    if isinstance(value, list):
        return f"[{', '.join(map(argument_text, value))}]"
    if isinstance(value, dict):
        if "node" in value:
            return f"%{value['node']}"
        return ", ".join(argument_text(item) for item in value.values())
    return str(value)


def _note(node: Node) -> str:
    moved = node.collective
    bytes_received = "" if moved is None else f"{moved['bytes']:,} B"
    reason = node.reason and f"because {node.reason}"
    seed = node.data.get("seed", "")
    seeded = seed and f"lies so because {seed}" if isinstance(seed, str) else ""
    return "; ".join(filter(None, [bytes_received, reason, seeded]))


def modules_text(stage: Stage, rows: Sequence[ModuleRow], painter: Painter) -> str:
    """A line per module, or per group of modules that are alike, with a total.

    Args:
        stage: The stage.
        rows: The modules.
        painter: Colours of the mesh's axes.
    """
    head = ("module", "alike", "inputs", "ops", "collectives", "bytes", "gives")
    body = [_module_cells(row) for row in rows]
    total = (
        "total",
        "",
        f"{sum(row.inputs * row.alike for row in rows):,}",
        f"{sum(row.ops * row.alike for row in rows):,}",
        f"{sum(sum(row.collectives.values()) * row.alike for row in rows):,}",
        f"{sum(row.bytes * row.alike for row in rows):,}",
        "",
    )
    lines = columns([head, *body, total], right={1, 2, 3, 5})
    first, *rest = lines
    return "\n".join(
        [heading(stage, painter), f"  {painter.dim(first)}"]
        + [f"  {painter.kind(line)}" for line in rest]
    )


def _module_cells(row: ModuleRow) -> tuple[str, ...]:
    moves = ", ".join(f"{n} {what}" for what, n in row.collectives.items())
    numbers = [f"{n:,}" if n else "" for n in (row.inputs, row.ops)]
    alike = f"x {row.alike}" if row.alike > 1 else ""
    return (row.path, alike, *numbers, moves, f"{row.bytes:,}" if row.bytes else "", row.gives)


def columns(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Rows with their columns aligned.

    Args:
        rows: Cells by row.
        right: Numbers of the columns that are aligned to the right.
    """
    return list(_columns(rows, right))


def _columns(rows: Sequence[Sequence[str]], right: set[int]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
