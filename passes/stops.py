"""The stops of a graph, and which of them a value is computed from or leads to.

A *stop* is a contraction, experts as one op, a softmax or fused attention op, a top-k, an embedding
lookup, a cache write, an input, or the output. Weights are classified by the stops that lie next to
them (`rolemesh.passes.classify`).

Sets of stops are integers, a bit a stop: a residual stream joins every layer to all later ones, so
the sets grow with depth, and one pass over the graph in each direction makes all of them with a
few machine words a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from rolemesh.compiler.ir.program import Program, tensor_type

__all__ = [
    "CONTRACTIONS",
    "SOFTMAX",
    "TOPK",
    "Stops",
    "is_attention",
    "is_experts",
    "is_grouped",
    "is_norm",
]

aten = torch.ops.aten

CONTRACTIONS = frozenset(
    {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
)
SOFTMAX = frozenset({aten._softmax.default, aten._safe_softmax.default})
TOPK = frozenset({aten.topk.default})
_ATTENTION = frozenset({"rolemesh::attention", "rolemesh::sparse_attention"})


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def is_attention(node: fx.Node) -> bool:
    """Whether a node is a fused attention op."""
    name = _name(node)
    return "scaled_dot_product" in name or name in _ATTENTION


def is_grouped(node: fx.Node) -> bool:
    """Whether a node is a grouped matmul."""
    return "grouped_mm" in _name(node)


def is_experts(node: fx.Node) -> bool:
    """Whether a node is experts as one op."""
    return _name(node) == "rolemesh::experts"


def is_norm(node: fx.Node) -> bool:
    """Whether a node is an RMS norm as one op."""
    return _name(node) == "rolemesh::rms_norm"


class Stops:
    """The stops of one graph.

    Args:
        program: A canonicalised, unsharded Program.

    Attributes:
        writes: Cache writes: new values of updated inputs of three dims or more.
        outputs: The output.
        calls: Stops that are ops.
        softmax: Softmaxes.
        topk: Top-k selections.
        attention: Fused attention ops.
        mm: Matrix products, of two dims.
        bmm: Batched matrix products.
        weighting: Batched products that weight values by attention scores.
        attending: Contractions that attention reads as queries or keys.
    """

    def __init__(self, program: Program) -> None:
        values = {
            value
            for value, output in zip(program.results, program.outputs, strict=True)
            if output.mutates is not None
            and isinstance(value, fx.Node)
            and value.op == "call_function"
            and len(tensor_type(value).shape) >= 3
        }
        at = CONTRACTIONS | SOFTMAX | TOPK | {aten.embedding.default}
        nodes = list(program.graph.nodes)
        self._stops = [
            node
            for node in nodes
            if node.op != "call_function"
            or node.target in at
            or node in values
            or is_attention(node)
            or is_grouped(node)
            or is_experts(node)
        ]
        self._bits = {node: 1 << index for index, node in enumerate(self._stops)}
        self.writes = self._where(lambda node: node in values)
        self.outputs = self._where(lambda node: node.op == "output")
        self.calls = self._where(lambda node: node.op == "call_function")
        self.softmax = self._where(lambda node: node.target in SOFTMAX)
        self.topk = self._where(lambda node: node.target in TOPK)
        self.attention = self._where(is_attention)
        self.mm = self._where(lambda node: node.target is aten.mm.default)
        self.bmm = self._where(lambda node: node.target is aten.bmm.default)
        self._up: dict[fx.Node, int] = {}
        for node in nodes:
            self._up[node] = self._bits.get(node) or self._union(
                self._up[source] for source in node.all_input_nodes
            )
        self._down: dict[fx.Node, int] = {}
        for node in reversed(nodes):
            self._down[node] = self._union(
                self._bits.get(user) or self._down[user] for user in node.users
            )
        self.weighting = self._where(
            lambda node: (
                node.target is aten.bmm.default
                and any(self._up[operand] & self.softmax for operand in node.all_input_nodes)
            )
        )
        scores = self._where(
            lambda node: node.target is aten.bmm.default and bool(self._down[node] & self.softmax)
        )
        reading = scores | self.attention
        self.attending = self._where(lambda node: bool(self._down[node] & reading))

    def up(self, start: fx.Node) -> int:
        """Stops that `start` is computed from; `start` itself if it is one."""
        return self._up[start]

    def down(self, start: fx.Node) -> int:
        """Stops that are computed from `start`."""
        return self._down[start]

    def below(self, stops: int) -> int:
        """Stops that are computed from any of these."""
        return self._union(self._down[node] for node in self.nodes(stops))

    def set_of(self, nodes: Iterable[fx.Node]) -> int:
        """The set of these stops; nodes that are none are left out."""
        return self._union(self._bits.get(node, 0) for node in nodes)

    def nodes(self, stops: int) -> Iterator[fx.Node]:
        """The stops in a set, in graph order."""
        while stops:
            low = stops & -stops
            yield self._stops[low.bit_length() - 1]
            stops ^= low

    def _where(self, holds: Callable[[fx.Node], bool]) -> int:
        return self._union(bit for node, bit in self._bits.items() if holds(node))

    @staticmethod
    def _union(sets: Iterable[int]) -> int:
        union = 0
        for one in sets:
            union |= one
        return union
