"""The rules in use unless a pass is given others: all families together."""

from __future__ import annotations

import functools

from rolemesh.passes.rules import (
    attention,
    attention_backward,
    backward,
    composite_attention,
    composite_experts,
    composite_norms,
    convolution,
    creation,
    indexing,
    losses,
    matmul,
    moe,
    npu,
    npu_attention,
    npu_moe,
    pointwise,
    reductions,
    slicing,
    views,
)
from rolemesh.passes.rules.registry import Rules

__all__ = ["FAMILIES", "default_rules"]

FAMILIES = (
    pointwise,
    views,
    slicing,
    creation,
    reductions,
    matmul,
    convolution,
    indexing,
    losses,
    attention,
    attention_backward,
    backward,
    composite_attention,
    composite_experts,
    composite_norms,
    moe,
    npu,
    npu_attention,
    npu_moe,
)
"""Modules with tables of their own, no op in more than one of them."""


@functools.cache
def default_rules() -> Rules:
    """All rules, one object for the process, to which `register_rule` adds."""
    return Rules(
        tuple(family.RULES for family in FAMILIES), tuple(family.LOCAL for family in FAMILIES)
    )
