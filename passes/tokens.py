"""Which user inputs hold tokens or images, read off the graph.

* Ids that an embedding looks up are `[batch, sequence]`.
* Where no ids come in, hidden states are: floating-point `[batch, sequence, features]` whose
  features a weight contracts. So it is for a graph that begins in the middle of a model.
* Images, and anything else that a convolution or a weight reads and that has other dims, are
  independent of each other along their first dim.

Everything else a user passes (masks, rotary tables, a cache) follows from what it meets.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from rolemesh.compiler.ir.program import InputKind, Program, tensor_type
from rolemesh.passes.stops import is_attention

__all__ = ["sample_inputs", "token_inputs"]

aten = torch.ops.aten

_VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten._to_copy.default, aten.clone.default}
)
_TRANSPOSED = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})
_PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
"""Contractions, with the position of their first factor."""

_MOVES_ROWS = frozenset(
    {
        aten.masked_scatter.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.index_put.default,
        aten.index_copy.default,
        aten.index_add.default,
        aten.gather.default,
        aten.scatter.src,
        aten._softmax.default,
        aten._safe_softmax.default,
    }
)
"""Ops after which a row of the input is no row of the result."""


def token_inputs(program: Program) -> set[fx.Node]:
    """User inputs that hold tokens: ids `[batch, sequence]`, else hidden states.

    Hidden states are `[batch, sequence, features]`.
    """
    ids = {
        node
        for node in _user_inputs(program)
        if any(
            user.target is aten.embedding.default
            and user.args[1] is value
            and _is_weight(program, user.args[0])
            for value in _through(node, _VIEWS)
            for user in value.users
        )
    }
    if ids:
        return ids
    return {
        node
        for node in _user_inputs(program)
        if len(tensor_type(node).shape) == 3 and _readers(program, node) == {"weight"}
    }


def sample_inputs(program: Program) -> set[fx.Node]:
    """User inputs that hold images or other samples, independent along their first dim."""
    return {
        node
        for node in _user_inputs(program)
        if (readers := _readers(program, node))
        and ("convolution" in readers or len(tensor_type(node).shape) != 3)
    }


def _user_inputs(program: Program) -> list[fx.Node]:
    return [
        node
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if entry.kind is InputKind.USER and not entry.mutated and len(tensor_type(node).shape) >= 2
    ]


def _through(start: fx.Node, targets: Collection[object]) -> set[fx.Node]:
    """`start` and what such ops make of it."""
    seen: set[fx.Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if node not in seen:
            seen.add(node)
            queue += [user for user in node.users if user.target in targets]
    return seen


def _readers(program: Program, start: fx.Node) -> set[str]:
    """What first reads a floating-point input: `convolution`, `weight` (a contraction), or both."""
    found: set[str] = set()
    if not tensor_type(start).dtype.is_floating_point:
        return found
    seen: set[fx.Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if user.target is aten.convolution.default:
                found.add("convolution")
            elif user.target in _PRODUCTS:
                position = _PRODUCTS[user.target]
                if user.args[position] is node and _is_weight(program, user.args[position + 1]):
                    found.add("weight")
            elif user.op == "call_function" and not _ends(user):
                queue.append(user)
    return found


def _ends(node: fx.Node) -> bool:
    return node.target in _MOVES_ROWS or is_attention(node)


def _is_weight(program: Program, node: object) -> bool:
    """Whether a value is a stored tensor that no call changes, perhaps cast or transposed."""
    while isinstance(node, fx.Node) and (node.target in _VIEWS or node.target in _TRANSPOSED):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    return program.inputs[program.placeholders.index(node)].is_state
