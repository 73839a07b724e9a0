"""`rolemesh::rms_norm`: `x / sqrt(mean(x^2) + eps) * weight` over the last dim, in fp32.

`rounded` says that the quotient is rounded to the dtype of `x` before it is multiplied by the
weight, as most models do. Double precision is computed in that. Shapes: x `[..., D]`, weight
`[D]`, result as x, in its dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.composite.op import CompositeOp, Gradient

__all__ = ["OP"]


def _shape(x: Tensor, weight: Tensor, eps: float, rounded: bool) -> Tensor:
    return x.new_empty(x.shape)


def _decomposition(x: Tensor, weight: Tensor, eps: float, rounded: bool) -> Tensor:
    normed = _normed(x, eps)[0]
    return (weight * (normed.to(x.dtype) if rounded else normed)).to(x.dtype).contiguous()


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The quotient, and what x is multiplied by."""
    wide = x.to(_wide(x))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide * scale, scale


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _kernel(x: Tensor, weight: Tensor, eps: float, rounded: bool) -> Tensor:
    """The sum of squares in one pass, without a copy in fp32."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normed = torch.mul(x, scale)  # in the wide dtype
    if rounded:
        return normed.to(x.dtype).mul_(weight).contiguous()
    return normed.mul_(weight).to(x.dtype).contiguous()


def _gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, rounded: bool
) -> tuple[Tensor, Tensor]:
    """A row's part along the row itself changes its length alone, which the norm takes away."""
    normed, scale = _normed(x, eps)
    wide = grad.to(normed.dtype)
    along = normed.to(x.dtype).to(normed.dtype) if rounded else normed
    of_weight = (wide * along).sum_to_size(weight.shape)
    inner = wide * weight.to(normed.dtype)
    of_x = (inner - normed * (inner * normed).mean(-1, keepdim=True)) * scale
    return of_x.to(x.dtype), of_weight.to(weight.dtype)


OP = CompositeOp(
    "rms_norm(Tensor x, Tensor weight, float eps, bool rounded) -> Tensor",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=_decomposition,
    gradient=Gradient(("x", "weight"), _gradient),
)
