"""Gradients of norms and gates: their rules as a table, checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op
from tests.passes.rules.rule_line import rule_line
from tests.passes.rules.samples import f

from rolemesh.compiler.ir.placement import REPLICATE, Partial, Shard
from rolemesh.compiler.ir.rule import OpCall, Split
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules import backward, pointwise
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((backward.RULES, pointwise.RULES), (backward.LOCAL,))
X, GRAD = f(3, 5, 8) * f(8), f(3, 5, 8) + f(5, 8)
MEAN, SCALE, WEIGHT = f(3, 5, 1), f(3, 5, 1) + 1, f(8)
half = torch.Tensor.bfloat16
NORM = "a+ b+ c!, a+ b+ c!, a+ b+ 1, a+ b+ 1, c!, c! -> a+ b+ c!, c!, c!"
GATE = "a (d! b) c"

CASES = [
    (aten.native_layer_norm_backward.default,
     (GRAD, X, [8], MEAN, SCALE, WEIGHT, WEIGHT, [True, True, True]), NORM),
    (aten.native_layer_norm_backward.default,
     (*map(half, (f(3, 5, 8), X)), [8], *map(half, (MEAN, SCALE, WEIGHT)), None,
      [True, True, False]),
     "a+ b+ c!, a+ b+ c!, a+ b+ 1, a+ b+ 1, c! -> a+ b+ c!, c!"),
    (aten.native_layer_norm_backward.default,
     (f(3, 5, 8), X, [5, 8], f(3, 1, 1), f(3, 1, 1) + 1, None, None, [True, False, False]),
     "a+ b! c!, a+ b! c!, a+ 1 1, a+ 1 1 -> a+ b! c!"),
    (aten.glu_backward.default, (f(3, 5, 4), f(3, 10, 4), 1),
     f"a b c, {GATE} -> {GATE} | linear 10"),
    (aten.native_dropout_backward.default, (X, X > 0.5, 2.0), "a b c, a b c -> a b c | linear 10"),
    (aten.mish_backward.default, (X, GRAD), "a b c, a b c -> a b c | linear 10"),
    (aten.hardswish_backward.default, (X, GRAD), "a b c, a b c -> a b c | linear 10"),
    (aten.hardsigmoid_backward.default, (X, GRAD), "a b c, a b c -> a b c | linear 10"),
    (aten.hardshrink_backward.default, (X, GRAD, 0.5), "a b c, a b c -> a b c | linear 10"),
    (aten.softshrink_backward.default, (X, GRAD, 0.5), "a b c, a b c -> a b c | linear 10"),
    (aten.logit_backward.default, (X, f(3, 5, 8) / 2, 0.1), "a b c, a b c -> a b c | linear 10"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "expect"), CASES, ids=lambda v: str(v)[:40])
def test_rule(target: torch._ops.OpOverload, args: tuple[object, ...], expect: str) -> None:
    check_op(RULES, target, args, expect=expect)


def test_a_shard_of_rows_leaves_gradients_of_weights_partial() -> None:
    x, weight, scale = (TensorType(shape, torch.float32) for shape in ((3, 5, 8), (8,), (3, 5, 1)))
    nothing = TensorType((0,), torch.uint8)  # what a result that was not asked for counts as
    rule = RULES.rule(
        OpCall(
            aten._fused_rms_norm_backward.default,
            (x, x, [8], scale, weight, [True, True]),
            {},
            (x, x, scale, weight),
            (x, weight),
        )
    )
    assert rule_line(rule) == "a+ b+ c!, a+ b+ c!, a+ b+ 1, c! -> a+ b+ c!, c!"
    rows = Split(0, 1, 3)
    assert rule.operand_placement(3, rows) == REPLICATE
    assert [rule.result_placement(i, rows) for i in (0, 1)] == [Shard(0, 1, 3), Partial()]
    call = OpCall(
        aten._fused_rms_norm_backward.default,
        (x, x, [8], scale, None, [True, False]),
        {},
        (x, x, scale),
        (x, nothing),
    )
    assert rule_line(RULES.rule(call)) == "a+ b+ c!, a+ b+ c!, a+ b+ 1 -> a+ b+ c!, d!"
