"""Rules of `rolemesh::rms_norm` and `rolemesh::rotary`: row by row, the last dim whole.

The mean of squares is over all of the last dim, and each element of a pair is computed from both.
Rotation is linear in what is rotated.
"""

from __future__ import annotations

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.npu import broadcast_dims
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]


def rms_norm(call: OpCall) -> Rule:
    """`rms_norm(x, weight, eps, rounded)`."""
    x = call.operands[0]
    builder = RuleBuilder()
    dims = [*builder.dims(x.shape[:-1]), builder.factor(x.shape[-1], Kind.REPLICATE)]
    return builder.build([dims, dims[-1:]], [dims])


def rotary(call: OpCall) -> Rule:
    """`rotary(x, cos, sin, interleaved)`."""
    x, *angles = call.operands
    builder = RuleBuilder()
    lead = builder.dims(x.shape[:-1])
    dims = [*lead, builder.factor(x.shape[-1], Kind.REPLICATE)]
    operands = [dims]
    for angle in angles:
        skipped = x.ndim - angle.ndim
        over = broadcast_dims(lead[skipped:], angle.shape[:-1], x.shape[skipped:-1])
        operands.append([*over, builder.factor(angle.shape[-1], Kind.REPLICATE)])
    return builder.build(operands, [dims], linear=((True, False, False),))


RULES: dict[str, RuleFunction] = {"rolemesh::rms_norm": rms_norm, "rolemesh::rotary": rotary}
LOCAL: dict[str, LocalFunction] = {}
