"""Dispatch: rows of tokens move to the ranks that have experts for them, and to no other.

Experts that are split by expert read the rows of all tokens, and give a pending sum over the ranks:
an all_gather before them and a reduce_scatter behind. Both move rows that nobody works on. With
the ids of all tokens at hand, which `mesh.experts` needs anyway, both sides of each exchange know
which rows these are:

| collective | becomes | if |
|---|---|---|
| all_gather of rows | `mesh.dispatch` | only experts with the same ids read it |
| reduce_scatter of a sum | `mesh.combine` | it is what experts give, and nothing is added to it |

Each of them where it costs less by the cost table, for the rows that are expected to move if all
experts are equally likely. The two do not need each other. Values stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import MeshOp, is_bundle
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collective
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.placement import Routed, Shard
from rolemesh.compiler.ir.program import Program, origin, tensor_type
from rolemesh.compiler.ir.traffic import expected_share
from rolemesh.passes.cost import CostTable
from rolemesh.passes.routing import experts_that_give, experts_that_read

__all__ = ["Dispatch"]


@dataclass(frozen=True)
class Dispatch:
    """The pass; see the module docstring.

    Attributes:
        costs: Prices of bytes that move by routes, and of those that do not.
    """

    costs: CostTable = field(default_factory=CostTable)
    name = "dispatch"
    requires = "a partitioned graph, no collectives bundled"
    ensures = "rows of tokens move by their routes where that costs less"

    def apply(self, program: Program) -> Program:
        """The program with dispatches and combines; unchanged if none pays."""
        found = {
            node: experts
            for node in program.ops
            if (experts := _experts_of(node)) is not None and self._pays(program, node, experts)
        }
        if not found:
            return program.after(self.name)
        return _Rewrite(program, found).run(self.name)

    def _pays(self, program: Program, node: fx.Node, experts: fx.Node) -> bool:
        ranks, size = program.the_mesh.axis_size(_axis(node)), experts.kwargs["size"]
        assert isinstance(size, int)
        if ranks == 1:
            return False
        share = expected_share(tensor_type(_ids(experts)).shape[1], size, ranks)
        # A cost: of symbolic sizes, the hints'.
        received = float(collective(program, node).bytes_received)
        whole, costs = received * ranks / (ranks - 1), self.costs
        gathers = node.target is dialect.ALL_GATHER
        plain = received * (costs.all_gather if gathers else costs.reduce_scatter)
        return costs.routing + costs.routed * whole * float(share) < plain


def _experts_of(node: fx.Node) -> fx.Node | None:
    """The experts that a collective moves rows to or from, if these may move by their routes."""
    shard, axes = node.kwargs.get("shard"), node.kwargs.get("axes")
    if is_bundle(node) or not isinstance(shard, Shard):
        return None
    if node.target is dialect.ALL_GATHER:
        experts = experts_that_read(node) if shard.dim == 0 else None
    elif node.target is dialect.REDUCE_SCATTER and node.kwargs["op"] == "sum":
        rows = shard.dim < tensor_type(node).ndim - 1
        experts = experts_that_give(node.all_input_nodes[0]) if rows else None
    else:
        return None
    assert isinstance(axes, tuple)
    alike = experts is not None and experts.kwargs["axes"] == axes and len(axes) == 1
    return experts if alike else None


def _axis(node: fx.Node) -> str:
    axes = node.kwargs["axes"]
    assert isinstance(axes, tuple)
    return str(axes[0])


def _ids(experts: fx.Node) -> fx.Node:
    ids = experts.args[1]
    assert isinstance(ids, fx.Node)
    return ids


class _Rewrite:
    """The new graph; a dispatch stands before the first experts that read it, behind their ids."""

    def __init__(self, program: Program, found: dict[fx.Node, fx.Node]) -> None:
        self.program = program
        self.found = found
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}

    def run(self, name: str) -> Program:
        value: Callable[[fx.Node], fx.Node] = self.values.__getitem__
        for node in self.program.graph.nodes:
            if node in self.found:
                if node.target is dialect.REDUCE_SCATTER:
                    self._add(node, dialect.COMBINE, self.program.layout(node))
                continue
            for operand in node.all_input_nodes:
                if operand not in self.values:
                    self._add(operand, dialect.DISPATCH, self._routed(operand))
            new = self.values[node] = copy_node(self.graph, node, value)
            if node in self.program.layouts:
                self.layouts[new] = self.program.layouts[node]
        return self.program.after(name, graph=self.graph, layouts=self.layouts)

    def _routed(self, node: fx.Node) -> Layout:
        """The layout of rows of which a rank has those that it works on."""
        ids = _ids(self.found[node])
        rows, size = tensor_type(ids).shape[0], self.found[node].kwargs["size"]
        key = f"routes:{origin(ids).value or ids.name}:{size}"
        index = self.program.the_mesh.index(_axis(node))
        return self.program.layout(node).replace(index, Routed(key, 0, 1, rows))

    def _add(self, node: fx.Node, op: MeshOp, layout: Layout) -> None:
        args = (self.values[node.all_input_nodes[0]], self.values[_ids(self.found[node])])
        kwargs = {**node.kwargs, "size": self.found[node].kwargs["size"]}
        new = self.values[node] = add_call(self.graph, op, args, kwargs, op.name)
        where = origin(node)
        new.meta["type"] = node.meta["type"]
        gets = "gets" if op is dialect.DISPATCH else "gives"
        why = f"a rank {gets} rows for its own experts alone"
        new.meta["origin"] = replace(where, reason=f"{where.reason}; {why}")
        self.layouts[new] = (layout,)
