"""A flat graph in pieces to compile: one for each kind of repeat, and one for each stretch between.

Repeats (`rolemesh.lowering.repeats`) are parts of a graph that are the same ops again and again, as
layers of a model are. Who compiles one of them has compiled all, so that the time it takes does not
grow with the depth of a model. Values pass from piece to piece in numbered slots; sizes that are
computed of symbols are computed again in each piece.

Invariants:

* Steps run every op of the graph once, in an order that the graph allows.
* What writes into an input runs in the piece that last reads what was there before.
* A slot is freed by the step that reads it last, unless it is a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from rolemesh.lowering.flatten import Fake
from rolemesh.lowering.repeats import Ops, Repeats, find_repeats
from rolemesh.lowering.write_back import write_early

__all__ = ["Code", "Piece", "Step", "Steps", "pieces_of"]

Code = Callable[[list[torch.Tensor | int]], Sequence[torch.Tensor | None]]
"""Compiled code: takes a list of its inputs, which it empties, and returns its outputs."""


class Step(NamedTuple):
    """One call of a piece.

    Attributes:
        piece: Index of the piece.
        inputs: Slots of its arguments.
        outputs: Slots that its results go to.
        freed: Slots that nothing reads after it.
    """

    piece: int
    inputs: Sequence[int]
    outputs: Sequence[int]
    freed: Sequence[int]


@dataclass(frozen=True)
class Steps:
    """How the pieces of a graph are called.

    Attributes:
        steps: The calls, in order.
        results: Slots of what the graph returns.
        slots: How many slots there are; the first are the inputs of the graph.
    """

    steps: Sequence[Step]
    results: Sequence[int]
    slots: int

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Steps:
        """What `saved` wrote."""
        steps = [Step(*step) for step in saved["steps"]]
        return cls(steps, saved["results"], saved["slots"])

    def saved(self) -> Mapping[str, object]:
        """Plain data to make it of again."""
        steps = [list(step) for step in self.steps]
        return {"steps": steps, "results": list(self.results), "slots": self.slots}

    def run(
        self, codes: Sequence[Code], args: list[torch.Tensor | int]
    ) -> Sequence[torch.Tensor | None]:
        """What the graph returns.

        Args:
            codes: Code of each piece.
            args: The inputs of the graph; emptied.
        """
        slots: list[torch.Tensor | int | None] = [*args, *[None] * (self.slots - len(args))]
        args.clear()
        for piece, inputs, outputs, freed in self.steps:
            given = [slots[slot] for slot in inputs]
            for slot in freed:
                slots[slot] = None
            values = codes[piece](cast(list[torch.Tensor | int], given))
            for slot, value in zip(outputs, values, strict=True):
                slots[slot] = value
        return cast(Sequence[torch.Tensor | None], [slots[slot] for slot in self.results])


class Piece(NamedTuple):
    """A part of a graph.

    Attributes:
        module: Its ops as a graph of its own, which returns a tuple.
        examples: The example value of each of its inputs.
    """

    module: fx.GraphModule
    examples: Sequence[Fake]


def pieces_of(module: fx.GraphModule, fewest: int) -> tuple[Sequence[Piece], Steps] | None:
    """A flat graph in pieces; None if nothing in it repeats so often.

    Args:
        module: A flat graph, whose last ops write new values into its inputs. They are moved.
        fewest: Fewest repeats that are a piece.
    """
    graph = module.graph
    if graph.find_nodes(op="get_attr"):
        return None
    write_early(graph)
    ops, bound = Ops.of(graph), _bound(graph)

    def trim(repeats: Repeats) -> Repeats | None:
        return None if repeats.count < fewest else _cut(repeats, bound)

    repeated = find_repeats(ops, trim)
    places = [0, *[place for cut in repeated for place in (cut.start, cut.end)], len(ops.nodes)]
    stretches = [range(*ends) for ends in zip(places[::2], places[1::2], strict=True)]
    if not repeated or any(_crosses(ops, stretch, bound) for stretch in stretches):
        return None
    splitter = _Splitter(ops)
    splitter.stretch(stretches[0])
    for cut, stretch in zip(repeated, stretches[1:], strict=True):
        splitter.repeats(cut)
        splitter.stretch(stretch)
    return splitter.pieces, splitter.steps()


def _bound(graph: fx.Graph) -> set[fx.Node]:
    """Values that a piece cannot get or return: several at once, and sizes read off tensors."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_several = isinstance(node.meta.get("val"), tuple | list)
        if is_several or (node.op == "call_function" and _is_size(node) and _reads(node, found)):
            found.add(node)
    return found


def _reads(node: fx.Node, bound: set[fx.Node]) -> bool:
    """Whether a size is not computed of symbols alone."""
    return any(operand in bound or not _is_size(operand) for operand in node.all_input_nodes)


def _crosses(ops: Ops, stretch: range, bound: set[fx.Node]) -> bool:
    """Whether a bound value is read outside of the stretch that computes it."""
    held = [node for node in ops.nodes[stretch.start : stretch.stop] if node in bound]
    return any(ops.index.get(user, -1) not in stretch for node in held for user in node.users)


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], torch.Tensor | tuple | list)


def _kind(node: fx.Node) -> object:
    """What code compiled for one value demands of another in its place."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return node
    # Sizes as text: to compare symbols would guard on them.
    return value.dtype, value.device, str(value.shape), str(value.stride())


def _cut(repeats: Repeats, bound: set[fx.Node]) -> Repeats | None:
    """Repeats, cut where no bound value passes from one to the next.

    Returns:
        The first such cut; None if there is none, or what repeats read is not alike.
    """
    for shift in range(repeats.period if repeats.count > 2 else 1):
        found = replace(
            repeats,
            start=repeats.start + shift,
            count=repeats.count - (shift > 0),
            moves=[*repeats.moves[shift:], *repeats.moves[:shift]],
        )
        rows = [_inputs(found, repeat) for repeat in range(found.count)]
        passed = [found.node(0, offset) for offset in _outputs(found)]
        alike = all(len({*map(_kind, column)}) == 1 for column in zip(*rows, strict=True))
        if alike and bound.isdisjoint([*passed, *(node for row in rows for node in row)]):
            return found
    return None


def _inputs(repeats: Repeats, repeat: int) -> Sequence[fx.Node]:
    """What a repeat reads of before it, for each place that reads it."""
    ops, start = repeats.ops, repeats.start + repeat * repeats.period
    rows = ops.operands[start : start + repeats.period]
    return [node for row in rows for node in row if ops.index.get(node, -1) < start]


def _outputs(repeats: Repeats) -> Sequence[int]:
    """Offsets of values that are read outside of their repeat, in any of them."""

    def leaves(repeat: int, offset: int) -> bool:
        start = repeats.start + repeat * repeats.period
        own = range(start, start + repeats.period)
        users = repeats.node(repeat, offset).users
        return any(repeats.ops.index.get(user, -1) not in own for user in users)

    numbers = range(repeats.count)
    return [o for o in range(repeats.period) if any(leaves(repeat, o) for repeat in numbers)]


class _Splitter:
    """Pieces and steps under construction."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        graph = ops.nodes[0].graph
        inputs = graph.find_nodes(op="placeholder")
        self.sizes = [node for node in inputs if _is_size(node)]
        self.results = cast(Sequence[fx.Node], graph.output_node().args[0])
        self.slots = {node: slot for slot, node in enumerate(inputs)}
        self.pieces: list[Piece] = []
        self.calls: list[tuple[int, Sequence[fx.Node], Sequence[fx.Node]]] = []

    def stretch(self, indices: range) -> None:
        """Add a piece that is called once."""
        nodes = self.ops.nodes[indices.start : indices.stop]
        if not nodes:
            return
        own = set(nodes)
        read = dict.fromkeys(node for i in indices for node in self.ops.operands[i])
        inputs = [node for node in read if node not in own]
        outputs = [n for n in nodes if not own.issuperset(n.users) and not _is_size(n)]
        self._add(nodes, inputs, outputs)
        self._call(inputs, outputs)

    def repeats(self, repeats: Repeats) -> None:
        """Add a piece that is called for each repeat."""
        rows = [_inputs(repeats, repeat) for repeat in range(repeats.count)]
        columns = list(dict.fromkeys(zip(*rows, strict=True)))
        offsets = _outputs(repeats)
        for repeat in range(repeats.count):
            inputs = [column[repeat] for column in columns]
            outputs = [repeats.node(repeat, offset) for offset in offsets]
            if repeat == 0:
                nodes = self.ops.nodes[repeats.start : repeats.start + repeats.period]
                self._add(nodes, inputs, outputs)
            self._call(inputs, outputs)

    def steps(self) -> Steps:
        """The calls so far, with slots for nodes."""
        last: dict[fx.Node, int] = {}
        for number, (_, inputs, outputs) in enumerate(self.calls):
            last.update(dict.fromkeys((*inputs, *outputs), number))
        freed: dict[int, list[int]] = {}
        for node, number in last.items():
            if node not in self.results:
                freed.setdefault(number, []).append(self.slots[node])
        steps = [
            Step(piece, self._slots(inputs), self._slots(outputs), freed.get(number, ()))
            for number, (piece, inputs, outputs) in enumerate(self.calls)
        ]
        return Steps(steps, self._slots(self.results), len(self.slots))

    def _slots(self, nodes: Sequence[fx.Node]) -> Sequence[int]:
        return [self.slots[node] for node in nodes]

    def _call(self, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        for node in outputs:
            self.slots[node] = len(self.slots)
        given = [node for node in inputs if not _is_size(node)]
        self.calls.append((len(self.pieces) - 1, [*given, *self.sizes], outputs))

    def _add(
        self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        given = [*[node for node in inputs if not _is_size(node)], *self.sizes]
        for node in given:
            placeholder = graph.placeholder(node.name)
            placeholder.meta["val"] = node.meta["val"]
            copies.setdefault(node, placeholder)
        for node in inputs:
            self._copy_size(graph, node, copies)
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in outputs))
        module = fx.GraphModule(torch.nn.Module(), graph)
        self.pieces.append(Piece(module, [node.meta["val"] for node in given]))

    def _copy_size(self, graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
        """Compute a size again, from those that are given."""
        if node in copies:
            return
        for operand in node.all_input_nodes:
            self._copy_size(graph, operand, copies)
        copies[node] = graph.node_copy(node, copies.__getitem__)
