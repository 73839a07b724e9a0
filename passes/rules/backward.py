"""Rules of the gradients of norms and of elementwise functions with a state of their own.

A norm's gradient goes row by row; those of its weight and bias are sums over the rows, so that a
shard of the rows gives a shard of the one and summands of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.arguments import argument, dim_argument
from rolemesh.passes.rules.npu import operand_names
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]


def norm_backward(call: OpCall) -> Rule:
    """`native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, output_mask)`.

    Also `_fused_rms_norm_backward`, without a mean and a bias. Results that the mask leaves out are
    no tensors, which count as tensors without elements.
    """
    x = call.operands[1]
    builder = RuleBuilder()
    first = x.ndim - len(cast(Sequence[int], argument(call, 2, "normalized_shape")))
    lead = builder.dims(x.shape[:first], Kind.REDUCE)
    normed = builder.dims(x.shape[first:], Kind.REPLICATE)
    row, statistic = [*lead, *normed], [*lead, *[()] * len(normed)]
    forms = {"grad_out": row, "input": row, "mean": statistic, "rstd": statistic}
    forms |= {"weight": normed, "bias": normed}
    rows, *shared = call.results
    results = [row if rows.shape == x.shape else builder.dims(rows.shape)]
    for found in shared:
        given = found.shape == x.shape[first:]
        results.append(normed if given else builder.dims(found.shape, Kind.REPLICATE))
    return builder.build([forms[name] for name in operand_names(call)], results)


def glu_backward(call: OpCall) -> Rule:
    """`glu_backward(grad, x, dim)`: the dim of x is both halves of that of the gradient."""
    grad, x = call.operands
    builder = RuleBuilder()
    dim = dim_argument(call, 2, x.ndim, -1)
    halves = builder.factor(2, Kind.REPLICATE)
    out = builder.dims(grad.shape)
    both = [*out[:dim], halves + out[dim], *out[dim + 1 :]]
    return builder.build([out, both], [both], linear=[(True, False)])


_NORMS = ("native_layer_norm_backward", "_fused_rms_norm_backward")
RULES: dict[str, RuleFunction] = {
    **{f"aten::{name}": norm_backward for name in _NORMS},
    "aten::glu_backward": glu_backward,
}
LOCAL: dict[str, LocalFunction] = {}
