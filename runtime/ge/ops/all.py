"""All ops that the reference executor knows, by type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from rolemesh.runtime.ge.ops import (
    activations,
    collectives,
    convolution,
    copies,
    creation,
    elementwise,
    fused_attention,
    fused_caches,
    fused_matmul_collectives,
    fused_moe,
    fused_norms,
    fused_rotary,
    indexing,
    matmul,
    norms,
    reductions,
    scatter,
    shapes,
    slicing,
    sorting,
)
from rolemesh.runtime.ge.ops.table import Op, OpTable

__all__ = ["OPS", "merged"]

_FAMILIES = (
    activations,
    collectives,
    convolution,
    copies,
    creation,
    elementwise,
    fused_attention,
    fused_caches,
    fused_matmul_collectives,
    fused_moe,
    fused_norms,
    fused_rotary,
    indexing,
    matmul,
    norms,
    reductions,
    scatter,
    shapes,
    slicing,
    sorting,
)
"""A new file of ops is imported above and listed here."""


def merged(families: Sequence[OpTable]) -> Mapping[str, Op]:
    """One table of several.

    Raises:
        ValueError: If an op type is in two of them.
    """
    ops: dict[str, Op] = {}
    for family in families:
        twice = sorted(ops.keys() & family.ops.keys())
        if twice:
            raise ValueError(f"op types are in two tables: {', '.join(twice)}")
        ops.update(family.ops)
    return MappingProxyType(ops)


OPS: Mapping[str, Op] = merged([family.OPS for family in _FAMILIES])
"""What each op type computes."""
