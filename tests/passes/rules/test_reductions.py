"""Reductions, scans, softmax, norms and sorts: their rules as a table, checked on all choices."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.passes.rules.harness import check_choice, check_op

from rolemesh.compiler.ir.rule import Split
from rolemesh.passes.rules import reductions
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
SEEDS = itertools.count()  # no two operands alike: x - x tells nothing
RULES = Rules((reductions.RULES,), (reductions.LOCAL,))


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(SEEDS))).to(dtype)


def h(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def i(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(next(SEEDS)))


def last(*shape: int) -> torch.Tensor:
    """Only the last element is true, so that no other chunk can tell the result."""
    whole = torch.zeros(shape, dtype=torch.bool)
    whole.view(-1)[-1] = True
    return whole


CASES = [
    (aten.sum.default, (f(5, 3),), "a+ b+ -> . | linear 1"),
    (aten.sum.default, (i(5, 3) > 0,), "a+ b+ -> . | linear 1"),
    (aten.sum.dim_IntList, (f(5, 3), [1]), "a b+ -> a | linear 1"),
    (aten.sum.dim_IntList, (h(5, 6, 7), [0, -1], True), "a+ b c+ -> 1 b 1 | linear 1"),
    (aten.sum.dim_IntList, (i(5, 3), [0]), "a+ b -> b | linear 1"),
    (aten.sum.dim_IntList, (f(5, 3), None), "a+ b+ -> . | linear 1"),
    (aten.sum.dim_IntList, (f(5, 3), []), "a+ b+ -> . | linear 1"),
    (aten.mean.dim, (f(5, 12), [-1], True), "a b+ -> a 1 | avg | linear 1"),
    (aten.mean.dim, (h(4, 5), [0]), "a+ b -> b | avg | linear 1"),
    (aten.mean.default, (f(4, 6),), "a+ b+ -> . | avg | linear 1"),
    (aten.amax.default, (f(5, 3), [0]), "a+ b -> b | max"),
    (aten.amin.default, (h(5, 3), [0, 1], True), "a+ b+ -> 1 1 | min"),
    (aten.amax.default, (torch.arange(35).view(5, 7),), "a+ b+ -> . | max"),
    (aten.max.default, (f(5, 3),), "a+ b+ -> . | max"),
    (aten.min.default, (f(5, 3),), "a+ b+ -> . | min"),
    (aten.max.dim, (f(5, 3), 1), "a b! -> a, a"),
    (aten.min.dim, (f(5, 3), 0, True), "a! b -> 1 b, 1 b"),
    (aten.median.dim, (f(5, 3), -1), "a b! -> a, a"),
    (aten.argmax.default, (f(5, 3), -1), "a b! -> a"),
    (aten.argmax.default, (f(5, 3),), "a! b! -> ."),
    (aten.argmin.default, (f(5, 3), 0, True), "a! b -> 1 b"),
    (aten.any.default, (last(5, 3),), "a! b! -> ."),
    (aten.any.dim, (last(5, 3), 1), "a b! -> a"),
    (aten.any.dims, (last(5, 3), [0]), "a! b -> b"),
    (aten.all.dim, (~last(5, 3), 0, True), "a! b -> 1 b"),
    (aten.all.default, (~last(5, 3),), "a! b! -> ."),
    (aten.prod.default, (f(5, 3),), "a! b! -> ."),
    (aten.prod.dim_int, (f(5, 3), 1), "a b! -> a"),
    (aten.logsumexp.default, (f(5, 3), [1], True), "a b! -> a 1"),
    (aten.var.correction, (f(5, 3), [1]), "a b! -> a"),
    (aten.std.correction, (f(5, 3), [0]), "a! b -> b"),
    (aten.var.dim, (f(5, 3), [0]), "a! b -> b"),
    (aten.var_mean.correction, (f(5, 3), [-1]), "a b! -> a, a"),
    (aten.linalg_vector_norm.default, (f(5, 3), 2, [1], True), "a b! -> a 1"),
    (aten.linalg_vector_norm.default, (f(5, 3),), "a! b! -> ."),
    (aten.norm.ScalarOpt_dim, (f(5, 3), 2, [1]), "a b! -> a"),
    (aten.norm.Scalar, (f(5, 3),), "a! b! -> ."),
    (aten.cumsum.default, (f(5, 3), 1), "a b! -> a b! | linear 1"),
    (aten.cumsum.default, (i(5, 3), 0), "a! b -> a! b | linear 1"),
    (aten.cumprod.default, (f(5, 3), -1), "a b! -> a b!"),
    (aten.cummax.default, (f(5, 3), 0), "a! b -> a! b, a! b"),
    (aten.logcumsumexp.default, (f(5, 3), 0), "a! b -> a! b"),
    (aten._softmax.default, (f(5, 3, 7), -1, False), "a b c! -> a b c!"),
    (aten._softmax.default, (h(5, 3), 0, False), "a! b -> a! b"),
    (aten._safe_softmax.default, (f(5, 3), 1), "a b! -> a b!"),
    (aten._log_softmax.default, (f(5, 3), 1, False), "a b! -> a b!"),
    (aten.softmax.int, (f(5, 3), 1, torch.bfloat16), "a b! -> a b!"),
    (aten.log_softmax.int, (f(5, 3), 1), "a b! -> a b!"),
    (
        aten._softmax_backward_data.default,
        (f(5, 3), f(5, 3).softmax(1), 1, torch.float32),
        "a b!, a b! -> a b! | linear 10",
    ),
    (
        aten._log_softmax_backward_data.default,
        (f(5, 3), f(5, 3).log_softmax(1), 1, torch.float32),
        "a b!, a b! -> a b! | linear 10",
    ),
    (aten.topk.default, (f(5, 9), 3), "a b~ -> a c~, a c~"),
    (aten.topk.default, (f(5, 4), 4, 1), "a b~ -> a b~, a b~"),
    (aten.sort.default, (f(5, 9),), "a b~ -> a b~, a b~"),
    (aten.sort.default, (f(5, 9), 0, True), "a~ b -> a~ b, a~ b"),
    (aten.argsort.default, (f(5, 9), 0), "a~ b -> a~ b"),
    (
        aten.native_layer_norm.default,
        (f(5, 6, 7), [7], f(7), f(7), 1e-5),
        "a b c!, c!, c! -> a b c!, a b 1, a b 1",
    ),
    (
        aten.native_layer_norm.default,
        (h(5, 6, 7), [6, 7], None, None, 1e-5),
        "a b! c! -> a b! c!, a 1 1, a 1 1",
    ),
    (aten._fused_rms_norm.default, (f(5, 7), [7], f(7), 1e-6), "a b!, b! -> a b!, a 1"),
    (aten.rms_norm.default, (f(5, 7), [7], f(7)), "a b!, b! -> a b!"),
    (
        aten.native_group_norm.default,
        (f(5, 6, 4), f(6), f(6), 5, 6, 4, 3, 1e-5),
        "a b! c!, b!, b! -> a b! c!, a d!, a d!",
    ),
    (aten.histc.default, (f(5), 4, -1, 1), "a! -> b!"),
    (aten.bincount.default, (i(7).abs(),), "a! -> b!"),
    (aten.sum.dim_IntList, (f(), [0]), ". -> . | linear 1"),
    (aten.cumsum.default, (f(), 0), ". -> . | linear 1"),
]


@pytest.mark.parametrize(("target", "args", "text"), CASES, ids=lambda v: str(v)[:40])
def test_rule(target: torch._ops.OpOverload, args: tuple[object, ...], text: str) -> None:
    assert check_op(RULES, target, args, expect=text) > 0


def test_stable_sort_takes_its_dim_by_name() -> None:
    kwargs: dict[str, object] = {"stable": True, "dim": 0}
    check_op(RULES, aten.sort.stable, (i(9, 5),), kwargs, expect="a~ b -> a~ b, a~ b")
    kwargs = {"stable": True}
    check_op(RULES, aten.sort.stable, (i(9, 5),), kwargs, expect="a b~ -> a b~, a b~")


def test_an_uneven_average_would_be_wrong() -> None:
    """Why the core refuses to split the dim of a mean unevenly."""
    args = (f(5, 3), [0])
    with pytest.raises(AssertionError):
        check_choice(RULES, aten.mean.dim, args, None, Split(0, 1, 5), 2)


def test_maxima_of_integers_mask_their_pads() -> None:
    x = -torch.arange(1, 6)
    check_op(RULES, aten.amax.default, (x, [0]), expect="a+ -> . | max")
