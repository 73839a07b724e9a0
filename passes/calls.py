"""Calls as rules see them: types in place of values, and the work of a call."""

from __future__ import annotations

from torch import fx

from rolemesh.compiler.ir.program import operand_nodes, tensor_type, tensor_types
from rolemesh.compiler.ir.rule import OpCall
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.work import flops_of

__all__ = ["flops", "op_call"]


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


def flops(node: fx.Node) -> int:
    """Multiply-adds times two of a contraction; zero for other ops, which memory bounds."""
    return flops_of(node.target, [tensor_type(operand).shape for operand in operand_nodes(node)])
