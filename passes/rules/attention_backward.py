"""Rules of the gradients of scaled dot product attention.

Batch and heads shard as in the forward pass. A shard of the query rows gives its rows of the
gradient of the queries, and a summand of those of keys and values; under a causal flag rows stay
whole (canonicalisation makes such masks explicit). Query heads that share a key head may shard too:
the gradient of the shared head is a sum over them. Dropout and the gradient of a mask need the
whole op.
"""

from __future__ import annotations

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.npu import broadcast_dims, operand_names
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction, replicated_rule

__all__ = ["LOCAL", "RULES"]

_MASKS = ("attn_mask", "attn_bias")


def attention_backward(call: OpCall) -> Rule:
    """`op(grad_out, query, key, value, .., out, logsumexp, .., attn_mask or attn_bias, ..)`."""
    values = dict(zip(operand_names(call), call.operands, strict=True))
    given = dict(zip([a.name for a in call.target._schema.arguments], call.args, strict=False))
    given |= call.kwargs
    query, key, value = (values[name].shape for name in ("query", "key", "value"))
    batch, heads, rows, width = query
    if given["dropout_p"] or key[0] != batch or heads % key[1] or _wants_mask(call):
        return replicated_rule(call)
    builder = RuleBuilder()
    b = builder.factor(batch)
    shared = builder.factor(key[1]) if key[1] > 1 or heads == 1 else ()
    h = shared + builder.factor(heads // key[1], Kind.REDUCE) if heads > key[1] else shared
    whole = given.get("is_causal", False) or values["logsumexp"].shape[2] != rows
    s = builder.factor(rows, Kind.REPLICATE if whole else Kind.REDUCE)
    t, d, v = (builder.factor(n, Kind.REPLICATE) for n in (key[2], width, value[3]))
    lse = values["logsumexp"].shape
    ends = builder.factor(lse[2], Kind.REPLICATE) if lse[2] != rows else s
    forms = {"query": [b, h, s, d], "key": [b, shared, t, d], "value": [b, shared, t, v]}
    forms |= {name: [b, h, s, v] for name in ("out", "grad_out", "grad_out_")}
    operands: list[list[tuple[int, ...]]] = []
    for name, operand in values.items():
        if name == "logsumexp":
            operands.append([b, h, ends, *[()] * (operand.ndim - 3)])
        elif name in _MASKS:
            scores, full = [b, h, s, t], (batch, heads, rows, key[2])
            skipped = 4 - operand.ndim
            operands.append(broadcast_dims(scores[skipped:], operand.shape, full[skipped:]))
        else:
            # What has no form are states of random numbers, and lengths.
            operands.append(forms.get(name) or builder.dims(operand.shape, Kind.REPLICATE))
    results = [forms["query"], forms["key"], forms["value"]]
    rest = [builder.dims(found.shape, Kind.REPLICATE) for found in call.results[3:]]
    return builder.build(operands, [*results, *rest])


def _wants_mask(call: OpCall) -> bool:
    """Whether the gradient of a mask is a result, and not an empty tensor."""
    return any(found.ndim == 4 for found in call.results[3:])


_FORMS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
          "fused_attention_overrideable")  # fmt: skip
RULES: dict[str, RuleFunction] = {
    f"aten::_scaled_dot_product_{name}_backward": attention_backward for name in _FORMS
}
LOCAL: dict[str, LocalFunction] = {}
