"""`rolemesh::rms_norm` and `rolemesh::rotary`: what the modules of `transformers` compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rolemesh.lowering.composite import rms_norm, rotary
from rolemesh.lowering.composite.define import define_composite_ops, inlined

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def _defined() -> None:
    define_composite_ops()


def f(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(found: Tensor, want: Tensor) -> None:
    assert (found.dtype, found.shape) == (want.dtype, want.shape)
    tolerance = 1e-5 if want.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(3, 5), (0,), (7, 1, 2)])
def test_norm_of_transformers(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(12, eps=1e-3)
    module.weight.data = f(12, dtype=dtype)
    x = f(*rows, 12, dtype=dtype)
    found = torch.ops.rolemesh.rms_norm(x, module.weight.detach(), 1e-3, True)
    near(found, module(x).detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [False, True])
def test_norm_of_strided_rows_and_of_weights_in_fp32(dtype: torch.dtype, rounded: bool) -> None:
    x, weight = f(12, 5, dtype=dtype).t(), f(12)
    found = rms_norm.OP.kernel(x, weight, 1e-6, rounded)
    want = rms_norm.OP.decomposition(x, weight, 1e-6, rounded)
    assert isinstance(found, Tensor)
    assert isinstance(want, Tensor)
    assert found.is_contiguous()
    near(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_of_transformers(dtype: torch.dtype) -> None:
    query, key = f(2, 6, 5, 8, dtype=dtype), f(2, 3, 5, 8, dtype=dtype)
    angle = f(2, 5, 4)
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in (angle.cos(), angle.sin()))
    want = apply_rotary_pos_emb(query, key, cos, sin)
    for x, turned in zip((query, key), want, strict=True):
        for width in (8, 4):  # half of the angles serves both parts
            given = (x, cos[:, None, :, :width], sin[:, None, :, :width])
            near(torch.ops.rolemesh.rotary(*given, False), turned)


@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved_rotation_of_transformers(dtype: torch.dtype) -> None:
    query, key, angle = f(2, 6, 5, 8, dtype=dtype), f(2, 1, 5, 8, dtype=dtype), f(2, 5, 4)
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in (angle.cos(), angle.sin()))
    want = apply_rotary_pos_emb_interleave(query, key, cos, sin)
    for x, turned in zip((query, key), want, strict=True):
        near(torch.ops.rolemesh.rotary(x, cos[:, None], sin[:, None], True), turned)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4])
def test_rotation_of_strided_rows_and_angles_in_fp32(width: int, interleaved: bool) -> None:
    for dtype in DTYPES:
        x, cos, sin = f(8, 5, dtype=dtype).t(), f(5, width), f(5, width + 8)[:, :width]
        found = rotary.OP.kernel(x, cos, sin, interleaved)
        assert isinstance(found, Tensor)
        wide = rotary.OP.decomposition(x.float(), cos, sin, interleaved)
        assert isinstance(wide, Tensor)
        near(found, wide.to(dtype))


@pytest.mark.parametrize("rounded", [False, True])
def test_gradient_of_the_norm(rounded: bool) -> None:
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.rolemesh.rms_norm(x, weight, 1e-3, rounded)

    for shape in ((3, 2, 5), (5,)):
        given = [f(*size).double().requires_grad_() for size in (shape, (5,))]
        assert torch.autograd.gradcheck(norm, given)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 4])
def test_gradient_of_the_rotation(width: int, interleaved: bool) -> None:
    shapes = ((2, 3, 5, 8), (2, 1, 5, width), (5, width))
    given = [f(*shape).double().requires_grad_() for shape in shapes]
    rotated = torch.ops.rolemesh.rotary.default
    assert torch.autograd.gradcheck(lambda *args: rotated(*args, interleaved), given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_transformers(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(12, eps=1e-3).to(dtype)
    x, grad = f(3, 5, 12, dtype=dtype).requires_grad_(), f(5, 3, 12, dtype=dtype).transpose(0, 1)
    want = torch.autograd.grad(module(x), (x, module.weight), grad)
    found = torch.ops.rolemesh.rms_norm(x, module.weight, 1e-3, True)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, module.weight), grad), want, strict=True
    ):
        near(ours, theirs)
    angle, query = f(2, 5, 8), f(2, 6, 5, 8, dtype=dtype).requires_grad_()
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    turned, _ = apply_rotary_pos_emb(query, query, cos, sin)
    (theirs,) = torch.autograd.grad(turned.square().sum(), query)
    turned = torch.ops.rolemesh.rotary(query, cos[:, None], sin[:, None], False)
    near(torch.autograd.grad(turned.square().sum(), query)[0], theirs)


def test_compilers_see_through_them() -> None:
    table = inlined()
    assert table[torch.ops.rolemesh.rms_norm.default] is rms_norm.OP.decomposition
    assert table[torch.ops.rolemesh.rotary.default] is rotary.OP.decomposition
