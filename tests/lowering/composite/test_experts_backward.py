"""Gradients of experts: finite differences, modules of `transformers`, and parts of the tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.lowering.composite.test_experts import E, H, K, f, module, routes, tables

from rolemesh.compiler.integrate import integrate
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.experts_backward import OP, experts_backward_of_rank
from rolemesh.lowering.composite.gate import SWIGLU

PAIRS = "mul(add(odd, 1), sigmoid(even))"


@pytest.fixture(scope="module", autouse=True)
def _integrated() -> None:
    integrate("transformers")
    define_composite_ops()


def some_ids() -> Tensor:
    """Routes of which two lead to no expert, and none to the last two."""
    return torch.tensor([[0, 3], [1, -1], [5, 2], [2, 0], [1, 2]])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [SWIGLU, PAIRS])
def test_finite_differences(activation: str, bias: bool, transposed: bool) -> None:
    up, down = f(5, 6, 4), f(5, 2, 3)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    given = [f(5, 4), f(5, 2), up, down, *([f(5, 6), f(5, 2)] if bias else [])]
    given = [x.double().requires_grad_() for x in given]
    ids = some_ids()

    def experts(
        hidden: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Tensor:
        args = (hidden, ids, weights, up, down, up_bias, down_bias, activation, transposed)
        return torch.ops.rolemesh.experts(*args)

    assert torch.autograd.gradcheck(experts, given)
    with torch.no_grad():
        biases = given[4:] if bias else [None, None]
        args = (f(5, 2).double(), given[0], ids, *given[1:4], *biases, activation, transposed)
        found, plain = OP.kernel(*args), OP.decomposition(*args)
    assert isinstance(found, tuple)
    assert isinstance(plain, tuple)
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "tokens", "inner"), [("mixtral", 33, 16), ("gpt_oss", 5, 10)])
def test_modules_of_transformers(kind: str, tokens: int, inner: int, dtype: torch.dtype) -> None:
    """Tables whose rows have the alignment of a grouped product, and others."""
    layer = module(kind, dtype, inner).requires_grad_()
    hidden = f(tokens, H, dtype=dtype)
    weights = f(tokens, K, dtype=dtype).softmax(-1)
    grad = f(H, tokens, dtype=dtype).t()

    def gradients(implementation: str) -> tuple[Tensor, ...]:
        layer.config._experts_implementation = implementation  # type: ignore[union-attr]
        wide = next(layer.parameters()).dtype
        x, w = (v.detach().to(wide).requires_grad_() for v in (hidden, weights))
        wanted = (x, w, *layer.parameters())
        return torch.autograd.grad(layer(x, routes(tokens), w), wanted, grad.to(wide))

    found = gradients("rolemesh")
    layer.float()
    exact = gradients("eager")
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype is dtype
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("parts", [2, 4, 9])
def test_ranks_add_up(parts: int) -> None:
    """Pads of the tables are NaN, and have no part in any gradient."""
    grad, hidden, ids, weights = f(5, H), f(H, 5).t(), routes(5), f(5, K)
    ids[1, 0], ids[2, 1] = E, -1
    whole = torch.ops.rolemesh.experts_backward(
        grad, hidden, ids, weights, *tables(), None, None, SWIGLU, False
    )
    units = -(-E // parts)
    sums = [torch.zeros_like(x) for x in whole[:2]]
    chunks: list[list[Tensor]] = [[], []]
    for index in range(parts):
        held = []
        for table in tables():
            padded = torch.full((units * parts, *table.shape[1:]), float("nan"))
            padded[:E] = table
            held.append(padded[index * units : (index + 1) * units])
        found = experts_backward_of_rank(
            grad, hidden, ids, weights, *held, None, None, SWIGLU, False,
            size=E, parts=parts, index=index,
        )  # fmt: skip
        for total, x in zip(sums, found[:2], strict=True):
            total += x
        for chunk, x in zip(chunks, found[2:4], strict=True):
            chunk.append(x)
    together = [torch.cat(chunk)[:E] for chunk in chunks]
    for ours, want in zip([*sums, *together], whole[:4], strict=True):
        torch.testing.assert_close(ours, want)
