"""Python code that runs a graph op by op: what the eager target calls.

Repeats of a graph (`rolemesh.lowering.repeats`) share one function, so that the code of a deep
model is written, and compiled by Python, once for each kind of layer.

Invariants:

* Ops run in the order of the graph.
* A value is let go after the last op that reads it. What a repeat gets of earlier ones comes in a
  list that its function empties, so that its caller does not hold it.
* Each line of the text runs one node, or one repeat.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import fx

from rolemesh.lowering.repeats import (
    Ops,
    Repeats,
    Slot,
    find_repeats,
    is_input,
    nodes_in,
    without_leaks,
)

__all__ = ["GraphCode", "graph_code"]

Place = fx.Node | tuple[Repeats, int] | None
"""What a line runs: a node (of repeats, that of the first one), the repeat of a number, or nothing
of the graph."""


@dataclass(frozen=True)
class GraphCode:
    """The code of one graph.

    Attributes:
        forward: Takes the graph's inputs, and returns its outputs.
        text: What Python compiled.
        places: What each line of the text runs.
    """

    forward: Callable[..., tuple[torch.Tensor | None, ...]]
    text: str
    places: Sequence[Place]

    def failed_node(self, error: BaseException) -> fx.Node | None:
        """The node that raised an error; None if none did."""
        trace = error.__traceback__
        while trace is not None and not self._is_of(trace):
            trace = trace.tb_next
        place = None if trace is None else self.places[trace.tb_lineno - 1]
        if not isinstance(place, tuple):
            return place
        repeats, repeat = place
        assert trace is not None
        if trace.tb_next is None or not self._is_of(trace.tb_next):
            return None
        first = self.places[trace.tb_next.tb_lineno - 1]
        if not isinstance(first, fx.Node):
            return None
        return repeats.node(repeat, repeats.ops.index[first] - repeats.start)

    def _is_of(self, trace: TracebackType) -> bool:
        return trace.tb_frame.f_globals is self.forward.__globals__


def graph_code(module: fx.GraphModule, name: str) -> GraphCode:
    """The code of a graph of calls of functions.

    Args:
        module: The graph, with the tensors that it has as attributes.
        name: What tracebacks call it.
    """
    writer = _Writer(module)
    writer.write()
    text = "\n".join(writer.lines)
    exec(compile(text, f"<{name}>", "exec"), writer.names)
    forward = writer.names["forward"]
    assert callable(forward)
    return GraphCode(forward, text, writer.places)


class _Writer:
    """The text under construction, and its names for what it does not spell out."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.ops = Ops.of(module.graph)
        self.lines: list[str] = []
        self.places: list[Place] = []
        self.names: dict[str, object] = {}
        self.constants: dict[int, str] = {}
        self.values: dict[fx.Node, str] = {}  # of the graph, at the line to be written

    def write(self) -> None:
        graph, repeats = self.module.graph, find_repeats(self.ops, without_leaks)
        for number, found in enumerate(repeats):
            self._body(found, f"repeat_{number}")
        inputs = graph.find_nodes(op="placeholder")
        self.values.update((node, f"x{number}") for number, node in enumerate(inputs))
        self.line(f"def forward({', '.join(self.values.values())}):")
        for node in graph.find_nodes(op="get_attr"):
            self.values[node] = self.constant(operator.attrgetter(str(node.target))(self.module))
        last = self._last_reads(repeats)
        place = 0
        for number, found in enumerate(repeats):
            self._ops(range(place, found.start), last)
            self._calls(found, f"repeat_{number}", last.get(found.start, ()))
            place = found.end
        self._ops(range(place, len(self.ops.nodes)), last)
        results = graph.output_node().args[0]
        self.line(
            f"    return {self.text(results, map(self.values.__getitem__, nodes_in(results)))}"
        )

    def line(self, text: str, place: Place = None) -> None:
        """Add a line."""
        self.lines.append(text)
        self.places.append(place)

    def _last_reads(self, repeats: Sequence[Repeats]) -> dict[int, list[fx.Node]]:
        """By index of an op, the values that nothing reads after it.

        What repeats read is read by the first op of them: it is handed to them, and no longer held.
        """
        read: dict[fx.Node, int] = {}
        place = 0
        for found in repeats:
            read.update(self._reads(range(place, found.start)))
            for operands in self.ops.operands[found.start : found.end]:
                read.update(dict.fromkeys(operands, found.start))
            place = found.end
        read.update(self._reads(range(place, len(self.ops.nodes))))
        for node in self.module.graph.output_node().all_input_nodes:
            read.pop(node, None)
        last: dict[int, list[fx.Node]] = {}
        for node, index in read.items():
            if not is_input(node):
                last.setdefault(index, []).append(node)
        return last

    def _reads(self, indices: range) -> Iterator[tuple[fx.Node, int]]:
        for index in indices:
            for node in self.ops.operands[index]:
                yield node, index

    def _ops(self, indices: range, last: Mapping[int, Sequence[fx.Node]]) -> None:
        """A line for each op."""
        for index in indices:
            node = self.ops.nodes[index]
            names = map(self.values.__getitem__, self.ops.operands[index])
            gone = [self.values[value] for value in last.get(index, ())]
            self._op(node, f"v{index}" if node.users else "", names, gone)
            self.values[node] = f"v{index}"

    def _op(self, node: fx.Node, name: str, operands: Iterator[str], gone: Sequence[str]) -> None:
        arguments = [self.text(value, operands) for value in node.args]
        arguments += [f"{key}={self.text(value, operands)}" for key, value in node.kwargs.items()]
        call = f"{self.constant(node.target)}({', '.join(arguments)})"
        ends = f"; del {', '.join(gone)}" if gone else ""
        self.line(f"    {name} = {call}{ends}" if name else f"    {call}{ends}", node)

    def _calls(self, repeats: Repeats, function: str, last: Sequence[fx.Node]) -> None:
        """A line for each repeat: `carried, exported, .. = function(carried, given, ..)`."""
        values = self.values
        first = ["None" if node is None else values[node] for node in repeats.first]
        self.line(f"    carried = [{', '.join(first)}]")
        gone = [values[node] for node in last if node in values]
        if gone:
            self.line(f"    del {', '.join(gone)}")
        columns = _columns(repeats)
        for repeat in range(repeats.count):
            given = [values[column[repeat]] for column in columns]
            results = ["carried"]
            for offset in repeats.exported:
                node = repeats.node(repeat, offset)
                values[node] = f"v{self.ops.index[node]}"
                results.append(values[node])
            call = f"{function}({', '.join(['carried', *given])})"
            self.line(f"    {', '.join(results)}, = {call}", (repeats, repeat))
        for number, handed in enumerate(repeats.last):
            if handed is not None:
                values[handed] = f"v{self.ops.index[handed]}"
                self.line(f"    {values[handed]} = carried[{number}]")
        self.line("    del carried")

    def _body(self, repeats: Repeats, function: str) -> None:
        """The function that runs one repeat: a line for each op of the first one."""
        columns = {column: f"g{number}" for number, column in enumerate(_columns(repeats))}
        slots = {slot: f"c{number}" for number, slot in enumerate(repeats.carried)}
        operands = [
            [
                columns[repeats.given[offset, position]]
                if move is None
                else f"v{offset - move}"
                if move <= offset
                else slots[repeats.slot(offset - move)]
                for position, move in enumerate(moves)
            ]
            for offset, moves in enumerate(repeats.moves)
        ]
        handed = [
            slots[Slot(slot.offset, slot.age - 1)] if slot.age > 1 else f"v{slot.offset}"
            for slot in slots
        ]
        results = [f"[{', '.join(handed)}]", *(f"v{offset}" for offset in repeats.exported)]
        self.line(f"def {function}({', '.join(['carried', *columns.values()])}):")
        if slots:
            self.line(f"    [{', '.join(slots.values())}] = carried; carried.clear()")
        read = dict.fromkeys(slots.values(), 0)
        for offset, names in enumerate(operands):
            read.update(dict.fromkeys(names, offset))
        last: dict[int, list[str]] = {}
        for name, offset in read.items():
            if name not in columns.values() and name not in handed and name not in results:
                last.setdefault(offset, []).append(name)
        for offset, names in enumerate(operands):
            node, name = repeats.node(0, offset), f"v{offset}"
            kept = name in read or name in handed or name in results
            self._op(node, name if kept else "", iter(names), last.get(offset, ()))
        self.line(f"    return {', '.join(results)},")

    def text(self, value: object, names: Iterator[str]) -> str:
        """A value as an argument; nodes in it have the next of these names."""
        if isinstance(value, fx.Node):
            return next(names)
        if type(value) in _SPELLED or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join([self.text(item, names) for item in value])}]"
        if type(value) is tuple:
            return f"({''.join([f'{self.text(item, names)}, ' for item in value])})"
        if isinstance(value, tuple) and nodes_in(value):  # a named one, such as a layout's entry
            items = ", ".join([self.text(item, names) for item in value])
            return f"{self.constant(type(value))}({items})"
        if isinstance(value, dict):
            items = ", ".join([f"{key!r}: {self.text(item, names)}" for key, item in value.items()])
            return f"{{{items}}}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join([self.text(part, names) for part in parts])})"
        return self.constant(value)

    def constant(self, value: object) -> str:
        """The name of a value that the text does not spell out."""
        found = self.constants.get(id(value))
        if found is None:
            found = self.constants[id(value)] = f"k{len(self.constants)}"
            self.names[found] = value
        return found


_SPELLED = frozenset({int, bool, str, type(None)})
"""Types of constants that text spells out."""


def _columns(repeats: Repeats) -> Sequence[Sequence[fx.Node]]:
    """What is given to the repeats, each value once: by parameter, one for each repeat."""
    return list(dict.fromkeys(repeats.given.values()))
