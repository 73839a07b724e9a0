"""Rules of `rolemesh::attention` and `rolemesh::sparse_attention`.

Batch, heads, query rows and the dim of values shard; keys and what a product is over stay whole.
With grouped queries the head dim of queries is `[key heads, group]`, so that a shard of the key
heads takes their queries along; one key head for all is whole on every rank. What a query names
goes with the query. The result is linear in the values.
"""

from __future__ import annotations

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.npu import broadcast_dims, operand_names
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES"]

_Dims = list[tuple[int, ...]]


def attention(call: OpCall) -> Rule:
    """`attention(query, key, value, mask, scale, ...)`, and with `indices` before the mask."""
    values = dict(zip(operand_names(call), call.operands, strict=True))
    query, key, value = (values[name].shape for name in ("query", "key", "value"))
    builder = RuleBuilder()
    b, s = builder.factor(query[0]), builder.factor(query[2])
    shared = builder.factor(key[1]) if key[1] > 1 else ()
    heads = shared + builder.factor(query[1] // key[1]) if query[1] > key[1] else shared
    t, d = (builder.factor(extent, Kind.REPLICATE) for extent in key[2:])
    v = builder.factor(value[3])
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
    linear = tuple(name == "value" for name in values)
    operands = [dims[name] for name in values]
    return builder.build(operands, [[b, s, heads, v]], linear=[linear])


RULES: dict[str, RuleFunction] = {
    "rolemesh::attention": attention,
    "rolemesh::sparse_attention": attention,
}
LOCAL: dict[str, LocalFunction] = {}
