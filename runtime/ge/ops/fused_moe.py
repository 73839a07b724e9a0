"""Ascend's fused ops of experts: gating, routing, grouped products.

What they compute stands in `lowering/npu`; here are the names of their GE definitions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rolemesh.lowering.npu.grouped_matmul import check_options, grouped_products
from rolemesh.lowering.npu.moe import (
    moe_finalize_routing,
    moe_gating_top_k,
    moe_gating_top_k_softmax,
    moe_init_routing_v2,
)
from rolemesh.runtime.ge.ops.checks import only
from rolemesh.runtime.ge.ops.table import Attributes, OpTable

__all__ = ["OPS"]

OPS = OpTable()

Tensors = tuple[Tensor, ...]


@OPS.op("MoeGatingTopK", equal=("x", "bias"))
def gating_top_k(
    a: Attributes,
    x: Tensor,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
) -> Tensors:
    """`npu_moe_gating_top_k`."""
    return moe_gating_top_k(
        x,
        a.int("k"),
        bias,
        input_ids,
        tid2eid,
        k_group=a.int("k_group", 1),
        group_count=a.int("group_count", 1),
        group_select_mode=a.int("group_select_mode", 0),
        renorm=a.int("renorm", 0),
        norm_type=a.int("norm_type", 0),
        out_flag=a.bool("out_flag", False),
        routed_scaling_factor=a.float("routed_scaling_factor", 1.0),
        eps=a.float("eps", 1e-20),
    )


@OPS.op("MoeGatingTopKSoftmax")
def gating_top_k_softmax(a: Attributes, x: Tensor, finished: Tensor | None = None) -> Tensors:
    """`npu_moe_gating_top_k_softmax`."""
    return moe_gating_top_k_softmax(x, finished, a.int("k"))


@OPS.op("MoeInitRoutingV3")
def init_routing(
    a: Attributes,
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensors:
    """`npu_moe_init_routing_v2`."""
    return moe_init_routing_v2(
        x,
        expert_idx,
        scale,
        offset,
        active_num=a.int("active_num", -1),
        expert_capacity=a.int("expert_capacity", -1),
        expert_num=a.int("expert_num", -1),
        drop_pad_mode=a.int("drop_pad_mode", 0),
        expert_tokens_num_type=a.int("expert_tokens_num_type", 0),
        expert_tokens_num_flag=a.bool("expert_tokens_num_flag", False),
        quant_mode=a.int("quant_mode", -1),
        active_expert_range=a.ints("active_expert_range", ()),
        row_idx_type=a.int("row_idx_type", 0),
    )


@OPS.op("MoeFinalizeRouting", equal=("expanded_x", "x1", "x2", "bias"))
def finalize_routing(
    a: Attributes,
    expanded_x: Tensor,
    x1: Tensor,
    bias: Tensor,
    scales: Tensor,
    expanded_row_idx: Tensor,
    expanded_expert_idx: Tensor,
    x2: Tensor | None = None,
) -> Tensor:
    """`npu_moe_finalize_routing` with all operands and `drop_pad_mode` 0."""
    return moe_finalize_routing(
        expanded_x, x1, x2, bias, scales, expanded_row_idx, expanded_expert_idx
    )


@OPS.op("MoeFinalizeRoutingV2", equal=("expanded_x", "x1", "x2", "bias"))
def finalize_routing_v2(
    a: Attributes,
    expanded_x: Tensor,
    expanded_row_idx: Tensor,
    x1: Tensor | None = None,
    x2: Tensor | None = None,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    expert_idx: Tensor | None = None,
) -> Tensor:
    """`npu_moe_finalize_routing`."""
    return moe_finalize_routing(
        expanded_x,
        x1,
        x2,
        bias,
        scales,
        expanded_row_idx,
        expert_idx,
        drop_pad_mode=a.int("drop_pad_mode", 0),
        k=a.int("k", 1),
    )


@OPS.op(
    "GroupedMatmul",
    dynamic=("x", "weight", "bias", "scale", "offset", "antiquant_scale", "antiquant_offset"),
)
def grouped_matmul(
    a: Attributes,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    scale: Sequence[Tensor],
    offset: Sequence[Tensor],
    antiquant_scale: Sequence[Tensor],
    antiquant_offset: Sequence[Tensor],
    group_list: Tensor | None = None,
    per_token_scale: Tensor | None = None,
) -> Tensors:
    """Both overloads of `npu_grouped_matmul`."""
    only(a, dtype=-1, transpose_weight=False, transpose_x=False)
    check_options(
        group_type=a.int("group_type", -1),
        group_list_type=a.int("group_list_type", 0),
        act_type=a.int("act_type", 0),
        scale=_given(scale),
        offset=_given(offset),
        antiquant_scale=_given(antiquant_scale),
        antiquant_offset=_given(antiquant_offset),
        per_token_scale=per_token_scale,
    )
    return tuple(
        grouped_products(
            x,
            weight,
            _given(bias),
            a.int("split_item", 0),
            group_list,
            a.int("group_list_type", 0),
        )
    )


def _given(tensors: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """A list input, or None where there is one tensor without elements in its place."""
    return None if all(tensor.numel() == 0 for tensor in tensors) else tensors
