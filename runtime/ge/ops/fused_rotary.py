"""GE's rotary position embeddings, by the references of the ops that become them."""

from __future__ import annotations

from torch import Tensor

from rolemesh.lowering.npu import rotary
from rolemesh.runtime.ge.ops.table import Attributes, OpTable

__all__ = ["OPS"]

OPS = OpTable()

_MODES = ("half", "interleave", "quarter", "interleave-half")
"""Rotary modes by the number that RotaryPositionEmbedding has for them."""

_LAYOUTS = ("", "BSND", "SBND", "BNSD", "TND")
"""Layouts by the number that ApplyRotaryPosEmb has for them."""


@OPS.op("RotaryMul", equal=("x", "r1", "r2"))
def rotary_mul(_a: Attributes, x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """Rotate by halves; GE's op knows no other mode."""
    return rotary.rotary_mul(x, r1, r2)


@OPS.op("RotaryPositionEmbedding", equal=("x", "cos", "sin", "rotate"))
def rotary_position_embedding(
    a: Attributes, x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None = None
) -> Tensor:
    """Rotate in any mode, or by a matrix."""
    return rotary.rotary_mul(x, cos, sin, _MODES[a.int("mode", 0)], rotate)


@OPS.op("ApplyRotaryPosEmb", equal=("query", "key", "cos", "sin"), writes={0: "query", 1: "key"})
def apply_rotary_pos_emb(
    a: Attributes, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in place."""
    layout, mode = _LAYOUTS[a.int("layout", 1)], a.str("rotary_mode", "half")
    turned = rotary.apply_rotary_pos_emb(query, key, cos, sin, layout, mode)
    return query.copy_(turned[0]), key.copy_(turned[1])


@OPS.op("InterleaveRope", equal=("x", "cos", "sin"))
def interleave_rope(_a: Attributes, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate as DeepSeek does."""
    return rotary.interleave_rope(x, cos, sin)
