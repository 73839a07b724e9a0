"""Rules of `rolemesh::attention`, its gradient, and `rolemesh::sparse_attention`.

Batch, heads, query rows and the dim of values shard; keys and what a product is over stay whole.
With grouped queries the head dim of queries is `[key heads, group]`, so that a shard of the key
heads takes their queries along; one key head for all is whole on every rank. What a query names
goes with the query. The result is linear in the values.

In the gradient the features of values stay whole as well, since the gradient of the weights is a
sum over them. A shard of batch or query rows gives its part of what has such a dim, and a summand
of the rest.
"""

from __future__ import annotations

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.npu import broadcast_dims, operand_names
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]

_Dims = list[tuple[int, ...]]


def attention(call: OpCall) -> Rule:
    """`attention(query, key, value, mask, scale, ...)`, and with `indices` before the mask."""
    builder = RuleBuilder()
    dims, result = _dims(builder, call, Kind.PASS)
    names = operand_names(call)
    linear = tuple(name == "value" for name in names)
    return builder.build([dims[name] for name in names], [result], linear=[linear])


def attention_backward(call: OpCall) -> Rule:
    """`attention_backward(grad, query, key, value, mask, scale, ...)`."""
    builder = RuleBuilder()
    dims, result = _dims(builder, call, Kind.REDUCE)
    dims["grad"] = result
    names = operand_names(call)
    order = ("query", "key", "value", "sinks", "query_tail", "key_tail")
    results = [dims[n] if n in names else [builder.factor(0, Kind.REPLICATE)] for n in order]
    return builder.build([dims[name] for name in names], results)


def _dims(builder: RuleBuilder, call: OpCall, rows: Kind) -> tuple[dict[str, _Dims], _Dims]:
    """Dims of each operand by name, and of the result of attention.

    Args:
        builder: Numbers the factors.
        call: The call.
        rows: What batch and query rows allow; in the gradient, where it is REDUCE, so do query
            heads that share a key head, and features of values stay whole.
    """
    values = dict(zip(operand_names(call), call.operands, strict=True))
    query, key, value = (values[name].shape for name in ("query", "key", "value"))
    b, s = builder.factor(query[0], rows), builder.factor(query[2], rows)
    shared = builder.factor(key[1]) if key[1] > 1 else ()
    heads = shared + builder.factor(query[1] // key[1], rows) if query[1] > key[1] else shared
    t, d = (builder.factor(extent, Kind.REPLICATE) for extent in key[2:])
    v = builder.factor(value[3], Kind.PASS if rows is Kind.PASS else Kind.REPLICATE)
    dims: dict[str, _Dims] = {
        "query": [b, heads, s, d],
        "key": [b, shared, t, d],
        "value": [b, shared, t, v],
        "sinks": [heads],
    }
    if "key_tail" in values:
        tail = builder.factor(values["key_tail"].shape[3], Kind.REPLICATE)
        dims |= {"query_tail": [b, heads, s, tail], "key_tail": [b, shared, t, tail]}
    if "indices" in values:
        named = values["indices"].shape[2]
        dims["indices"] = [b, s, builder.factor(named, Kind.REPLICATE)]
    if "mask" in values:
        shape = values["mask"].shape
        scores, full = [b, heads, s, t], (*query[:3], key[2])
        skipped = len(full) - len(shape)
        dims["mask"] = broadcast_dims(scores[skipped:], shape, full[skipped:])
    return dims, [b, s, heads, v]


RULES: dict[str, RuleFunction] = {
    "rolemesh::attention": attention,
    "rolemesh::attention_backward": attention_backward,
    "rolemesh::sparse_attention": attention,
}
LOCAL: dict[str, LocalFunction] = {}
