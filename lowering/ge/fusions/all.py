"""All fusions, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from rolemesh.lowering.ge.fusions.attention import fused_infer_attention_score
from rolemesh.lowering.ge.fusions.base import Fusion, Setting, rewrite
from rolemesh.lowering.ge.fusions.composite_attention import dense_attention, sparse_attention
from rolemesh.lowering.ge.fusions.experts import experts
from rolemesh.lowering.ge.fusions.grouped_matmul import grouped_matmul
from rolemesh.lowering.ge.fusions.matmul_collective import (
    all_gather_mm,
    all_to_all_mm,
    mm_all_reduce,
    mm_reduce_scatter,
)
from rolemesh.lowering.ge.fusions.moe_gating import moe_gating_top_k
from rolemesh.lowering.ge.fusions.rms_norm import add_rms_norm, rms_norm
from rolemesh.lowering.ge.fusions.rotary import interleave_rope, rotary_mul
from rolemesh.lowering.ge.fusions.swiglu import swiglu

__all__ = ["COMPOSITES", "FUSIONS", "fuse"]

FUSIONS: tuple[Callable[[], Fusion], ...] = (
    add_rms_norm,
    rms_norm,
    rotary_mul,
    interleave_rope,
    experts,
    swiglu,
    fused_infer_attention_score,
    dense_attention,
    sparse_attention,
    moe_gating_top_k,
    grouped_matmul,
    mm_reduce_scatter,
    mm_all_reduce,
    all_gather_mm,
    all_to_all_mm,
)
"""An addition goes into a norm before the norm is made without it, and experts become ops with a
gate between them before gates are made; otherwise order is free."""

COMPOSITES = (
    add_rms_norm,
    rms_norm,
    rotary_mul,
    interleave_rope,
    experts,
    dense_attention,
    sparse_attention,
)
"""Fusions of composite ops."""


def fuse(
    graph: fx.Graph,
    group_name: Callable[[str], str],
    *,
    within_limits: bool = True,
    fusions: Sequence[Callable[[], Fusion]] = FUSIONS,
) -> dict[str, int]:
    """Rewrite patterns of one rank's graph into Ascend's fused ops.

    The result of a fused op may lie otherwise in memory than what it replaces, and so may what is
    computed from it. Views that relied on that become reshapes; nothing else depends on it.

    Args:
        graph: A flat graph whose nodes have `meta["val"]`; changed.
        group_name: See `Setting`.
        within_limits: See `Setting`.
        fusions: What to look for, in this order.

    Returns:
        How often each op was made.
    """
    setting = Setting(group_name, within_limits)
    made: dict[str, int] = {}
    for fusion in (make() for make in fusions):
        made[fusion.name] = made.get(fusion.name, 0) + rewrite(graph, fusion, setting)
    if any(made.values()):
        for view in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            view.target = torch.ops.aten.reshape.default
    return made
