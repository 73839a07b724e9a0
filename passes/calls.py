"""Calls as rules see them: types in place of values, their rules, and the work of a call."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from rolemesh.compiler.ir.program import operand_nodes, origin, tensor_type, tensor_types
from rolemesh.compiler.ir.rule import OpCall, Rule
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.work import flops_of

__all__ = ["Calls", "Op", "flops", "op_call"]


def op_call(node: fx.Node) -> OpCall:
    """The call that a rule is derived from: the node with types in place of values."""
    operands: list[TensorType] = []

    def convert(arg: object) -> object:
        if isinstance(arg, fx.Node):
            value = arg.meta.get("type")
            if isinstance(value, TensorType):
                operands.append(value)
            return value
        if isinstance(arg, list | tuple):
            return tuple([convert(item) for item in arg])
        return arg

    args = tuple([convert(arg) for arg in node.args])
    kwargs = {name: convert(arg) for name, arg in node.kwargs.items()}
    target = node.target
    return OpCall(target, args, kwargs, tuple(operands), tensor_types(node))  # type: ignore[arg-type]


class Op(NamedTuple):
    """What is known of one op by itself; equal calls share call and rule."""

    node: fx.Node
    call: OpCall
    rule: Rule
    flops: int
    operands: list[fx.Node]

    @property
    def types(self) -> tuple[TensorType, ...]:
        """Types of its results."""
        return self.call.results


class Calls:
    """The ops of one Program with their rules. Layers repeat, so a call is looked at once.

    Args:
        rules: Sharding rules.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._known: dict[object, tuple[OpCall, Rule, int]] = {}

    def op(self, node: fx.Node) -> Op:
        """What is known of an op."""
        key, operands = _call_key(node)
        found = self._known.get(key)
        if found is None:
            call, where = op_call(node), origin(node)
            rule = self._rules.rule(call, f"{node.name} in {where.module or '?'} at {where.source}")
            found = call, rule, flops(node)
            if self._rules.covers(call.target):  # else every op is warned of
                self._known[key] = found
        return Op(node, *found, operands)


def _call_key(node: fx.Node) -> tuple[object, list[fx.Node]]:
    """What equal calls have in common, and the operands of this one, as `operand_nodes` has them.

    Getting both takes less time than `op_call`.
    """
    operands: list[fx.Node] = []
    # An op's own hash is a call of Python's.
    parts: list[object] = [
        id(node.target),
        len(node.args),
        node.meta.get("type"),
        *[_key(arg, operands) for arg in node.args],
    ]
    for name, arg in node.kwargs.items():
        parts += (name, _key(arg, operands))
    return tuple(parts), operands


def _key(arg: object, operands: list[fx.Node]) -> object:
    if isinstance(arg, fx.Node):
        value = arg.meta.get("type")
        if isinstance(value, TensorType):
            operands.append(arg)
        return value
    if isinstance(arg, list | tuple):
        return tuple([_key(item, operands) for item in arg])
    return arg


def flops(node: fx.Node) -> int:
    """Multiply-adds times two of a contraction; zero for other ops, which memory bounds."""
    return flops_of(node.target, [tensor_type(operand).shape for operand in operand_nodes(node)])
