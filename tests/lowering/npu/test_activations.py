"""The gated activation against its definition."""

from __future__ import annotations

import pytest
import torch
from tests.lowering.npu.runs import DTYPES, checked, f, near

from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
ops = torch.ops.npu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_swiglu(dtype: torch.dtype, dim: int) -> None:
    x = f(4, 6, 10, dtype=dtype)
    gate, up = (part.double() for part in x.split(x.shape[dim] // 2, dim))
    (found,) = checked(ops.npu_swiglu, x, dim)
    near(found, gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dim_without_halves(device: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"dim 1 of \[2, 5\] has no two halves"):
        ops.npu_swiglu(f(2, 5).to(device), 1)
