"""Losses that stay one op: their rules as a table, checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op
from tests.passes.rules.samples import f, i

from rolemesh.passes.rules import losses
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((losses.RULES,), (losses.LOCAL,))
X, TARGET, WEIGHT = f(5, 4), i(5), f(4) + i(4)
IMAGES, TARGETS = f(5, 4, 3, 2), i(5, 3, 2)
ONE = torch.tensor(1.5)

CASES = [
    (aten.nll_loss_forward.default, (X, TARGET, None, 0, 2), "a b!, a -> a, ."),
    (aten.nll_loss_forward.default, (X, TARGET, WEIGHT, 0, 2), "a b!, a, b! -> a, ."),
    (aten.nll_loss_forward.default, (X, TARGET, WEIGHT, 1, 2), "a! b!, a!, b! -> ., ."),
    (aten.nll_loss_forward.default, (X, TARGET, None, 2, 2), "a! b!, a! -> ., ."),
    (aten.nll_loss_forward.default, (f(4), i(4)[1], None, 1, -1), "a!, . -> ., ."),
    (aten.nll_loss2d_forward.default, (IMAGES, TARGETS, WEIGHT, 0, 2),
     "a b! c d, a c d, b! -> a c d, ."),
    (aten.nll_loss_backward.default, (f(5), X, TARGET, WEIGHT, 0, 2, ONE),
     "a, a b!, a, b!, . -> a b! | linear 10000"),
    (aten.nll_loss_backward.default, (ONE, X, TARGET, None, 1, 2, ONE),
     "., a b!, a, . -> a b! | linear 1000"),
    (aten.nll_loss2d_backward.default, (ONE, IMAGES, TARGETS, WEIGHT, 1, 2, ONE),
     "., a b! c d, a c d, b!, . -> a b! c d | linear 10000"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "expect"), CASES, ids=lambda v: str(v)[:40])
def test_losses(target: torch._ops.OpOverload, args: tuple[object, ...], expect: str) -> None:
    check_op(RULES, target, args, expect=expect)
