"""Gradients of attention: finite differences, and what autograd makes of plain ops."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tests.lowering.composite.test_attention_kernels import (
    GROUPED,
    LATENT,
    NARROW,
    ONE,
    SCALE,
    WIDE,
    Sizes,
    f,
    operands,
)
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.composite import attention_backward
from rolemesh.lowering.composite.attention import attend
from rolemesh.lowering.composite.define import define_composite_ops

define_composite_ops()
DENSE = torch.ops.rolemesh.attention.default


class Options(NamedTuple):
    """What a call has besides queries, keys and values."""

    mask: str = ""
    sinks: bool = False
    softcap: float = 0.0
    tail: int = 0


CASES = [
    (GROUPED, Options()),
    (GROUPED, Options(mask="seen", sinks=True)),
    (NARROW, Options(mask="added", tail=3)),
    (WIDE, Options(mask="seen", softcap=1.5)),
    (ONE, Options(sinks=True, softcap=2.0, tail=2)),
    (LATENT, Options(mask="seen", sinks=True, tail=2)),
]


def call(n: Sizes, options: Options, dtype: torch.dtype) -> tuple[object, ...]:
    """Arguments of the op; with a mask of booleans the second query sees no key."""
    mask = None
    if options.mask:
        mask = f(n.b, 1, n.t, n.s, seed=4).to(dtype)
        if options.mask == "seen":
            mask = mask > -0.7
            mask[:, :, 1] = False
    sinks = f(n.h, seed=5, dtype=dtype) if options.sinks else None
    tails = [f(n.b, h, s, options.tail, seed=6, dtype=dtype) if options.tail else None
             for h, s in ((n.h, n.t), (n.k, n.s))]  # fmt: skip
    return (*operands(n, dtype), mask, SCALE, sinks, options.softcap, *tails)


def differentiable(args: tuple[object, ...]) -> list[Tensor]:
    floats = [x for x in args if isinstance(x, Tensor) and x is not args[3]]
    return [x.requires_grad_() for x in floats]


@pytest.mark.parametrize(("n", "options"), CASES)
def test_finite_differences(n: Sizes, options: Options) -> None:
    small = Sizes(1, n.h, n.k, min(n.t, 3), 4, min(n.d, 3), min(n.v, 2))
    args = call(small, options, torch.float64)

    def function(*given: Tensor) -> Tensor:
        left = iter(given)
        return DENSE(*[next(left) if x is not None and x is not args[3] and isinstance(x, Tensor)
                       else x for x in args])  # fmt: skip

    assert torch.autograd.gradcheck(function, differentiable(args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "options"), CASES)
def test_plain_ops(n: Sizes, options: Options, dtype: torch.dtype) -> None:
    args = call(n, options, dtype)
    wanted = differentiable(args)
    grad = f(n.b, n.h, n.t, n.v, seed=7, dtype=dtype).transpose(1, 2)
    exact = [x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
             for x in args]  # fmt: skip
    leaves = differentiable(tuple(exact))
    plain = attend(*exact).transpose(1, 2)  # type: ignore[arg-type]
    expected = torch.autograd.grad(plain, leaves, grad.double())
    found = torch.autograd.grad(DENSE(*args), wanted, grad)
    with torch.no_grad():
        traced = attention_backward.OP.decomposition(grad, *args)
    assert isinstance(traced, tuple)
    decomposed = [x for x in traced if x.numel()]
    tolerance = 1e-4 if dtype is torch.float32 else 4e-2
    for ours, ats, want in zip(found, decomposed, expected, strict=True):
        scale = float(want.abs().max())
        for x in (ours, ats):
            assert x.dtype is dtype
            torch.testing.assert_close(x.double(), want, rtol=tolerance, atol=tolerance * scale)


def test_arguments_without_a_gradient_are_refused() -> None:
    query, key, value = operands(LATENT)
    mask = torch.zeros(1, 1, LATENT.t, LATENT.s).requires_grad_()
    with pytest.raises(RolemeshError) as raised:
        DENSE(query, key, value, mask, SCALE)
    assert raised.value.code == "RM040"
    assert str(raised.value).startswith(
        "[RM040] rolemesh::attention has no gradient of its argument 'mask'\n"
    )
    with torch.no_grad():
        DENSE(query, key, value, mask, SCALE)
    indices = torch.zeros(LATENT.b, LATENT.t, 2, dtype=torch.int64)
    with pytest.raises(
        RolemeshError, match="sparse_attention has no gradient of its argument 'key'"
    ):
        torch.ops.rolemesh.sparse_attention(
            query, key.requires_grad_(), value, indices, None, SCALE
        )


def test_a_gradient_of_the_gradient_is_refused() -> None:
    query, key, value = (x.requires_grad_() for x in operands(ONE))
    found = DENSE(query, key, value, None, SCALE).sum()
    with pytest.raises(RolemeshError, match="attention_backward has no gradient"):
        torch.autograd.grad(found, query, create_graph=True)
