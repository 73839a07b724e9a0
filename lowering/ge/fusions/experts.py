"""Experts as one op -> npu_moe_init_routing_v2, npu_grouped_matmul and npu_moe_finalize_routing.

Rows are sorted by expert, both projections are products of groups of rows, and the rows of a token
come together again with their weights. Ids of no expert here stand for expert E, which is not
active: such routes have no row (drop_pad_mode 3, whose slots are those of one group of all rows).

Limits are those of the documentation of `torch_npu.npu_grouped_matmul`: fp16, bf16 or fp32, and
last dims below 65536. Experts that do not fit are decomposed into plain products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.gate import apply_gate
from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.ge.fusions.grouped_matmul import (
    BY_ENDS,
    BY_ROWS,
    DTYPES,
    SINGLE_RESULT,
    WIDTH,
)
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import (
    argument,
    dtype_of,
    known_above,
    shape_of,
)

__all__ = ["experts"]

aten = torch.ops.aten

_SLOTS = 3
"""The `drop_pad_mode` in which a route may have no row."""


def experts() -> Fusion:
    """The fusion; it goes before those that find what a gate computes."""
    define_npu_ops()
    define_composite_ops()
    ends = frozenset({torch.ops.rolemesh.experts.default})
    return Fusion(torch.ops.npu.npu_moe_finalize_routing.default, ends, _find)


def _find(end: fx.Node, setting: Setting) -> Found | None:
    names = ("hidden", "ids", "weights", "up", "down")
    hidden, ids, weights, up, down = (argument(end, name) for name in names)
    assert isinstance(hidden, fx.Node)
    assert isinstance(ids, fx.Node)
    assert isinstance(weights, fx.Node)
    assert isinstance(up, fx.Node)
    assert isinstance(down, fx.Node)
    kinds = {dtype_of(value) for value in (hidden, up, down)}
    if len(kinds) != 1 or not kinds.issubset(DTYPES):
        return None
    sizes = (*shape_of(up)[1:], *shape_of(down)[1:])
    if setting.within_limits and any(known_above(n, WIDTH) for n in sizes):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        npu = torch.ops.npu
        count = shape_of(up)[0]
        assert isinstance(count, int)
        routed = new(
            npu.npu_moe_init_routing_v2.default,
            hidden,
            new.traced(functools.partial(_active, count=count), ids),
            expert_num=count + 1,
            expert_tokens_num_type=BY_ENDS,
            expert_tokens_num_flag=True,
            active_expert_range=[0, count],
        )
        rows, places, ends = (new.part(routed, index) for index in range(3))
        inner = _product(new, end, rows, "up", ends)
        gate = functools.partial(apply_gate, str(argument(end, "activation")))
        outer = _product(new, end, new.traced(gate, inner), "down", ends)
        scales = weights
        if dtype_of(weights) != dtype_of(outer):
            scales = new(aten._to_copy.default, weights, dtype=dtype_of(outer))
        made = new(
            npu.npu_moe_finalize_routing.default,
            new(aten.unsqueeze.default, outer, 0),
            None,
            None,
            None,
            scales,
            places,
            None,
            drop_pad_mode=_SLOTS,
        )
        return [made]

    return Found((end,), (), emit)


def _active(ids: Tensor, count: int) -> Tensor:
    """Ids in int32, `count` for those of no expert."""
    return ids.masked_fill((ids < 0) | (ids >= count), count).to(torch.int32)


def _product(new: Emitter, end: fx.Node, rows: fx.Node, name: str, ends: fx.Node) -> fx.Node:
    """Rows of each expert times its matrix, with its bias."""
    table, bias = argument(end, name), argument(end, f"{name}_bias")
    assert isinstance(table, fx.Node)
    if not argument(end, "transposed"):
        table = new(aten.transpose.int, table, 1, 2)
    if isinstance(bias, fx.Node) and dtype_of(bias) is torch.bfloat16:
        bias = new(aten._to_copy.default, bias, dtype=torch.float32)
    made = new(
        torch.ops.npu.npu_grouped_matmul.default,
        [rows],
        [table],
        bias=None if bias is None else [bias],
        group_list=ends,
        split_item=SINGLE_RESULT,
        group_type=BY_ROWS,
        group_list_type=BY_ENDS,
    )
    return new.part(made, 0)
