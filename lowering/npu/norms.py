"""RMS norm, alone and after a residual addition.

The normalised dims are the trailing ones, as many as gamma has. The reciprocal root mean square is
a result too, in fp32, with the normalised dims of extent one. Rounding is that of Atlas A2 and A3:
`npu_rms_norm` multiplies by gamma in fp32 and rounds once; `npu_add_rms_norm` rounds the sum, which
it then normalises, and rounds again before it multiplies by gamma.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.npu.table import NpuOpTable

__all__ = ["OPS", "add_rms_norm", "add_rms_norm_v2", "normalised", "rms_norm"]

OPS = NpuOpTable()


def normalised(x: Tensor, dims: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Divide by the root mean square.

    Args:
        x: Any floating dtype.
        dims: How many trailing dims the mean goes over.
        epsilon: Added to the mean square.

    Returns:
        The quotient, and the reciprocal root mean square with those dims of extent one, both fp32.
    """
    wide = x.float()
    over = tuple(range(x.dim() - dims, x.dim()))
    rstd = torch.rsqrt(wide.square().mean(over, keepdim=True) + epsilon)
    return wide * rstd, rstd


def _rstd_shape(x: Tensor, gamma: Tensor) -> list[int]:
    kept = x.dim() - gamma.dim()
    torch._check(
        kept >= 0 and x.shape[kept:] == gamma.shape,
        lambda: f"gamma {list(gamma.shape)} is not the end of {list(x.shape)}",
    )
    return [*x.shape[:kept], *[1] * gamma.dim()]


def _rms_norm_shape(
    input: Tensor,  # noqa: A002
    gamma: Tensor,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    rstd = input.new_empty(_rstd_shape(input, gamma), dtype=torch.float32)
    return input.new_empty(input.shape), rstd


@OPS.op(
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    ge="RmsNorm",
    shape=_rms_norm_shape,
)
def rms_norm(
    input: Tensor,  # noqa: A002
    gamma: Tensor,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The norm, and its reciprocal root mean square in fp32."""
    _rstd_shape(input, gamma)
    y, rstd = normalised(input, gamma.dim(), epsilon)
    return (y * gamma.float()).to(input.dtype), rstd


def _check_same(x1: Tensor, x2: Tensor) -> None:
    torch._check(x1.shape == x2.shape, lambda: f"{list(x1.shape)} and {list(x2.shape)} differ")


def _add_rms_norm_shape(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    _check_same(x1, x2)
    rstd = x1.new_empty(_rstd_shape(x1, gamma), dtype=torch.float32)
    return x1.new_empty(x1.shape), rstd, x1.new_empty(x1.shape)


@OPS.op(
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06)"
    " -> (Tensor, Tensor, Tensor)",
    ge="AddRmsNorm",
    shape=_add_rms_norm_shape,
)
def add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of `x1 + x2`, its reciprocal root mean square in fp32, and the sum."""
    _check_same(x1, x2)
    _rstd_shape(x1, gamma)
    total = (x1.float() + x2.float()).to(x1.dtype)
    y, rstd = normalised(total, gamma.dim(), epsilon)
    return (y.to(x1.dtype).float() * gamma.float()).to(x1.dtype), rstd, total


def _add_rms_norm_v2_shape(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    return _add_rms_norm_shape(x1, x2, gamma, epsilon)[1]


@OPS.op(
    "npu_add_rms_norm_v2(Tensor(a!) x1, Tensor(b!) x2, Tensor gamma, float epsilon=1e-06)"
    " -> Tensor",
    ge="AddRmsNorm",
    shape=_add_rms_norm_v2_shape,
    functional="npu_add_rms_norm_v2_functional(Tensor x1, Tensor x2, Tensor gamma,"
    " float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
)
def add_rms_norm_v2(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Turn x1 into the norm of `x1 + x2` and x2 into the sum; give the reciprocal rms."""
    y, rstd, total = add_rms_norm(x1, x2, gamma, epsilon)
    x1.copy_(y)
    x2.copy_(total)
    return rstd
