"""Experts as one op: the rule checked on all choices, and its form."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call

from rolemesh.compiler.ir.rule import Kind
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.gate import SWIGLU
from rolemesh.passes.rules import composite_experts
from rolemesh.passes.rules.registry import Rules

RULES = Rules((composite_experts.RULES,), (composite_experts.LOCAL,))
PAIRS = "mul(add(odd, 1), sigmoid(even))"
N, K, E, H, INNER, OUT = 5, 2, 7, 6, 4, 10
IDS = torch.tensor([[0, 3], [6, -1], [7, 2], [2, 0], [6, 3]])  # none to 1, 4 and 5; two to none


@pytest.fixture(scope="module", autouse=True)
def _defined() -> None:
    define_composite_ops()


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def given(activation: str, *, transposed: bool, bias: bool, width: int = 2) -> tuple[object, ...]:
    up, down = f(E, width * INNER, H), f(E, OUT, INNER)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    biases = (f(E, width * INNER), f(E, OUT)) if bias else (None, None)
    return (f(N, H), IDS, f(N, K), up, down, *biases, activation, transposed)


@pytest.mark.parametrize(
    ("activation", "transposed", "bias", "width", "tables"),
    [
        (SWIGLU, False, False, 2, "e+ (f! g+) c!, e+ b+ g+"),
        (PAIRS, True, False, 2, "e+ c! (f+ g!), e+ f+ b+"),
        ("square(relu(rows))", False, False, 1, "e+ (f! g+) c!, e+ b+ g+"),
        (SWIGLU, False, True, 2, "e+ (f! g!) c!, e+ b+ g!, e+ (f! g!), e+ b+"),
    ],
)
def test_all_choices_of_the_gradient(
    activation: str, transposed: bool, bias: bool, width: int, tables: str
) -> None:
    none = "" if bias else ", h!, i!"
    check_op(
        RULES,
        torch.ops.rolemesh.experts_backward.default,
        (f(N, OUT), *given(activation, transposed=transposed, bias=bias, width=width)),
        expect=f"a+ b+, a+ c!, a+ d!, a+ d!, {tables} -> a+ c!, a+ d!, {tables}{none}"
        " | select e by ids 2",
        ranks=(2, 3),
    )


@pytest.mark.parametrize(
    ("activation", "transposed", "bias", "width", "expect"),
    [
        (SWIGLU, False, False, 2, "a b!, a c!, a c!, d+ (e! f+) b!, d+ g f+ -> a g"),
        (SWIGLU, True, False, 2, "a b!, a c!, a c!, d+ b! (e! f+), d+ f+ g -> a g"),
        (PAIRS, False, False, 2, "a b!, a c!, a c!, d+ (e+ f!) b!, d+ g e+ -> a g"),
        ("square(relu(rows))", False, False, 1, "a b!, a c!, a c!, d+ (e! f+) b!, d+ g f+ -> a g"),
        (
            SWIGLU,
            False,
            True,
            2,
            "a b!, a c!, a c!, d+ (e! f!) b!, d+ g f!, d+ (e! f!), d+ g -> a g",
        ),
    ],
)
def test_all_choices(
    activation: str, transposed: bool, bias: bool, width: int, expect: str
) -> None:
    check_op(
        RULES,
        torch.ops.rolemesh.experts.default,
        given(activation, transposed=transposed, bias=bias, width=width),
        expect=f"{expect} | select d by ids 1",
    )


def test_a_bias_that_every_rank_would_add_keeps_the_inner_features_whole() -> None:
    target = torch.ops.rolemesh.experts.default
    kinds = []
    for bias in (False, True):
        call, _ = make_call(target, given(SWIGLU, transposed=False, bias=bias))
        rule = RULES.rule(call)
        (inner,) = rule.operands[4][2]
        kinds.append(rule.kinds[inner])
    assert kinds == [Kind.REDUCE, Kind.REPLICATE]
