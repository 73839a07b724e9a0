"""The readable text of a Program.

One line a value, listed under its module, columns aligned over the whole page: source line, name,
type with layout, expression, and what a reader needs to know of the line: the bytes a rank receives
and why, or that the value is stored. Shapes are logical; `16@tp` is a dim split over the axis tp.
`compiler/ir/expressions.py` decides what has a line and how it is written.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from string import ascii_lowercase

from torch import fx

from rolemesh.compiler.ir.dialect import WAIT, MeshOp
from rolemesh.compiler.ir.expressions import Expressions, Text, block_of
from rolemesh.compiler.ir.ledger import collective
from rolemesh.compiler.ir.program import Program, origin

__all__ = ["first_line", "program_text"]

_PAGE = 170
_CAPS = (6, 22, 36, 44)
_BYTES = 8


@dataclass(frozen=True)
class _Line:
    block: str
    file: str
    number: str
    name: str
    kind: str
    expression: str
    remark: str


def program_text(program: Program, module: str | None = None, *, fold: bool = True) -> str:
    """The text of a Program, or of one module of it.

    Args:
        program: The Program.
        module: Module path; only its values are printed, with what they read from outside.
        fold: Whether values used once are folded into their user's expression. Without it every
            op has a line.
    """
    return "\n".join(_Printer(program, module, fold).lines()) + "\n"


def first_line(program: Program) -> str:
    """The first line of a Program's text; what follows does not depend on the name and history."""
    mesh = f"   mesh({program.mesh})" if program.mesh else ""
    return f"program {program.name}{mesh}   after: {' '.join(program.history) or 'nothing'}"


class _Printer:
    def __init__(self, program: Program, module: str | None, fold: bool) -> None:
        self.program = program
        self.module = module
        self.written = Expressions(program, module, fold)
        self.by_name = {node.name: node for node in program.graph.nodes}

    def lines(self) -> Iterator[str]:
        program = self.program
        yield first_line(program)
        expressions = [(node, self.written.line(node)) for node in self.written.shown]
        body = [self._line(node, text) for node, text in expressions if text is not None]
        yield from self._reads() if self.module else self._inputs()
        yield from _aligned(body)
        if self.module is None:
            yield "  return"
            for value, output in zip(program.results, program.outputs, strict=True):
                target = ""
                if output.gradient_of is not None:
                    target = f"gradient of {program.inputs[output.gradient_of].name} = "
                elif output.mutates is not None:
                    target = f"{program.inputs[output.mutates].name} = "
                yield f"    {target}{self.written.argument(value).text}"
        yield from self._total()

    def _inputs(self) -> Iterator[str]:
        yield "  inputs"
        yield from _columns(
            [
                [
                    self.written.short(entry.name),
                    self.written.kind(node),
                    "updated" if entry.mutated else "",
                ]
                for node, entry in self.written.inputs.items()
            ]
        )

    def _reads(self) -> Iterator[str]:
        """What a module reads: its weights on the left, state and other modules' values right."""
        read = {operand for node in self.written.shown for operand in node.all_input_nodes}
        weights: list[list[str]] = []
        others: list[list[str]] = []
        for node, entry in self.written.inputs.items():
            if node in read:
                updated = "updated" if entry.mutated else ""
                row = [self.written.short(entry.name), self.written.kind(node), updated]
                (others if updated or not entry.is_state else weights).append(row)
        others.extend(
            [f"%{node.name}", self.written.kind(node), f"from {origin(node).module or '(root)'}"]
            for node in self.written.outside
        )
        pairs = zip_longest(weights, others, fillvalue=["", "", ""])
        yield "  reads"
        yield from _columns([[*left[:2], " ", *right] for left, right in pairs])

    def _total(self) -> Iterator[str]:
        counts: dict[str, list[float]] = {}
        for node in self.written.shown:
            if isinstance(node.target, MeshOp) and node.target.communicates:
                record = collective(self.program, node)
                counts.setdefault(record.op, []).append(record.bytes_received)
        if counts:
            parts = [f"{len(found)} {op} {_bytes(sum(found))}" for op, found in counts.items()]
            total = _bytes(sum(sum(found) for found in counts.values()))
            yield f"  a rank receives {total}: {', '.join(parts)}"

    def _line(self, node: fx.Node, text: Text) -> _Line:
        where = origin(node)
        explained = where.reason and node.target is not WAIT  # its start says why
        remarks = [f"because {self._reason(where.reason)}"] if explained else []
        if node in self.written.stored:
            name = self.written.short(self.written.stored[node])
            remarks.append("stored" if name in text.text else f"stored as {name}")
        remark = "; ".join(remarks)
        if isinstance(node.target, MeshOp) and node.target.communicates:
            record = collective(self.program, node)
            traffic = _bytes(record.bytes_received).rjust(_BYTES)
            if record.is_expected:
                traffic += f" expected, at most {_bytes(record.bytes_most)}"
            remark = f"{traffic}  {remark}"
        file, _, number = where.source.rpartition(":")
        name, kind = f"%{node.name}", self.written.kind(node)
        only = self.written.only_result(node)
        if only is not None:
            name, kind = f"{name}.{only}", self.written.kind(node, only)
        return _Line(block_of(where.module), file, number, name, kind, text.text, remark)

    def _reason(self, reason: str) -> str:
        """A pass's reason; a value that has no line here is named by the line that contains it."""

        def on_page(found: re.Match[str]) -> str:
            node = self.by_name.get(found[1])
            node = None if node is None else self.written.on_page(node)
            return found[0] if node is None or node.op == "output" else f"%{node.name}"

        reason = re.sub(r"\b\w+\(%(\w+)\)", on_page, reason)
        if self.module:
            reason = reason.replace(f"{self.module}.", "")
        return re.sub(r"%(\w+)", on_page, reason)


def _aligned(lines: list[_Line]) -> Iterator[str]:
    """The lines under their modules, columns aligned over all of them.

    A line number of another file than the module's own has a letter, which the module's header
    explains.
    """
    groups = [(block, list(group)) for block, group in groupby(lines, lambda line: line.block)]
    letters = [_letters([line.file for line in group]) for _, group in groups]
    widths = [
        max((len(text) for text in column if len(text) <= cap), default=0)
        for column, cap in zip(
            zip(*((x.number + " ", x.name, x.kind, x.expression) for x in lines), strict=True),
            _CAPS,
            strict=False,
        )
    ]
    for (block, group), files in zip(groups, letters, strict=True):
        others = ", ".join(f"{letter} = {file}" for file, letter in files.items() if letter)
        header = [
            block or "(root)",
            *[file for file, letter in files.items() if not letter][:1],
        ]
        yield "  " + "   ".join(filter(None, [*header, others]))
        for line in group:
            place = f"{files[line.file]}{line.number}".rjust(widths[0])
            start = f"  {place} {line.name.ljust(widths[1])}  {line.kind.ljust(widths[2])}  = "
            text = start + line.expression
            if line.remark:
                full = f"{text.ljust(len(start) + widths[3])}  {line.remark}"
                short = f"{text}  {line.remark.strip()}"
                indent = " " * (widths[0] + widths[1] + 5)
                below = f"{text}\n" + textwrap.fill(
                    line.remark.strip(),
                    _PAGE,
                    initial_indent=indent,
                    subsequent_indent=f"{indent}  ",
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                text = next((t for t in (full, short) if len(t) <= _PAGE), below)
            yield text.rstrip()


def _letters(files: Sequence[str]) -> Mapping[str, str]:
    """A letter per file; none for the first one."""
    found: dict[str, str] = {}
    for file in files:
        if file and file not in found:
            initials = [c for c in file.lower() + ascii_lowercase if c.isalpha()]
            taken = found.values()
            found[file] = next(c for c in initials if c not in taken) if found else ""
    return {**found, "": ""}


def _columns(rows: list[list[str]]) -> Iterator[str]:
    """Rows with columns padded to a common width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"    {'  '.join(cells)}".rstrip()


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
