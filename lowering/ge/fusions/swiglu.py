"""SwiGLU of a packed projection: `silu(x[..., :n]) * x[..., n:]` -> npu_swiglu.

The two halves must be halves of one tensor, as the output of a packed projection is. Separate
projections stay as they are: to join their outputs would cost more than one op saves.

Limits are those of `torch_npu.npu_swiglu`'s documentation: fp16, bf16 or fp32, 1 to 8 dims.
"""

from __future__ import annotations

import torch
from torch import fx

from rolemesh.lowering.ge.fusions.base import Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import (
    dtype_of,
    factors,
    halves,
    is_call,
    shape_of,
)

__all__ = ["swiglu"]

aten = torch.ops.aten

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def swiglu() -> Fusion:
    """The fusion."""
    define_npu_ops()
    return Fusion(torch.ops.npu.npu_swiglu.default, frozenset({aten.mul.Tensor}), _find)


def _find(end: fx.Node, setting: Setting) -> Found | None:
    found = next((found for pair in factors(end) if (found := _packed(*pair))), None)
    if found is None:
        return None
    x, dim, activated = found
    op = torch.ops.npu.npu_swiglu.default
    return Found((end,), (activated,), lambda new: [new(op, x, dim)])


def _packed(activated: fx.Node, up: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """The tensor whose halves are activated and `up`, the dim, and the activation."""
    if not is_call(activated, aten.silu.default):
        return None
    found = halves(activated.args[0], up)
    if found is None or dtype_of(found[0]) not in _DTYPES or len(shape_of(found[0])) > 8:
        return None
    return *found, activated
