"""Matrix products.

Products of 16-bit numbers are accumulated in float32 and rounded once. Forms for 8-bit numbers,
which have other result dtypes and offsets, are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import FLOATS, demand, only
from rolemesh.runtime.ge.ops.table import Attributes, OpTable

__all__ = ["OPS"]

OPS = OpTable()

_KINDS = FLOATS | {torch.int32}


@OPS.op("MatMul", equal=("x1", "x2", "bias"))
def mat_mul(a: Attributes, x1: Tensor, x2: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of two matrices, each transposed on request, plus a bias for each column."""
    return _matrices(a, x1, x2, bias)


@OPS.op("MatMulV2", "MatMulV3", equal=("x1", "x2", "bias"))
def mat_mul_v2(
    a: Attributes,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
) -> Tensor:
    """MatMul; the offsets belong to 8-bit numbers."""
    _no_offsets(a, offset_w)
    return _matrices(a, x1, x2, bias)


@OPS.op("BatchMatMul", equal=("x1", "x2"))
def batch_mat_mul(a: Attributes, x1: Tensor, x2: Tensor) -> Tensor:
    """The products of the last two dims, each transposed on request; dims before them broadcast."""
    return _batches(a, x1, x2)


@OPS.op("BatchMatMulV2", "BatchMatMulV3", equal=("x1", "x2", "bias"))
def batch_mat_mul_v2(
    a: Attributes,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
) -> Tensor:
    """BatchMatMul plus a bias for each column; the offsets belong to 8-bit numbers."""
    _no_offsets(a, offset_w)
    return _plus(a, _batches(a, x1, x2), bias)


def _no_offsets(a: Attributes, offset_w: Tensor | None) -> None:
    only(a, offset_x=0, enable_hf32=False)
    if offset_w is not None:
        raise ValueError(f"{a.where}: no semantics for offset_w")


def _matrices(a: Attributes, x1: Tensor, x2: Tensor, bias: Tensor | None) -> Tensor:
    demand(a, _KINDS, x1)
    if x1.dim() != 2 or x2.dim() != 2:
        raise ValueError(f"{a.where}: {x1.dim()} and {x2.dim()} dims are no matrices")
    left = x1.t() if a.bool("transpose_x1", False) else x1
    right = x2.t() if a.bool("transpose_x2", False) else x2
    if bias is None or bias.shape != right.shape[1:]:
        return _plus(a, left @ right, bias)
    return torch.addmm(bias, left, right)


def _batches(a: Attributes, x1: Tensor, x2: Tensor) -> Tensor:
    demand(a, _KINDS, x1)
    if x1.dim() < 2 or x2.dim() < 2:
        raise ValueError(f"{a.where}: {x1.dim()} and {x2.dim()} dims are no matrices")
    left = x1.mT if a.bool("adj_x1", False) else x1
    right = x2.mT if a.bool("adj_x2", False) else x2
    return torch.matmul(left, right).contiguous()


def _plus(a: Attributes, product: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return product
    if bias.shape[-1:] != product.shape[-1:] or bias.numel() != product.shape[-1]:
        raise ValueError(f"{a.where}: a bias {list(bias.shape)} for {product.shape[-1]} columns")
    return product + bias.reshape(-1)
