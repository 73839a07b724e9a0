"""Rules of `rolemesh::experts` and of its gradient.

Tokens shard freely, with whole experts. Experts shard by expert: a rank gets the ids of all tokens
and computes the rows of its own experts alone, so that its result is a pending sum; and by their
inner features, which are summed over, unless there is a bias that every rank would add. The
features that the first projection reads stay whole, because of the activation; those that the
second one gives shard.

In the gradient, which is linear from the gate on, every such split gives its part of the results
that have the dim, and summands of the others: those of tables by tokens, those of tokens and
weights by experts and by features.
"""

from __future__ import annotations

from rolemesh.compiler.ir.dialect import EXPERTS, EXPERTS_BACKWARD, MeshOp
from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder, Select
from rolemesh.passes.rules.arguments import argument
from rolemesh.passes.rules.indexing import table_axes
from rolemesh.passes.rules.npu import operand_names
from rolemesh.passes.rules.registry import LocalCall, LocalForm, LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]

_IDS, _UP = 1, 3
"""Positions of operands, and of arguments: those before them are not optional. In the gradient,
that of the result comes before them."""

_Dims = list[tuple[int, ...]]


def experts(call: OpCall) -> Rule:
    """`experts(hidden, ids, weights, up, down, up_bias, down_bias, activation, transposed)`."""
    builder = RuleBuilder()
    dims, result, e = _dims(builder, call, Kind.PASS, 0)
    operands = [dims[name] for name in operand_names(call)]
    return builder.build(operands, [result], select=Select(e, operand=_IDS, by="ids"))


def experts_backward(call: OpCall) -> Rule:
    """`experts_backward(grad, hidden, ids, weights, up, down, ..)`, arguments as of `experts`."""
    builder = RuleBuilder()
    dims, result, e = _dims(builder, call, Kind.REDUCE, 1)
    dims["grad"] = result
    names = operand_names(call)
    order = ("hidden", "weights", "up", "down", "up_bias", "down_bias")
    results = [dims[n] if n in names else [builder.factor(0, Kind.REPLICATE)] for n in order]
    select = Select(e, operand=_IDS + 1, by="ids")
    return builder.build([dims[name] for name in names], results, select=select)


def _dims(
    builder: RuleBuilder, call: OpCall, tokens_and_outputs: Kind, first: int
) -> tuple[dict[str, _Dims], _Dims, int]:
    """Dims of each operand by name, those of the result of `experts`, and the factor of experts.

    Args:
        builder: Numbers the factors.
        call: The call.
        tokens_and_outputs: What tokens, and the features that the second projection gives, allow.
        first: How many arguments come before those of `experts`.
    """
    values = dict(zip(operand_names(call), call.operands, strict=True))
    (tokens, choices), (count, *up), (_, *down) = (
        values[name].shape for name in ("ids", "up", "down")
    )
    transposed = bool(argument(call, first + 8, "transposed"))
    if transposed:
        up.reverse()
        down.reverse()
    n, k = builder.factor(tokens, tokens_and_outputs), builder.factor(choices, Kind.REPLICATE)
    e = builder.factor(count, Kind.REDUCE)
    h = builder.factor(up[1], Kind.REPLICATE)
    o = builder.factor(down[0], tokens_and_outputs)
    i = builder.factor(down[1], Kind.REPLICATE if "down_bias" in values else Kind.REDUCE)
    parts = builder.factor(up[0] // down[1], Kind.REPLICATE)
    f = i + parts if "even" in str(argument(call, first + 7, "activation")) else parts + i
    dims = {
        "hidden": [n, h],
        "ids": [n, k],
        "weights": [n, k],
        "up": [e, h, f] if transposed else [e, f, h],
        "down": [e, i, o] if transposed else [e, o, i],
        "up_bias": [e, f],
        "down_bias": [e, o],
    }
    return dims, [n, o], e[0]


def _local(op: MeshOp, up: int) -> LocalFunction:
    def local_experts(local: LocalCall) -> LocalForm:
        """The mesh op where the experts are sharded, and the op as it stands elsewhere."""
        axes = table_axes(local, local.operand_layouts[up])
        if not axes:
            return local.call.target, local.args, local.kwargs
        size = local.call.operands[up].shape[0]
        return op, local.args, {**local.kwargs, "size": size, "axes": axes}

    return local_experts


RULES: dict[str, RuleFunction] = {
    "rolemesh::experts": experts,
    "rolemesh::experts_backward": experts_backward,
}
LOCAL: dict[str, LocalFunction] = {
    "rolemesh::experts": _local(EXPERTS, _UP),
    "rolemesh::experts_backward": _local(EXPERTS_BACKWARD, _UP + 1),
}
