"""In which order a GE graph's ops run, and which results must not share memory.

Only what the results need runs: GE prunes the rest, so an op that only has an effect must be
reached from NetOutput by a control edge.

A GE tensor keeps its value until it is freed; only a ref op changes one, and only the tensor that
is its input. The executor lets views share memory with what they look at, so those that would see
a change are copied:

* a view that is the tensor that a ref op changes;
* a view of such a tensor, made before the change and used after it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rolemesh.runtime.ge.binding import Binding
from rolemesh.runtime.ge.graph import Edge, Graph, Node

__all__ = ["Sharing", "needed", "shuffled"]


def needed(graph: Graph) -> list[Node]:
    """The nodes that the graph's results need, in the graph's order; NetOutput is the last."""
    found = {graph.net_output.name}
    # Nodes come after what they need, so one pass from the end finds all.
    for name in reversed(list(graph.nodes)):
        if name in found:
            found.update(graph.nodes[name].needs)
    return [node for node in graph.nodes.values() if node.name in found]


def shuffled(bindings: Sequence[Binding], seed: int) -> list[Binding]:
    """A random order that the edges allow, the same for the same seed.

    Collectives keep their order, since all ranks must issue them alike.

    Args:
        bindings: Ops in a legal order.
        seed: Seed.
    """
    users: dict[str, list[Binding]] = {}
    missing: dict[str, int] = {}
    names = {binding.node.name for binding in bindings}
    previous = ""
    for binding in bindings:
        needs = {name for name in binding.node.needs if name in names}
        if binding.op.collective:
            needs |= {previous} - {""}
            previous = binding.node.name
        missing[binding.node.name] = len(needs)
        for name in sorted(needs):
            users.setdefault(name, []).append(binding)
    draw = random.Random(seed)
    ready = [binding for binding in bindings if not missing[binding.node.name]]
    order: list[Binding] = []
    while ready:
        index = draw.randrange(len(ready))
        ready[index], ready[-1] = ready[-1], ready[index]
        binding = ready.pop()
        order.append(binding)
        for user in users.get(binding.node.name, ()):
            missing[user.node.name] -= 1
            if not missing[user.node.name]:
                ready.append(user)
    return order


@dataclass(frozen=True)
class Sharing:
    """What may share memory when ops run in a given order.

    Attributes:
        copied: Names of the views whose results are copied.
        roots: For each tensor that may share memory, with which ones.
    """

    copied: frozenset[str]
    roots: Mapping[Edge, frozenset[Edge]]

    def of_edge(self, edge: Edge) -> frozenset[Edge]:
        """The tensors whose memory a tensor may share; itself, if it has its own."""
        return self.roots.get(edge, frozenset([edge]))

    @classmethod
    def of(cls, order: Sequence[Binding], results: Sequence[Edge]) -> Sharing:
        """Find out what may share memory.

        Args:
            order: The ops in the order in which they run.
            results: The graph's results.
        """
        views = {binding.node.name for binding in order if binding.op.view}
        written = {edge.producer for binding in order for edge in binding.written.values()} & views
        last: dict[Edge, int] = {}
        for position, binding in enumerate(order):
            for edge in binding.node.inputs:
                if edge is not None:
                    last[edge] = position
        last.update(dict.fromkeys(results, len(order)))
        return cls(*_walk(order, last, written))


def _walk(
    order: Sequence[Binding], last: Mapping[Edge, int], written: set[str]
) -> tuple[frozenset[str], dict[Edge, frozenset[Edge]]]:
    copied = set(written)
    roots: dict[Edge, frozenset[Edge]] = {}
    views_of: dict[Edge, list[Edge]] = {}

    def root(edge: Edge) -> frozenset[Edge]:
        return roots.get(edge, frozenset([edge]))

    for position, binding in enumerate(order):
        name = binding.node.name
        changed = binding.written
        for edge in changed.values():
            for base in root(edge):
                copied |= {
                    view.producer
                    for view in views_of.get(base, ())
                    if view != edge and last.get(view, -1) >= position
                }
        for index in range(len(binding.node.outputs)):
            edge = Edge(name, index)
            if index in changed:
                roots[edge] = root(changed[index])
            elif binding.op.view and name not in written:
                fed = [source for source in binding.node.inputs if source is not None]
                roots[edge] = frozenset().union(*(root(source) for source in fed))
                for base in roots[edge]:
                    views_of.setdefault(base, []).append(edge)
    return frozenset(copied), roots
