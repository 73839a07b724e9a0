"""`rolemesh::rms_norm`: `x / sqrt(mean(x^2) + eps) * weight` over the last dim, in fp32.

`rounded` says that the quotient is rounded to the dtype of `x` before it is multiplied by the
weight, as most models do. Shapes: x `[..., D]`, weight `[D]`, result as x, in its dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.composite.op import CompositeOp

__all__ = ["OP"]


def _shape(x: Tensor, weight: Tensor, eps: float, rounded: bool) -> Tensor:
    return x.new_empty(x.shape)


def _decomposition(x: Tensor, weight: Tensor, eps: float, rounded: bool) -> Tensor:
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (normed.to(x.dtype) if rounded else normed)).to(x.dtype).contiguous()


def _kernel(x: Tensor, weight: Tensor, eps: float, rounded: bool) -> Tensor:
    """The sum of squares in one pass, without a copy in fp32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(x, scale)  # in fp32
    if rounded:
        return normed.to(x.dtype).mul_(weight).contiguous()
    return normed.mul_(weight).to(x.dtype).contiguous()


OP = CompositeOp(
    "rms_norm(Tensor x, Tensor weight, float eps, bool rounded) -> Tensor",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=_decomposition,
)
