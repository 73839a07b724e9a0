"""Every op seen in captured `transformers` models has a rule of its own."""

from __future__ import annotations

import pytest
import torch

from rolemesh.passes.rules import default_rules

VIEWS = """view _unsafe_view reshape unsqueeze squeeze expand slice select transpose t permute cat
split split_with_sizes clone _to_copy alias copy lift_fresh_copy roll"""
POINTWISE = """mul add sub div neg pow rsqrt sigmoid silu relu gelu tanh cos sin exp where
masked_fill clamp le lt gt ge eq bitwise_not bitwise_and bitwise_or logical_and logical_not
floor_divide remainder minimum maximum"""
CONTRACTIONS = "mm addmm bmm baddbmm convolution linalg_solve_triangular"
REDUCTIONS = """mean sum max amax _softmax _safe_softmax native_layer_norm cumsum histc topk sort"""
INDEXING = """gather scatter scatter_add index index_select index_copy index_put index_add
slice_scatter embedding one_hot"""
CREATION = """arange zeros ones full empty new_empty new_ones new_zeros scalar_tensor zeros_like
empty_like tril triu"""
ATTENTION = """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention"""
MOE = "_grouped_mm"
LOSSES = "_log_softmax nll_loss_forward nll_loss_backward _log_softmax_backward_data"
GRADIENTS = """embedding_dense_backward gelu_backward native_dropout_backward
native_layer_norm_backward select_backward sigmoid_backward silu_backward slice_backward
_softmax_backward_data tanh_backward threshold_backward
_scaled_dot_product_flash_attention_for_cpu_backward"""
FAMILIES = [VIEWS, POINTWISE, CONTRACTIONS, REDUCTIONS, INDEXING, CREATION, ATTENTION, MOE, LOSSES,
            GRADIENTS]  # fmt: skip
INVENTORY = [name for family in FAMILIES for name in family.split()]


@pytest.mark.parametrize("name", INVENTORY)
def test_op_has_a_rule(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    covered = [
        overload
        for overload in packet.overloads()
        if default_rules().covers(getattr(packet, overload))
    ]
    assert covered, f"aten.{name} has no rule for any of {packet.overloads()}"


def test_expert_fallback_of_transformers_has_a_rule() -> None:
    pytest.importorskip("transformers.integrations.moe")
    assert default_rules().covers(torch.ops.transformers.grouped_mm_fallback.default)
    assert default_rules().covers(torch.ops.transformers.grouped_mm_fallback_backward.default)
