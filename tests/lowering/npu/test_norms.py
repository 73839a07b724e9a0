"""RMS norms against transformers' and PyTorch's."""

from __future__ import annotations

import pytest
import torch
from tests.lowering.npu.runs import DTYPES, checked, f, near

from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
ops = torch.ops.npu


def llama_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = modeling.LlamaRMSNorm(gamma.shape[0], eps=epsilon)
    norm.weight.data = gamma
    return norm(x).detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_rms_norm_is_that_of_llama(dtype: torch.dtype, epsilon: float) -> None:
    x, gamma = f(3, 5, 24, dtype=dtype), f(24, dtype=dtype)
    y, rstd = checked(ops.npu_rms_norm, x, gamma, epsilon)
    near(y, llama_norm(x, gamma, epsilon))
    near(rstd, torch.rsqrt(x.double().square().mean(-1, keepdim=True) + epsilon))
    assert rstd.dtype is torch.float32


def test_rms_norm_rounds_once() -> None:
    x, gamma = f(64, 24, dtype=torch.bfloat16), f(24, dtype=torch.bfloat16)
    exact = torch.nn.functional.rms_norm(x.float(), (24,), gamma.float(), 1e-6)
    assert torch.equal(ops.npu_rms_norm(x, gamma)[0], exact.bfloat16())


def test_rms_norm_over_two_dims() -> None:
    x, gamma = f(3, 5, 2, 7), f(2, 7)
    y, rstd = checked(ops.npu_rms_norm, x, gamma, 1e-5)
    near(y, torch.nn.functional.rms_norm(x, (2, 7), gamma, 1e-5))
    assert rstd.shape == (3, 5, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_is_a_residual_addition_and_a_norm(dtype: torch.dtype) -> None:
    x1, x2, gamma = f(3, 5, 24, dtype=dtype), f(3, 5, 24, dtype=dtype, seed=1), f(24, dtype=dtype)
    y, rstd, total = checked(ops.npu_add_rms_norm, x1, x2, gamma, 1e-5)
    assert torch.equal(total, x1 + x2)
    expected = llama_norm(x1 + x2, gamma, 1e-5)
    torch.testing.assert_close(y, expected, rtol=0 if dtype != torch.float32 else 1e-6, atol=0)
    near(rstd, torch.rsqrt((x1 + x2).float().square().mean(-1, keepdim=True) + 1e-5))


def test_second_version_writes_the_norm_and_the_sum() -> None:
    x1, x2, gamma = f(3, 5, 24), f(3, 5, 24, seed=1), f(24)
    y, rstd, total = ops.npu_add_rms_norm(x1, x2, gamma, 1e-5)
    variant = checked(ops.npu_add_rms_norm_v2_functional, x1, x2, gamma, 1e-5)
    (found,) = checked(ops.npu_add_rms_norm_v2, x1, x2, gamma, 1e-5)
    for a, b in zip((found, x1, x2), (rstd, y, total), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(variant, (rstd, y, total), strict=True):
        assert torch.equal(a, b)


def test_results_are_contiguous_whatever_the_operand() -> None:
    x = f(24, 5).T
    (y, _) = checked(ops.npu_rms_norm, x, f(24))
    assert y.is_contiguous()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gamma_must_be_the_end_of_the_operand(device: str) -> None:
    x = f(3, 24).to(device)
    with pytest.raises(
        (RuntimeError, ValueError), match=r"gamma \[23\] is not the end of \[3, 24\]"
    ):
        ops.npu_rms_norm(x, f(23).to(device))
    with pytest.raises((RuntimeError, ValueError), match=r"\[3, 24\] and \[1, 24\] differ"):
        ops.npu_add_rms_norm(x, x[:1], f(24).to(device))
