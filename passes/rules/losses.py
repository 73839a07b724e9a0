"""Rules of losses that stay one op: those with weights of classes, and those of images.

Classes stay whole, and so do rows that are summed up: a pad would count as one more. Rows of
losses that are not summed shard, and so do those of gradients. Canonicalisation writes plain cross
entropy in ops that shard by anything (`rolemesh.passes.loss_forms`).
"""

from __future__ import annotations

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.arguments import int_argument
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction, replicated_rule

__all__ = ["LOCAL", "RULES"]

_NONE = 0
"""`at::Reduction`; what is left are means and sums."""


def nll_loss_forward(call: OpCall) -> Rule:
    """`nll_loss_forward(x, target, weight, reduction, ignore_index)`, and `nll_loss2d_forward`.

    x is `[N, C, ..]` and the target `[N, ..]`. The results are the loss and the weight of all rows.
    """
    x, _, *weights = call.operands
    reduction = int_argument(call, 3, "reduction", 1)
    if x.ndim < 2:
        return replicated_rule(call)
    builder = RuleBuilder()
    kind = Kind.PASS if reduction == _NONE else Kind.REPLICATE
    rows, classes = builder.dims(_rows(x.shape), kind), builder.factor(x.shape[1], Kind.REPLICATE)
    return builder.build(
        [_logits(rows, classes), rows, *[[classes]] * len(weights)],
        [rows if reduction == _NONE else [], []],
    )


def nll_loss_backward(call: OpCall) -> Rule:
    """`nll_loss_backward(grad, x, target, weight, reduction, ignore_index, total_weight)`."""
    grad, x, _, *weights, _ = call.operands
    if x.ndim < 2:
        return replicated_rule(call)
    builder = RuleBuilder()
    rows = builder.dims(_rows(x.shape))
    classes = builder.factor(x.shape[1], Kind.REPLICATE)
    logits = _logits(rows, classes)
    return builder.build(
        [rows if grad.shape else [], logits, rows, *[[classes]] * len(weights), []],
        [logits],
        linear=[(True, *(False,) * (len(call.operands) - 1))],
    )


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:])


def _logits(rows: list[tuple[int, ...]], classes: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [rows[0], classes, *rows[1:]]


_FORMS = ("nll_loss", "nll_loss2d")
RULES: dict[str, RuleFunction] = {
    **{f"aten::{name}_forward": nll_loss_forward for name in _FORMS},
    **{f"aten::{name}_backward": nll_loss_backward for name in _FORMS},
}
LOCAL: dict[str, LocalFunction] = {}
