"""Rules of ops that make tensors: constants, ranges, triangles.

A constant shards freely: each rank makes its own part. A range or an identity matrix is made whole
and then cut, which costs no traffic and gives exact integers in the pads. Operands of `new_*` and
`*_like` are not read, so they arrive in any layout; local forms therefore name their sizes, and
take only type and device from the operand. Random ops have no rule: ranks would disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch

from rolemesh.compiler.ir.dialect import TRIL, TRIU, MeshOp
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.arguments import int_argument
from rolemesh.passes.rules.registry import (
    LocalCall,
    LocalForm,
    LocalFunction,
    RuleFunction,
    replicated_rule,
)

__all__ = ["LOCAL", "RULES", "row_axes"]

aten = torch.ops.aten


def constant(call: OpCall) -> Rule:
    """Every element is the same, so every dim of the result passes."""
    builder = RuleBuilder()
    result = builder.dims(call.results[0].shape)
    operands = [[()] * value.ndim for value in call.operands]
    return builder.build(operands, [result], unread=range(len(operands)))


def triangle(call: OpCall) -> Rule:
    """`tril(x, diagonal)`, `triu(x, diagonal)`: the columns stay whole, rows know their offset."""
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    builder.kinds[-1] = Kind.REPLICATE
    return builder.build([dims], [dims], linear=((True,),), joint=dims[-2])


# ----------------------------------------------------------------------------------- local forms


def sized_local(local: LocalCall) -> LocalForm:
    """`zeros(size)`, `full(size, value)`: the local size."""
    return local.call.target, (list(local.result_shape()), *local.args[1:]), local.kwargs


def new_local(local: LocalCall) -> LocalForm:
    """`new_zeros(x, size)`, `new_full(x, size, value)`: the local size."""
    size = list(local.result_shape())
    return local.call.target, (local.args[0], size, *local.args[2:]), local.kwargs


def strided_local(local: LocalCall) -> LocalForm:
    """`empty_strided(size, stride)`, `empty_permuted(size, order)`: strides are not kept."""
    return aten.empty.memory_format, (list(local.result_shape()),), local.kwargs


def new_strided_local(local: LocalCall) -> LocalForm:
    """`new_empty_strided(x, size, stride)`: strides are not kept."""
    return aten.new_empty.default, (local.args[0], list(local.result_shape())), local.kwargs


def _like_local(target: Callable[..., object]) -> LocalFunction:
    """A `*_like` op as the `new_*` op that names its size."""

    def like_local(local: LocalCall) -> LocalForm:
        kwargs = {k: v for k, v in local.kwargs.items() if k in ("device", "pin_memory")}
        kwargs["dtype"] = local.call.results[0].dtype
        return target, (local.args[0], list(local.result_shape()), *local.args[1:]), kwargs

    return like_local


def fill_local(local: LocalCall) -> LocalForm:
    """`fill(x, value)`."""
    value = local.args[1] if len(local.args) > 1 else local.kwargs["value"]
    return aten.new_full.default, (local.args[0], list(local.result_shape()), value), {}


def zero_local(local: LocalCall) -> LocalForm:
    """`zero(x)`."""
    return aten.new_zeros.default, (local.args[0], list(local.result_shape())), {}


def _triangle_local(op: MeshOp) -> LocalFunction:
    """The mesh op that knows the rows' offset, where the rows are sharded."""

    def triangle_local(local: LocalCall) -> LocalForm:
        layout = local.result_layouts[0]
        rows = local.call.results[0].ndim - 2
        found = row_axes(layout, rows, local.mesh, str(local.call.target))
        if found is None:
            return local.call.target, local.args, local.kwargs
        shard, axes = found
        diagonal = int_argument(local.call, 1, "diagonal", 0)
        return cast(LocalForm, (op, (local.args[0], diagonal), {"shard": shard, "axes": axes}))

    return triangle_local


def row_axes(layout: Layout, dim: int, mesh: Mesh, op: str) -> tuple[Shard, tuple[str, ...]] | None:
    """The one shard of a dim in local coordinates with its axes' names; None if it is whole.

    Args:
        layout: Layout of the value.
        dim: The dim.
        mesh: The mesh.
        op: Name of the op that needs them, for the error.

    Returns:
        A shard that all axes of the dim split jointly, major to minor.

    Raises:
        RolemeshError: RM021 if the dim is split over axes that do not count as one.
    """
    groups = layout.shards_of(dim)
    if not groups:
        return None
    shard, indices = groups[0]
    parts = math.prod(mesh.sizes[i] for i in indices)
    for other, more in groups[1:]:
        ranks = math.prod(mesh.sizes[i] for i in more)
        # Even digits next to each other are one digit of a larger radix.
        if shard.size % parts or other.size % ranks or other.outer != shard.outer * parts:
            raise RolemeshError(
                "RM021",
                what=f"{op} cannot run with its rows split over axes that do not count as one",
                where=f"dim {dim}, layout {layout.placements}",
                why="a rank must know the offset of its rows from one joint position",
                fix="shard the rows over one axis, or over several as one factor",
            )
        indices += more
        parts *= ranks
        shard = Shard(dim, shard.outer, parts)
    return shard, tuple(mesh.names[i] for i in indices)


RULES: dict[str, RuleFunction] = {
    "aten::zeros": constant,
    "aten::ones": constant,
    "aten::full": constant,
    "aten::empty.memory_format": constant,
    "aten::empty_strided": constant,
    "aten::empty_permuted": constant,
    "aten::scalar_tensor": constant,
    "aten::new_zeros": constant,
    "aten::new_ones": constant,
    "aten::new_full": constant,
    "aten::new_empty": constant,
    "aten::new_empty_strided": constant,
    "aten::zeros_like": constant,
    "aten::ones_like": constant,
    "aten::full_like": constant,
    "aten::empty_like": constant,
    "aten::fill.Scalar": constant,
    "aten::zero": constant,
    "aten::arange": replicated_rule,
    "aten::linspace": replicated_rule,
    "aten::logspace": replicated_rule,
    "aten::eye": replicated_rule,
    "aten::tril_indices": replicated_rule,
    "aten::triu_indices": replicated_rule,
    "aten::tril": triangle,
    "aten::triu": triangle,
}

LOCAL: dict[str, LocalFunction] = {
    "aten::zeros": sized_local,
    "aten::ones": sized_local,
    "aten::full": sized_local,
    "aten::empty.memory_format": sized_local,
    "aten::empty_strided": strided_local,
    "aten::empty_permuted": strided_local,
    "aten::new_zeros": new_local,
    "aten::new_ones": new_local,
    "aten::new_full": new_local,
    "aten::new_empty": new_local,
    "aten::new_empty_strided": new_strided_local,
    "aten::zeros_like": _like_local(aten.new_zeros.default),
    "aten::ones_like": _like_local(aten.new_ones.default),
    "aten::full_like": _like_local(aten.new_full.default),
    "aten::empty_like": _like_local(aten.new_empty.default),
    "aten::fill.Scalar": fill_local,
    "aten::zero": zero_local,
    "aten::tril": _triangle_local(TRIL),
    "aten::triu": _triangle_local(TRIU),
}
