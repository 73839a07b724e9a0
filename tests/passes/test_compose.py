"""Compose: patterns become composite ops, in models that use such ops already."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.passes.test_canonicalise import listing
from torch import Tensor

from rolemesh.compiler.api import lockstep, shard
from rolemesh.compiler.capture.entry import run_graph
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.program import Program
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.gate import SWIGLU
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.compose import Compose, uses_composite_ops

BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def _defined() -> None:
    define_composite_ops()


def f(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
    return weight * wide.to(x.dtype)


def wide_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3) * weight).to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def turned_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def composed(function: Callable[..., object], *args: Tensor) -> Program:
    """A function's program, composed, which gives the same values and is as it was before."""
    before = Canonicalise().apply(trace(function, *args).program)
    text = listing(before)
    after = Compose().apply(before)
    assert listing(before) == text
    assert after.history == (*before.history, "compose")
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    results = (run_graph(program.graph, args) for program in (after, before))
    for found, want in zip(*results, strict=True):
        assert isinstance(found, Tensor)
        assert isinstance(want, Tensor)
        assert found.dtype is want.dtype
        tolerance = 1e-5 if want.dtype is torch.float32 else 2e-2
        torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)
    return after


def ops(program: Program) -> list[str]:
    return [str(node.target).removeprefix("rolemesh.") for node in program.ops]


@pytest.mark.parametrize(
    ("function", "dtype", "rounded"),
    [
        (norm, torch.float32, False),
        (norm, BF16, True),
        (wide_norm, torch.float32, False),
        (wide_norm, BF16, False),
    ],
)
def test_norms(function: Callable[..., Tensor], dtype: torch.dtype, rounded: bool) -> None:
    (node,) = composed(function, f(3, 5, 6, dtype=dtype), f(6, dtype=dtype)).ops
    assert node.target is torch.ops.rolemesh.rms_norm.default
    assert node.args[2:] == (1e-3, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(
    ("function", "width", "interleaved"), [(turned, 8, False), (turned_pairs, 4, True)]
)
def test_rotations(
    function: Callable[..., Tensor], width: int, interleaved: bool, dtype: torch.dtype
) -> None:
    given = (f(2, 3, 5, 8), f(2, 1, 5, width), f(2, 1, 5, width))
    (node,) = composed(function, *(x.to(dtype) for x in given)).ops
    assert node.target is torch.ops.rolemesh.rotary.default
    assert node.args[3] is interleaved


def test_the_op_has_the_name_and_the_place_of_the_last_node() -> None:
    traced = trace(norm, f(3, 6), f(6))
    before = Canonicalise().apply(traced.program)
    (node,) = Compose().apply(before).ops
    *_, last = before.ops
    assert node.name == last.name
    assert node.meta == last.meta


def test_an_inner_value_that_is_needed_elsewhere_keeps_the_pattern() -> None:
    def leaking(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
        return weight * (x * scale), scale + 1

    assert "rms_norm.default" not in ops(composed(leaking, f(3, 6), f(6)))


class Layer(torch.nn.Module):
    """A norm before experts."""

    def __init__(self, composite: bool) -> None:
        super().__init__()
        self.composite = composite
        tables = {"weight": f(6), "up": f(5, 8, 6), "down": f(5, 6, 4)}
        for name, value in tables.items():
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        normed = norm(x, self.weight)
        if not self.composite:
            return normed
        given = (normed, ids, torch.ones_like(ids, dtype=x.dtype), self.up, self.down)
        return torch.ops.rolemesh.experts(*given, None, None, SWIGLU, False)


@pytest.mark.parametrize("composite", [False, True])
def test_models_without_composite_ops_keep_their_ops(composite: bool) -> None:
    layer, x, ids = Layer(composite), f(7, 6), torch.arange(14).reshape(7, 2) % 5
    found = trace(layer, x, ids)
    assert uses_composite_ops(found.program) is composite
    plain, better = (
        shard(found, {"tp": 3}, annotations={}, optimise=optimise) for optimise in (False, True)
    )
    assert "rms_norm.default" not in ops(plain.program)
    assert ("rms_norm.default" in ops(better.program)) is composite
    for sharded in (plain, better):
        torch.testing.assert_close(lockstep(sharded, x, ids), layer(x, ids))
