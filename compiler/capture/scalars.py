"""Integers that a graph computes with but that shape nothing, as tensors.

A sliding-window cache of `transformers` counts its tokens in a Python int. Once that int has
changed, Dynamo passes it as an integer input, and specialising it would make every decode step a
Program of its own. Where the int is only added to tensors, it is a scalar tensor as well as any.

`tensor_forms` finds the integer inputs, and the values computed from them, that can be tensors of
type `i64[]`: no size depends on them, every op that takes one takes a tensor in that place, and
arithmetic among them has a form below.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_symbols

from rolemesh.compiler.capture.editing import tensors

__all__ = ["FORMS", "tensor_forms"]

aten = torch.ops.aten

FORMS: Mapping[object, OpOverload] = MappingProxyType(
    {
        operator.add: aten.add.Tensor,
        operator.sub: aten.sub.Tensor,
        operator.mul: aten.mul.Tensor,
        torch.sym_max: aten.clamp_min.default,
        torch.sym_min: aten.clamp_max.default,
    }
)
"""Arithmetic of an integer value and a number -> the same of a tensor and a number."""


def tensor_forms(graph: fx.Graph) -> frozenset[fx.Node]:
    """Integer nodes of AOTAutograd's graph that can be scalar tensors, inputs included."""
    shaping = {
        symbol
        for node in graph.nodes
        for value in tensors(node.meta.get("val"))
        for size in value.shape
        if not isinstance(size, int)
        for symbol in free_symbols(size)
    }
    found: set[fx.Node] = set()
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.SymInt) and not free_symbols(value) & shaping:
            derived = _derived(node)
            if derived is not None:
                found |= derived
    return frozenset(found)


def _derived(node: fx.Node) -> set[fx.Node] | None:
    """A node and all values computed from it; None if some use needs a plain integer."""
    found = {node}
    pending = [node]
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "output":
                continue
            if user.target in FORMS and isinstance(user.meta.get("val"), torch.SymInt):
                if user.args[0] is not node or isinstance(user.args[1], fx.Node):
                    return None
                if user not in found:
                    found.add(user)
                    pending.append(user)
            elif not _takes_a_tensor(user, node):
                return None
    return found


def _takes_a_tensor(user: fx.Node, node: fx.Node) -> bool:
    """Whether every place of `node` among the arguments of `user` is one for a tensor."""
    target = user.target
    if not isinstance(target, OpOverload):
        return False
    for position, argument in enumerate(target._schema.arguments):
        given = user.args[position] if position < len(user.args) else None
        given = user.kwargs.get(argument.name, given)
        if given is node and not isinstance(argument.type, torch.TensorType):
            return False
        if given is not node and isinstance(given, list | tuple) and node in given:
            return False
    return True
