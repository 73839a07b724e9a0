"""GE's rotary embeddings compute what the torch ops do that become them.

Numbers of modes and layouts are those that torchair's converters write.
"""

from __future__ import annotations

import pytest
import torch
from tests.runtime.ge.ops.calls import FLOATS, call, reals
from torch import Tensor

from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.runtime.ge.ops.fused_rotary import OPS

define_npu_ops()
npu = torch.ops.npu
MODES = ["half", "interleave", "quarter", "interleave-half"]


def same(found: tuple[Tensor, ...], expected: object) -> None:
    wanted = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def angles(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return reals(*shape, seed=1).cos().to(dtype), reals(*shape, seed=2).sin().to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rotary_mul(dtype: torch.dtype) -> None:
    x = reals(2, 3, 5, 8).to(dtype)
    cos, sin = angles(1, 1, 5, 8, dtype=dtype)
    found = call(OPS, "RotaryMul", {"x": x, "r1": cos, "r2": sin}, {})
    same(found, npu.npu_rotary_mul(x, cos, sin))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", range(4))
def test_rotary_position_embedding(mode: int, dtype: torch.dtype) -> None:
    x = reals(2, 3, 5, 8).to(dtype)
    cos, sin = angles(2, 1, 5, 8, dtype=dtype)
    inputs = {"x": x, "cos": cos, "sin": sin}
    found = call(OPS, "RotaryPositionEmbedding", inputs, {"mode": mode})
    same(found, npu.npu_rotary_mul(x, cos, sin, MODES[mode]))


def test_rotation_by_a_matrix() -> None:
    x, rotate = reals(2, 3, 5, 8), reals(8, 8)
    cos, sin = angles(1, 1, 5, 8, dtype=torch.float32)
    inputs = {"x": x, "cos": cos, "sin": sin, "rotate": rotate}
    found = call(OPS, "RotaryPositionEmbedding", inputs, {"mode": 1})
    same(found, npu.npu_rotary_mul(x, cos, sin, "interleave", rotate))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES[:3])
@pytest.mark.parametrize("layout", [1, 2, 3, 4])
def test_apply_rotary_pos_emb(layout: int, mode: str, dtype: torch.dtype) -> None:
    name = ["BSND", "SBND", "BNSD", "TND"][layout - 1]
    extent = {"B": 2, "S": 5, "T": 7, "D": 8}
    shapes = [[extent.get(dim, heads) for dim in name] for heads in (6, 3, 1)]
    q, k = reals(*shapes[0]).to(dtype), reals(*shapes[1]).to(dtype)
    cos, sin = angles(*shapes[2], dtype=dtype)
    expected = npu.npu_apply_rotary_pos_emb(q, k, cos, sin, name, mode)
    inputs = {"query": q, "key": k, "cos": cos, "sin": sin}
    attributes = {"layout": layout, "rotary_mode": mode}
    same(call(OPS, "ApplyRotaryPosEmb", inputs, attributes), expected)
    same((q, k), expected)


def test_apply_rotary_pos_emb_of_defaults() -> None:
    q, k = reals(2, 5, 6, 8), reals(2, 5, 3, 8)
    cos, sin = angles(2, 5, 1, 8, dtype=torch.float32)
    expected = npu.npu_apply_rotary_pos_emb(q, k, cos, sin)
    inputs = {"query": q, "key": k, "cos": cos, "sin": sin}
    same(call(OPS, "ApplyRotaryPosEmb", inputs, {}), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_interleave_rope(dtype: torch.dtype) -> None:
    x = reals(2, 3, 5, 8).to(dtype)
    cos, sin = angles(2, 1, 5, 8, dtype=dtype)
    found = call(OPS, "InterleaveRope", {"x": x, "cos": cos, "sin": sin}, {})
    same(found, npu.npu_interleave_rope(x, cos, sin))


def test_every_op_is_tested() -> None:
    assert set(OPS.ops) == {
        "RotaryMul",
        "RotaryPositionEmbedding",
        "ApplyRotaryPosEmb",
        "InterleaveRope",
    }
