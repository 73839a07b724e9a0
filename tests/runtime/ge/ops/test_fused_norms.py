"""GE's norms and gated activation compute what the torch ops do that become them."""

from __future__ import annotations

import pytest
import torch
from tests.runtime.ge.ops.calls import FLOATS, call, reals
from torch import Tensor

from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.runtime.ge.ops.fused_norms import OPS

define_npu_ops()
npu = torch.ops.npu


def same(found: tuple[Tensor, ...], expected: object) -> None:
    wanted = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_rms_norm(dtype: torch.dtype, epsilon: float | None) -> None:
    x, gamma = reals(3, 5, 8).to(dtype), reals(8).to(dtype)
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    found = call(OPS, "RmsNorm", {"x": x, "gamma": gamma}, attributes)
    same(found, npu.npu_rms_norm(x, gamma, **attributes))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("epsilon", [None, 0.3])
def test_add_rms_norm(dtype: torch.dtype, epsilon: float | None) -> None:
    x1, x2, gamma = (reals(3, 8, seed=i).to(dtype) for i in range(3))
    gamma = gamma[0]
    attributes = {} if epsilon is None else {"epsilon": epsilon}
    found = call(OPS, "AddRmsNorm", {"x1": x1, "x2": x2, "gamma": gamma}, attributes)
    same(found, npu.npu_add_rms_norm(x1, x2, gamma, **attributes))


@pytest.mark.parametrize("dtype", FLOATS)
def test_add_rms_norm_cast(dtype: torch.dtype) -> None:
    x1, x2, gamma = (reals(3, 8, seed=i).to(dtype) for i in range(3))
    given = {"x1": x1, "x2": x2, "gamma": gamma[0]}
    y, rstd, x = npu.npu_add_rms_norm(x1, x2, gamma[0], epsilon=0.3)
    same(call(OPS, "AddRmsNormCast", given, {"epsilon": 0.3}), (y.float(), y, rstd, x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [-1, 1, None])
def test_swi_glu(dtype: torch.dtype, dim: int | None) -> None:
    x = reals(3, 4, 6).to(dtype)
    attributes = {} if dim is None else {"dim": dim}
    same(call(OPS, "SwiGlu", {"x": x}, attributes), npu.npu_swiglu(x, **attributes))


def test_every_op_is_tested() -> None:
    assert set(OPS.ops) == {"RmsNorm", "AddRmsNorm", "AddRmsNormCast", "SwiGlu"}
