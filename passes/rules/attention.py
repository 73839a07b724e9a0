"""Rules of scaled dot product attention, one table row for each of PyTorch's ops.

Batch, heads and query rows shard; keys and the dim of a head stay whole, and so do query rows under
a causal flag, whose diagonal a shard would have to move (canonicalisation makes such masks
explicit). With grouped queries the head dim of q is `[kv heads, group]`, so that a shard of the kv
heads takes their queries along. Dropout needs the random numbers of the whole op: replicated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.arguments import argument
from rolemesh.passes.rules.registry import LocalFunction, RuleFunction, replicated_rule

__all__ = ["LOCAL", "RULES"]

_Dims = list[tuple[int, ...]]


class _Form(NamedTuple):
    """Where an op has its arguments, and what its results are.

    Attributes:
        dropout: Position of `dropout_p`; `is_causal` follows it.
        second: What the second result is: `lse`, the log-sum-exp `[B, H, S]` (cuDNN's has a
            trailing dim of one); `padded lse`, `[B, H, S up to a multiple of 32]`, or of no row if
            it was not asked for; `weights`, `[B, H, S, T]`; empty for an op without one.
        wide_values: Whether v may have another head dim than q, so that a shard of it is possible.
        debug: Position of `return_debug_mask`, whose result has its own shape; -1 if there is none.
    """

    dropout: int
    second: str
    wide_values: bool = False
    debug: int = -1


def _attention(form: _Form) -> Callable[[OpCall], Rule]:
    def attention(call: OpCall) -> Rule:
        if argument(call, form.dropout, "dropout_p", 0.0):
            return replicated_rule(call)
        if form.debug >= 0 and argument(call, form.debug, "return_debug_mask", False):
            return replicated_rule(call)
        return _forward(call, form) or replicated_rule(call)

    return attention


def _forward(call: OpCall, form: _Form) -> Rule | None:
    """The rule of a call; None for shapes it does not know."""
    query, key, value, *masks = call.operands
    *lead, rows, width = call.results[0].shape
    if len(masks) > 1 or not query.ndim == key.ndim == value.ndim == len(lead) + 2:
        return None
    builder = RuleBuilder()
    found = _lead(builder, lead, (query, key, value))
    if found is None:
        return None
    out_lead, q_lead, k_lead, v_lead = found
    # A shard of the rows would have each of its parts padded.
    padded = form.second == "padded lse" and call.results[1].shape[-1] > 0
    causal = argument(call, form.dropout + 1, "is_causal", False)
    s = builder.factor(rows, Kind.REPLICATE if causal or padded else Kind.PASS)
    t = builder.factor(key.shape[-2], Kind.REPLICATE)
    d = builder.factor(query.shape[-1], Kind.REPLICATE)
    v = builder.factor(width) if form.wide_values else builder.factor(width, Kind.REPLICATE)
    operands = [[*q_lead, s, d], [*k_lead, t, d], [*v_lead, t, v]]
    for mask in masks:
        dims = _broadcast([*out_lead, s, t], (*lead, rows, key.shape[-2]), mask)
        if dims is None:
            return None
        operands.append(dims)
    results = [[*out_lead, s, v]]
    for position, result in enumerate(call.results[1:]):
        if position > 0 or padded or result.ndim < len(lead) + 1:
            # Random number state and the like; a padded row count is a factor of its own.
            known = [] if position or result.ndim <= len(lead) else out_lead
            rest = result.shape[len(known) :]
            results.append([*known, *builder.dims(rest, Kind.REPLICATE)])
        elif form.second == "weights":
            results.append([*out_lead, s, t])
        elif result.shape[len(lead)] == rows:
            results.append([*out_lead, s, *[()] * (result.ndim - len(lead) - 1)])
        else:  # not asked for
            results.append([*out_lead, builder.factor(0, Kind.REPLICATE)])
    return builder.build(operands, results)


def _lead(
    builder: RuleBuilder, extents: list[int], values: tuple[TensorType, TensorType, TensorType]
) -> tuple[_Dims, _Dims, _Dims, _Dims] | None:
    """Dims before rows and head dim, of the result and of q, k and v; the last of them is heads."""
    query, key, value = values
    result: _Dims = []
    operands: tuple[_Dims, _Dims, _Dims] = ([], [], [])
    for place, extent in enumerate(extents):
        kv_heads = key.shape[place]
        if (
            place == len(extents) - 1
            and 1 < kv_heads < extent == query.shape[place]
            and kv_heads == value.shape[place]
            and extent % kv_heads == 0
        ):
            heads = builder.factor(kv_heads)
            result.append(heads + builder.factor(extent // kv_heads))
            for dims, found in zip(operands, (result[-1], heads, heads), strict=True):
                dims.append(found)
            continue
        result.append(builder.factor(extent))
        for dims, operand in zip(operands, values, strict=True):
            if operand.shape[place] not in (1, extent):
                return None
            dims.append(result[-1] if operand.shape[place] == extent else ())
    return (result, *operands)


def _broadcast(dims: _Dims, shape: tuple[int, ...], mask: TensorType) -> _Dims | None:
    """Dims of a mask that broadcasts to `shape`."""
    skipped = len(shape) - mask.ndim
    if skipped < 0 or any(
        m not in (1, n) for m, n in zip(mask.shape, shape[skipped:], strict=True)
    ):
        return None
    return [
        dims[skipped + place] if extent == shape[skipped + place] else ()
        for place, extent in enumerate(mask.shape)
    ]


_FORMS: dict[str, _Form] = {
    "scaled_dot_product_attention": _Form(4, "", wide_values=True),
    "_scaled_dot_product_attention_math": _Form(4, "weights", wide_values=True),
    "_scaled_dot_product_flash_attention_for_cpu": _Form(3, "lse"),
    "_scaled_dot_product_flash_attention": _Form(3, "lse", debug=5),
    "_scaled_dot_product_efficient_attention": _Form(5, "padded lse"),
    "_scaled_dot_product_cudnn_attention": _Form(5, "lse", debug=7),
    "_scaled_dot_product_fused_attention_overrideable": _Form(4, "lse", debug=6),
}
RULES: dict[str, RuleFunction] = {
    f"aten::{name}": _attention(form) for name, form in _FORMS.items()
}
LOCAL: dict[str, LocalFunction] = {}
