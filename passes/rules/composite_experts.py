"""Rules of `rolemesh::experts`.

Tokens shard freely, with whole experts. Experts shard by expert: a rank gets the ids of all tokens
and computes the rows of its own experts alone, so that its result is a pending sum; and by their
inner features, which are summed over, unless there is a bias that every rank would add. The
features that the first projection reads stay whole, because of the activation; those that the
second one gives shard.
"""

from __future__ import annotations

from rolemesh.compiler.ir.dialect import EXPERTS
from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder, Select
from rolemesh.passes.rules.arguments import argument
from rolemesh.passes.rules.indexing import table_axes
from rolemesh.passes.rules.npu import operand_names
from rolemesh.passes.rules.registry import LocalCall, LocalForm, LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]

_IDS, _UP = 1, 3
"""Positions of operands, and of arguments: those before them are not optional."""


def experts(call: OpCall) -> Rule:
    """`experts(hidden, ids, weights, up, down, up_bias, down_bias, activation, transposed)`."""
    values = dict(zip(operand_names(call), call.operands, strict=True))
    (tokens, choices), (count, *up), (_, *down) = (
        values[name].shape for name in ("ids", "up", "down")
    )
    transposed = bool(argument(call, 8, "transposed"))
    if transposed:
        up.reverse()
        down.reverse()
    builder = RuleBuilder()
    n, k = builder.factor(tokens), builder.factor(choices, Kind.REPLICATE)
    e = builder.factor(count, Kind.REDUCE)
    h, o = builder.factor(up[1], Kind.REPLICATE), builder.factor(down[0])
    i = builder.factor(down[1], Kind.REPLICATE if "down_bias" in values else Kind.REDUCE)
    parts = builder.factor(up[0] // down[1], Kind.REPLICATE)
    f = i + parts if "even" in str(argument(call, 7, "activation")) else parts + i
    dims = {
        "hidden": [n, h],
        "ids": [n, k],
        "weights": [n, k],
        "up": [e, h, f] if transposed else [e, f, h],
        "down": [e, i, o] if transposed else [e, o, i],
        "up_bias": [e, f],
        "down_bias": [e, o],
    }
    return builder.build(
        [dims[name] for name in values], [[n, o]], select=Select(e[0], operand=_IDS, by="ids")
    )


def experts_local(local: LocalCall) -> LocalForm:
    """`mesh.experts` where the experts are sharded, and the op as it stands elsewhere."""
    axes = table_axes(local, _UP)
    if not axes:
        return local.call.target, local.args, local.kwargs
    size = local.call.operands[_UP].shape[0]
    return EXPERTS, local.args, {**local.kwargs, "size": size, "axes": axes}


RULES: dict[str, RuleFunction] = {"rolemesh::experts": experts}
LOCAL: dict[str, LocalFunction] = {"rolemesh::experts": experts_local}
