"""A decided Program as ops that each run alone, to tell a wrong decision from a wrong rewrite.

Before partitioning, a decided Program cannot run: its ops are whole and its layouts are promises.
`apart` makes every op local as the partition pass does, but gives each operand as an input of its
own, in the layout that the op's choices need. With right operands a right decision gives a right
result, whatever happens between ops. Only the ops themselves are made by the partition pass's code:
what it inserts between them, and its filling of pads, have no part in it.

Invariant: an op keeps its name; an input's `Origin.value` names the value it stands for.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from rolemesh.compiler.ir.dialect import MASK_PAD
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import (
    Decision,
    Input,
    InputKind,
    Program,
    origin,
    tensor_type,
)
from rolemesh.passes.partition import Rewrite, pad_filling
from rolemesh.passes.rules import default_rules

__all__ = ["apart"]


def apart(program: Program, only: Collection[str] | None = None) -> Program:
    """The Program of a decided Program's ops, each with inputs of its own; it has no outputs.

    Args:
        program: A decided Program.
        only: Names of the ops to take; None for all.
    """
    return _Apart(program, only).made()


class _Apart(Rewrite):
    """The partition pass's rewrite of single ops, with operands from nowhere."""

    def __init__(self, program: Program, only: Collection[str] | None) -> None:
        super().__init__(program, default_rules())
        self.only = only
        self.inputs: list[Input] = []

    def made(self) -> Program:
        for node in self.program.graph.nodes:
            self.by_name[node.name] = node
            if node.op != "call_function" or not (self.only is None or node.name in self.only):
                continue
            if node in self.program.decisions:
                self._op(node, self.program.decisions[node])
            elif node.args[0] in self.values:
                self._getitem(node)
        self.graph.output(())
        return replace(
            self.program,
            graph=self.graph,
            inputs=tuple(self.inputs),
            outputs=(),
            layouts=self.layouts,
            decisions={},
            seeds={},
            pinned={},
        )

    def _operand(
        self,
        user: fx.Node,
        decision: Decision,
        position: int,
        operand: fx.Node,
        need: Layout | None,
    ) -> fx.Node:
        if need is None:  # it is not read, and comes as it lies
            return self._convert(operand, self.program.layouts[operand][0], user, decision)
        return super()._operand(user, decision, position, operand, need)

    def _mask_pad(
        self,
        value: fx.Node,
        layout: Layout,
        axes: tuple[int, ...],
        old: fx.Node,
        user: fx.Node,
        decision: Decision,
    ) -> fx.Node:
        dtype, reduction = tensor_type(value).dtype, decision.rule.reduction
        filled = pad_filling(layout, axes, self.mesh, reduction, dtype)
        if filled is None:
            return value
        new = self._call(MASK_PAD, (value,), filled)
        new.meta.update(value.meta)
        self.layouts[new] = self.layouts[value]
        return new

    def _convert(
        self, old: fx.Node, target: Layout, user: fx.Node, decision: Decision | None
    ) -> fx.Node:
        found = self.converted.get((old, target))
        if found is None:
            found = self.graph.create_node("placeholder", old.name, name=f"{old.name}_given")
            found.meta.update(old.meta, origin=replace(origin(old), value=old.name))
            self.layouts[found] = (target,)
            self.converted[old, target] = found
            self.inputs.append(Input(old.name, InputKind.USER))
        return found
