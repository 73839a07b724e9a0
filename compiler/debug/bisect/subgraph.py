"""Parts of a Program that run by themselves: some ops, with given values where they are cut off.

Invariants: nodes keep their names, types, origins, layouts and order, also those that have become
inputs; the outputs are the results of the nodes asked for, as they lie.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from torch import fx

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import Input, InputKind, Output, Program, tensor_types
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["Parts", "cone"]


class Parts:
    """Parts of one Program.

    Args:
        program: The Program, of plain sizes.
        known: Whether a node's value is known, so that a part may be cut off there.
    """

    def __init__(self, program: Program, known: Callable[[fx.Node], bool]) -> None:
        self.program = program
        self.known = known
        self.nodes = {node.name: node for node in program.graph.nodes if node.op != "output"}
        self.inputs = {
            node: replace(entry, mutated=False)
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
        }

    def closed(self, keep: Collection[str]) -> set[fx.Node]:
        """Some ops, and what they need that cannot be given."""
        found: set[fx.Node] = set()
        queue = [self.nodes[name] for name in keep]
        while queue:
            node = queue.pop()
            if node not in found and node.op == "call_function":
                found.add(node)
                queue += [x for x in node.all_input_nodes if not self._can_be_given(x)]
        return found

    def part(self, keep: Collection[str], targets: Sequence[str]) -> Program:
        """The Program of some ops that gives the results of some nodes.

        Args:
            keep: Names of the ops; targets need not be among them.
            targets: The nodes.
        """
        kept = self.closed(keep)
        graph = fx.Graph()
        inputs: list[Input] = []
        copies: dict[fx.Node, fx.Node] = {}
        layouts: dict[fx.Node, tuple[Layout, ...]] = {}

        def copied(node: fx.Node) -> fx.Node:
            if node not in copies:
                copies[node] = graph.create_node("placeholder", node.name, name=node.name)
                inputs.append(self.inputs.get(node) or Input(node.name, InputKind.USER))
                self._describe(node, copies[node], layouts)
            return copies[node]

        for node in self.program.graph.nodes:
            if node in kept:
                copies[node] = graph.node_copy(node, copied)
                self._describe(node, copies[node], layouts)
        results = [x for name in targets for x in _results(copied(self.nodes[name]), layouts)]
        graph.output(tuple(results))
        pinned = {i: layouts[node][0] for i, node in enumerate(results) if node in layouts}
        return replace(
            self.program,
            graph=graph,
            inputs=tuple(inputs),
            outputs=tuple(Output() for _ in results),
            layouts=layouts,
            decisions={},
            seeds={},
            pinned=pinned,
        )

    def _can_be_given(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return True
        return isinstance(node.meta.get("type"), TensorType) and self.known(node)

    def _describe(
        self, node: fx.Node, copy: fx.Node, layouts: dict[fx.Node, tuple[Layout, ...]]
    ) -> None:
        copy.meta.update(node.meta)
        if node in self.program.layouts:
            layouts[copy] = self.program.layouts[node]


def _results(node: fx.Node, layouts: dict[fx.Node, tuple[Layout, ...]]) -> list[fx.Node]:
    """The node, or one node for each of its results."""
    if isinstance(node.meta.get("type"), TensorType):
        return [node]
    found = []
    for index, kind in enumerate(tensor_types(node)):
        item = node.graph.call_function(operator.getitem, (node, index))
        item.meta["type"] = kind
        if node in layouts:
            layouts[item] = (layouts[node][index],)
        found.append(item)
    return found


def cone(program: Program, target: str, stops: Collection[str]) -> set[str]:
    """Names of the ops that lead from some values, and from inputs, to a node.

    Args:
        program: The Program.
        target: The node.
        stops: Names of the values.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    found: set[str] = set()
    queue = [nodes[target]]
    while queue:
        node = queue.pop()
        if node.op == "call_function" and node.name not in stops and node.name not in found:
            found.add(node.name)
            queue += node.all_input_nodes
    return found
