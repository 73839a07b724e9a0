"""The gated activation of Llama-like MLPs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from rolemesh.lowering.npu.table import NpuOpTable

__all__ = ["OPS", "swiglu"]

OPS = NpuOpTable()


def _result_shape(x: Tensor, dim: int) -> list[int]:
    shape = list(x.shape)
    torch._check(shape[dim] % 2 == 0, lambda: f"dim {dim} of {list(x.shape)} has no two halves")
    shape[dim] = shape[dim] // 2
    return shape


def _swiglu_shape(
    input: Tensor,  # noqa: A002
    dim: int = -1,
) -> Tensor:
    return input.new_empty(_result_shape(input, dim))


@OPS.op("npu_swiglu(Tensor input, int dim=-1) -> Tensor", ge="SwiGlu", shape=_swiglu_shape)
def swiglu(
    input: Tensor,  # noqa: A002
    dim: int = -1,
) -> Tensor:
    """The first half of a dim through SiLU, times its second half."""
    _result_shape(input, dim)
    gate, up = input.float().chunk(2, dim)
    return (silu(gate) * up).to(input.dtype)
