"""Rotary embeddings against transformers' and against complex numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.lowering.npu.runs import DTYPES, checked, f, near
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
ops = torch.ops.npu


def angles(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each half of the last dim for itself: nothing may rely on equal halves."""
    return f(*shape, dtype=dtype, seed=1).cos(), f(*shape, dtype=dtype, seed=2).sin()


def place(mode: str, width: int) -> list[tuple[int, int]]:
    """For each element of a rotated vector: the element that it comes from, and its sign."""
    half, quarter = width // 2, width // 4
    if mode == "half":
        return [(i + half, -1) if i < half else (i - half, 1) for i in range(width)]
    if mode == "interleave":
        return [(i + 1, -1) if i % 2 == 0 else (i - 1, 1) for i in range(width)]
    return [(i + quarter, -1) if i % half < quarter else (i - quarter, 1) for i in range(width)]


def turned(x: Tensor, mode: str) -> Tensor:
    moves = place(mode, x.shape[-1])
    return torch.stack([x[..., source] * sign for source, sign in moves], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["half", "interleave", "quarter"])
@pytest.mark.parametrize("shape", [(1, 1, 5, 8), (2, 1, 5, 8), (2, 3, 5, 8)])
def test_rotary_mul(dtype: torch.dtype, mode: str, shape: tuple[int, ...]) -> None:
    x = f(2, 3, 5, 8, dtype=dtype)
    cos, sin = angles(*shape, dtype=dtype)
    (found,) = checked(ops.npu_rotary_mul, x, cos, sin, mode)
    near(found, x.double() * cos.double() + turned(x.double(), mode) * sin.double())


def test_half_mode_is_that_of_llama() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = f(2, 6, 5, 8), f(2, 3, 5, 8)
    cos, sin = angles(2, 5, 8, dtype=torch.float32)
    expected = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    for x, wanted in zip((q, k), expected, strict=True):
        near(ops.npu_rotary_mul(x, cos[:, None], sin[:, None]), wanted)


def test_interleave_half_mode_is_that_of_deepseek() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    x = f(2, 3, 5, 8)
    half = f(2, 5, 4)
    cos, sin = (torch.cat([part, part], -1) for part in (half.cos(), half.sin()))
    expected, _ = modeling.apply_rotary_pos_emb_interleave(x, x, cos, sin)
    (found,) = checked(ops.npu_interleave_rope, x, cos[:, None], sin[:, None])
    near(found, expected)
    near(ops.npu_rotary_mul(x, cos[:, None], sin[:, None], "interleave-half"), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1, 1, 8), (2, 1, 5, 8)])
def test_interleave_rope_multiplies_complex_numbers(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = f(2, 3, 5, 8, dtype=dtype)
    phase = f(*shape[:-1], 4)
    cos, sin = (torch.cat([part, part], -1).to(dtype) for part in (phase.cos(), phase.sin()))
    (found,) = checked(ops.npu_interleave_rope, x, cos, sin)
    numbers = torch.view_as_complex(x.float().unflatten(-1, (4, 2)))
    rotated = numbers * torch.complex(cos[..., :4].float(), sin[..., :4].float())
    near(found, torch.cat([rotated.real, rotated.imag], -1))


def test_a_matrix_as_rotation() -> None:
    x, rotate = f(2, 3, 5, 8), f(8, 8)
    cos, sin = angles(1, 1, 5, 8, dtype=torch.float32)
    (found,) = checked(ops.npu_rotary_mul, x, cos, sin, "interleave", rotate)
    near(found, x * cos + torch.einsum("...i,ij->...j", x, rotate) * sin)


@pytest.mark.parametrize("mode", ["half", "interleave", "quarter"])
@pytest.mark.parametrize("layout", ["BSND", "SBND", "BNSD", "TND"])
def test_apply_rotary_pos_emb(layout: str, mode: str) -> None:
    extent = {"B": 2, "S": 5, "T": 7, "D": 8}
    shapes = [[extent.get(dim, heads) for dim in layout] for heads in (6, 3, 1)]
    q, k = f(*shapes[0]), f(*shapes[1])
    cos, sin = angles(*shapes[2], dtype=torch.float32)
    found = checked(ops.npu_apply_rotary_pos_emb, q, k, cos, sin, layout, mode)
    for x, result in zip((q, k), found, strict=True):
        near(result, x * cos + turned(x, mode) * sin)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: ops.npu_rotary_mul(f(1, 2, 3, 8), f(1, 1, 3, 8), f(1, 1, 3, 8), "thirds"),
     "npu_rotary_mul has no reference semantics for rotary_mode='thirds'"),
    (lambda: ops.npu_apply_rotary_pos_emb(f(2, 8), f(2, 8), f(2, 8), f(2, 8), "BSH"),
     "npu_apply_rotary_pos_emb has no reference semantics for layout='BSH'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RolemeshError) as caught:
        call()
    assert caught.value.code == "RM028"
    assert message in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_angles_must_fit(device: str) -> None:
    x, narrow, many = (t.to(device) for t in (f(2, 3, 5, 8), f(1, 1, 5, 4), f(1, 3, 5, 8)))
    with pytest.raises((RuntimeError, ValueError), match=r"do not fit \[2, 3, 5, 8\]"):
        ops.npu_rotary_mul(x, narrow, narrow)
    with pytest.raises((RuntimeError, ValueError), match=r"is \[B, N, S, D\]"):
        ops.npu_interleave_rope(x, many, many)
    with pytest.raises((RuntimeError, ValueError), match="is not BNSD"):
        ops.npu_apply_rotary_pos_emb(x, x, many, many, "BNSD")
    with pytest.raises((RuntimeError, ValueError), match="do not broadcast"):
        ops.npu_rotary_mul(x, many[:, :2], many[:, :2])
