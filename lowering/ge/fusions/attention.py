"""Scaled dot-product attention -> npu_fused_infer_attention_score.

Three forms: one of PyTorch's fused attention ops, what `scaled_dot_product_attention` becomes where
none of those applies, and what models write themselves:

    softmax(q @ k^T * scale + mask) @ v

with casts to fp32 anywhere inside, and the scale on the scores or on q and k. Keys and values that
are repeated for the query heads of a group are passed unrepeated.

The fused op takes a mask of booleans only. So an additive mask has to choose, by a condition,
between 0 and minus infinity or the lowest number of its dtype; the condition becomes the mask.

A query that sees no key gets zeros from the fused op and from PyTorch's, and NaN or the mean of all
values from a model's own form. Models switch between these forms, so they do not read such a row.

Limits are those of `torch_npu.npu_fused_infer_attention_score`'s documentation: fp16 or bf16, keys
and values of one shape, and the sizes below.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import (
    Size,
    argument,
    cast_source,
    dtype_of,
    is_call,
    known_above,
    number,
    same,
    same_shape,
    shape_of,
)

__all__ = [
    "DTYPES",
    "ZERO_BLIND_ROWS",
    "Excluded",
    "excluded_by",
    "fused_infer_attention_score",
    "is_documented",
    "is_mask_of",
]

aten = torch.ops.aten

DTYPES = (torch.float16, torch.bfloat16)
_BATCH = 65536
_HEADS = 256
_GROUP = 64
"""Largest number of query heads of one key head."""
_WIDTH = 512
"""Largest head dim; with more than one query it is a multiple of the next."""
_WIDTH_UNIT = 16
_TOKENS = 20 * 2**20
_TOKENS_FOR_ONE = 262144
"""Most keys; the second for one query."""
ZERO_BLIND_ROWS = 2
"""`inner_precise` that makes rows that see no key zero; not available for one query."""

_OPS = MappingProxyType(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
        aten._scaled_dot_product_efficient_attention.default: "attn_bias",
        aten._scaled_dot_product_fused_attention_overrideable.default: "attn_bias",
    }
)
"""PyTorch's ops, with the name of the mask; their first result is used alone."""

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)
_TIMES = (aten.mul.Tensor, aten.mul.Scalar)
_OVER = (aten.div.Tensor, aten.div.Scalar)
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_ENDS = frozenset({operator.getitem, aten._to_copy.default, *_VIEWS})


def fused_infer_attention_score() -> Fusion:
    """The fusion."""
    define_npu_ops()
    return Fusion(torch.ops.npu.npu_fused_infer_attention_score.default, _ENDS, _find)


class _Attention(NamedTuple):
    """Attention of `[B, N, S, D]`; `mask` is additive."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: object
    scale: float
    inner: tuple[fx.Node, ...]


class Excluded(NamedTuple):
    """A condition, and whether it holds for keys that are seen rather than for the others."""

    condition: fx.Node
    seen: bool


def _find(end: fx.Node, setting: Setting) -> Found | None:
    found = _of_op(end) if end.target is operator.getitem else _of_products(end)
    if found is None:
        return None
    key, value = _unrepeated(found.key), _unrepeated(found.value)
    if not same_shape(shape_of(key), shape_of(value)):
        key, value = found.key, found.value
    if not _fits(end, found.query, key, value):
        return None
    if setting.within_limits and not is_documented(shape_of(found.query), shape_of(key)):
        return None
    excluded = None
    if found.mask is not None:
        excluded = excluded_by(found.mask)
        if excluded is None or not is_mask_of(excluded.condition, found.query, key):
            return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        _, heads, rows, _ = shape_of(found.query)
        options: dict[str, object] = {"num_heads": heads, "scale": found.scale}
        options |= {"input_layout": "BNSD", "num_key_value_heads": shape_of(key)[1]}
        if excluded is not None:
            mask = excluded.condition
            if excluded.seen:
                mask = new.shared(mask, aten.logical_not.default, mask)
            options["atten_mask"] = mask
            if known_above(rows, 1):
                options["inner_precise"] = ZERO_BLIND_ROWS
        op = torch.ops.npu.npu_fused_infer_attention_score.default
        return [new.part(new(op, found.query, key, value, **options), 0)]

    return Found((end,), found.inner, emit)


def _of_op(end: fx.Node) -> _Attention | None:
    call, index = end.args
    if index != 0 or not is_call(call, *_OPS):
        return None
    assert isinstance(call, fx.Node)
    if argument(call, "dropout_p") != 0 or argument(call, "is_causal"):
        return None
    query, key, value = (argument(call, name) for name in ("query", "key", "value"))
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    scale, width = argument(call, "scale"), shape_of(query)[-1]
    if scale is None and isinstance(width, int):
        scale = 1 / math.sqrt(width)
    factor = number(scale)
    if factor is None:
        return None
    return _Attention(query, key, value, argument(call, _OPS[call.target]), factor, (call,))  # type: ignore[index]


def _of_products(end: fx.Node) -> _Attention | None:
    """Attention that is made of two batched products, with a softmax between them."""
    outer = _product(cast_source(end) or end)
    if outer is None:
        return None
    weights, value, outer_inner = outer
    softmax, casts = _without_casts(weights)
    if not is_call(softmax, *_SOFTMAX) or argument(softmax, "dim") not in (-1, 3):
        return None
    scores, mask, scale, score_inner = _scores(softmax.args[0])  # type: ignore[arg-type]
    product = _product(scores)
    if product is None:
        return None
    left, right, product_inner = product
    dtype = dtype_of(end)
    query, left_scale, left_inner = _unscaled(left, dtype)
    turned, right_scale, right_inner = _unscaled(right, dtype)
    if not is_call(turned, aten.transpose.int) or {d % 4 for d in turned.args[1:]} != {2, 3}:  # type: ignore[operator]
        return None
    key = turned.args[0]
    assert isinstance(key, fx.Node)
    key, value = _without_casts(key, dtype)[0], _without_casts(value, dtype)[0]
    inner = {*outer_inner, *casts, softmax, *score_inner, *product_inner}
    inner |= {*left_inner, *right_inner}
    total = scale * left_scale * right_scale
    return _Attention(query, key, value, mask, total, tuple(inner - {end}))


def _product(value: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """The operands `[B, N, M, K]` and `[B, N, K, L]` of a product, and the nodes it is made of."""
    if not is_call(value, *_VIEWS) or len(shape_of(value)) != 4:
        return None
    product = value.args[0]
    if not is_call(product, aten.bmm.default):
        return None
    assert isinstance(product, fx.Node)
    operands, inner = [], [value, product]
    for operand in product.args:
        assert isinstance(operand, fx.Node)
        if not is_call(operand, *_VIEWS):
            return None
        whole, copies = _without_copies(operand.args[0])
        inner += [operand, *copies]
        shape, flat = shape_of(whole), shape_of(operand)
        if len(shape) != 4 or not same_shape(shape[2:], flat[1:]):
            return None
        if not same_shape(shape[:2], shape_of(value)[:2]):
            return None
        operands.append(whole)
    left, right = operands
    return left, right, inner


def _scores(value: fx.Node) -> tuple[fx.Node, object, float, list[fx.Node]]:
    """Of `scores * scale + mask`: the scores, the mask or None, the scale, and nodes passed."""
    masked, passed = _without_casts(value)
    scores, mask = masked, None
    if is_call(masked, aten.add.Tensor) and argument(masked, "alpha") == 1:
        left, right = masked.args
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            scores, mask = (right, left) if excluded_by(left) else (left, right)
            passed.append(masked)
    scores, scale, scaled = _unscaled(scores)
    return scores, mask, scale, [*passed, *scaled]


def _unscaled(
    value: fx.Node, dtype: torch.dtype | None = None
) -> tuple[fx.Node, float, list[fx.Node]]:
    """A value without factors and casts, the product of the factors, and the nodes passed.

    Args:
        value: A value.
        dtype: See `_without_casts`.
    """
    scale = 1.0
    value, passed = _without_casts(value, dtype)
    while is_call(value, *_TIMES, *_OVER):
        factor = number(value.args[1])
        if not factor:
            break
        scale = scale * factor if value.target in _TIMES else scale / factor
        source = value.args[0]
        assert isinstance(source, fx.Node)
        passed.append(value)
        value, casts = _without_casts(source, dtype)
        passed += casts
    return value, scale, passed


def _without_casts(
    value: fx.Node, dtype: torch.dtype | None = None
) -> tuple[fx.Node, list[fx.Node]]:
    """A value before casts from one floating dtype to another, and the casts.

    Args:
        value: A value.
        dtype: What has this dtype is not followed further.
    """
    passed = []
    while (source := cast_source(value)) is not None and dtype_of(value) != dtype:
        if not {dtype_of(value), dtype_of(source)}.issubset(_FLOATS):
            break
        passed.append(value)
        value = source
    return value, passed


def _without_copies(value: object) -> tuple[fx.Node, list[fx.Node]]:
    """A value before copies and expansions to the shape that it has, and those."""
    passed = []
    assert isinstance(value, fx.Node)
    while is_call(value, aten.clone.default, aten.expand.default):
        source = value.args[0]
        assert isinstance(source, fx.Node)
        if not same_shape(shape_of(source), shape_of(value)):
            break
        passed.append(value)
        value = source
    return value, passed


def _unrepeated(value: fx.Node) -> fx.Node:
    """`[B, M, S, D]` of what repeats each of its M heads for the query heads of a group."""
    merged, _ = _without_copies(value.args[0] if is_call(value, *_VIEWS) else value)
    if not is_call(merged, aten.expand.default):
        return value
    source = merged.args[0]
    if merged is not value:  # [B, M, 1, S, D] -> [B, M, G, S, D] -> [B, M * G, S, D]
        if not is_call(source, aten.unsqueeze.default) or len(shape_of(merged)) != 5:
            return value
        source, dim = source.args  # type: ignore[union-attr]
        if dim not in (2, -3):
            return value
    assert isinstance(source, fx.Node)
    before, after = shape_of(source), shape_of(value)
    groups = len(before) == 4 and (merged is not value or same(before[1], 1))
    keeps = groups and same(before[0], after[0]) and same_shape(before[2:], after[2:])
    return source if keeps else value


def excluded_by(mask: object) -> Excluded | None:
    """What an additive mask excludes; None if it is not one that only excludes."""
    if not isinstance(mask, fx.Node):
        return None
    chosen, _ = _without_casts(mask)
    if not is_call(chosen, aten.where.self):
        return None
    condition, *choices = chosen.args
    assert isinstance(condition, fx.Node)
    lowest = torch.finfo(torch.float16 if dtype_of(chosen) is torch.float16 else torch.bfloat16).min
    values = [_constant(choice) for choice in choices]
    if values[0] == 0 and values[1] is not None and values[1] <= lowest:
        return Excluded(condition, seen=True)
    if values[1] == 0 and values[0] is not None and values[0] <= lowest:
        return Excluded(condition, seen=False)
    return None


def _constant(value: object) -> float | None:
    """The number that a constant tensor is filled with."""
    if is_call(value, aten.zeros.default):
        return 0.0
    if is_call(value, aten.scalar_tensor.default):
        return number(value.args[0])  # type: ignore[attr-defined]
    if is_call(value, aten.full.default):
        return number(value.args[1])  # type: ignore[attr-defined]
    return None


def _fits(end: fx.Node, query: fx.Node, key: fx.Node, value: fx.Node) -> bool:
    kinds = {dtype_of(x) for x in (end, query, key, value)}
    shape, keys = shape_of(query), shape_of(key)
    if len(kinds) != 1 or not kinds.issubset(DTYPES) or not len(shape) == len(keys) == 4:
        return False
    return (
        all(isinstance(n, int) for n in (shape[1], keys[1], shape[3]))
        and same(shape[1] % int(keys[1]), 0)
        and same(shape[0], keys[0])
        and same(shape[3], keys[3])
        and same_shape(keys, shape_of(value))
        and same_shape(shape, shape_of(end))
    )


def is_mask_of(mask: fx.Node, query: fx.Node, key: fx.Node) -> bool:
    """Whether a mask is `[B or 1, 1, S, T]`."""
    shape, queries, keys = shape_of(mask), shape_of(query), shape_of(key)
    if len(shape) != 4 or dtype_of(mask) is not torch.bool or not same(shape[1], 1):
        return False
    batch = same(shape[0], 1) or same(shape[0], queries[0])
    return batch and same(shape[2], queries[2]) and same(shape[3], keys[2])


def is_documented(query: Sequence[Size], key: Sequence[Size]) -> bool:
    """Whether queries and keys of these shapes are within the limits of the op's documentation."""
    batch, heads, rows, width = query
    one = same(rows, 1)
    limits = (
        (batch, _BATCH),
        (heads, _HEADS),
        (heads // int(key[1]), _GROUP),
        (width, _WIDTH),
        (key[2], _TOKENS_FOR_ONE if one else _TOKENS),
    )
    aligned = one or same(width % _WIDTH_UNIT, 0)
    return aligned and not any(known_above(size, limit) for size, limit in limits)
