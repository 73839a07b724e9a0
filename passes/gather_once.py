"""Gather once: what every rank holds whole, or can make of what it holds whole, is not gathered.

`Partition` gathers a value once for all users that need it in one layout. Here a collective goes
whose value is another form of one that is whole already:

- a view or a cast of a value that was gathered, or summed, for another user;
- a value that was gathered in another form: `[tokens, width]` and `[batch, length, width]`;
- a value computed element by element, or row by row, of values that are whole, where doing that
  once more for all rows writes few bytes against those that are received (`ratio`).

Every node of a Program has one logical value, so an op on whole operands gives its value whole.
Sums are exact only through views: a cast or a product of a pending sum is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import is_bundle
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collective
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.program import Program, origin, tensor_type
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.dead import drop_dead

__all__ = ["GatherOnce"]

aten = torch.ops.aten

_KINDS = frozenset({dialect.ALL_GATHER, dialect.ALL_REDUCE, dialect.BROADCAST})
_RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
"""Ops that keep the elements in their order, so that a reshape undoes them."""

_VIEWS = _RESHAPES | {
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.alias.default,
    dialect.SHARD,
}
_ROWS = frozenset({aten._to_copy.default, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default})
"""Ops that are not element by element, and whose arguments say nothing of sizes."""


@dataclass(frozen=True)
class GatherOnce:
    """The pass; see the module docstring.

    Attributes:
        ratio: Most bytes that ops on whole values may write in place of one byte received.
    """

    ratio: float = 8.0
    name = "gather_once"
    requires = "a partitioned graph"
    ensures = "no collective gives a value that is another form of whole ones"

    def apply(self, program: Program) -> Program:
        """The program without such collectives; unchanged if it has none."""
        made = _Rewrite(program, self.ratio)
        changed = made.run()
        if not changed:
            return program.after(self.name)
        drop_dead(made.graph, made.layouts)
        return program.after(self.name, graph=made.graph, layouts=made.layouts)


class _Rewrite:
    """The new graph, and what is whole in it."""

    def __init__(self, program: Program, ratio: float) -> None:
        self.program = program
        self.ratio = ratio
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        # By value, what has all of it: a collective of the old graph, or a node of the new one.
        self.whole: dict[fx.Node, fx.Node] = {}
        self.replicated = Layout.replicated(program.the_mesh)

    def run(self) -> bool:
        """Whether a collective went; the graph is made if one did."""
        changed = False
        kept: list[fx.Node] = []
        for node in self.program.graph.nodes:
            if node.target not in _KINDS or is_bundle(node) or not self._is_whole(node):
                kept.append(node)
                continue
            source = node.all_input_nodes[0]
            steps = self._steps(node, source)
            if steps is None:
                kept.append(node)
                self._know(source, node)
                continue
            self._copy(kept)
            kept.clear()
            changed = True
            for step in steps:
                self.whole[step] = self._made(step)
            self.values[node] = self._shaped(source)
        if changed:
            self._copy(kept)
        return changed

    def _copy(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            new = self.values[node] = copy_node(self.graph, node, self.values.__getitem__)
            if node in self.program.layouts:
                self.layouts[new] = self.program.layouts[node]

    def _is_whole(self, node: fx.Node) -> bool:
        return self.program.layouts.get(node) == (self.replicated,)

    def _know(self, value: fx.Node, whole: fx.Node) -> None:
        """A value is whole, and so is what it is a reshape of."""
        self.whole[value] = whole
        while value.target in _RESHAPES:
            value = value.all_input_nodes[0]
            if value in self.whole or value.op == "placeholder":
                return
            self.whole[value] = whole  # of another shape: `_shaped` gives it the right one

    def _steps(self, node: fx.Node, source: fx.Node) -> list[fx.Node] | None:
        """Ops that make the value of a collective of whole values; None if it is to stay."""
        exact = node.target is dialect.ALL_REDUCE
        steps: list[fx.Node] = []
        if not self._reachable(source, steps, views=exact):
            return None
        if not steps and source not in self.whole:
            return None
        written = sum(
            math.prod(tensor_type(step).shape) * tensor_type(step).dtype.itemsize
            for step in steps
            if step.target not in _VIEWS
        )
        # A cost: of symbolic sizes, the hints'.
        if float(written) > self.ratio * collective(self.program, node).bytes_received:
            return None
        return steps

    def _reachable(self, value: fx.Node, steps: list[fx.Node], *, views: bool) -> bool:
        """Whether a value can be made whole; `steps` gets the ops that do, in order."""
        if value in self.whole or self._is_whole(value) or value in steps:
            return True
        target = value.target
        if target not in _VIEWS and (views or not _by_element(target)):
            return False
        if len(steps) > 16 or not isinstance(value.meta.get("type"), TensorType):
            return False
        if not all(self._reachable(o, steps, views=views) for o in value.all_input_nodes):
            return False
        steps.append(value)
        return True

    def _shaped(self, value: fx.Node) -> fx.Node:
        """A whole value in its own shape."""
        found = self.whole.get(value)
        if found is None:
            return self.values[value]
        found = self.values.get(found, found)
        kind = tensor_type(value)
        if tensor_type(found).shape == kind.shape:
            return found
        new = add_call(self.graph, aten.reshape.default, (found, list(kind.shape)))
        new.meta.update(value.meta)
        self.layouts[new] = (self.replicated,)
        self.whole[value] = new
        return new

    def _made(self, step: fx.Node) -> fx.Node:
        """An op of whole operands."""
        kind = tensor_type(step)
        if step.target is dialect.SHARD:  # the value it is a chunk of
            return self._shaped(step.all_input_nodes[0])
        target, kwargs = step.target, dict(step.kwargs)
        args = fx.map_arg(step.args, self._shaped)
        if target in _RESHAPES:
            target, args = aten.reshape.default, (args[0], list(kind.shape))
        new = add_call(self.graph, target, args, kwargs, f"{step.name}_whole")
        new.meta["type"] = kind
        new.meta["origin"] = replace(origin(step), reason="what it is made of is whole")
        self.layouts[new] = (self.replicated,)
        return new


def _by_element(target: object) -> bool:
    """Whether an op works element by element, or row by row, whatever the sizes."""
    if not isinstance(target, OpOverload):
        return False
    tags = target.tags
    fixed = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    return target in _ROWS or (target.namespace == "aten" and fixed)
