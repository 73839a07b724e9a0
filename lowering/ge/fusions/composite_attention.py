"""Attention as one op -> npu_fused_infer_attention_score and npu_sparse_flash_attention.

    rolemesh.attention          ->  npu_fused_infer_attention_score, if it has no sinks and no cap
    rolemesh.sparse_attention   ->  npu_sparse_flash_attention, over the latent of MLA

The sparse op has keys that are the values too, the latent, and a tail of rotary features. It takes
no mask: the keys that the mask hides are left out of what a query names, and a row of named keys
ends at its first -1, so they are sorted. It gives zeros to a query that sees nothing, as ours does.
The dense op takes a tail of keys in pages alone, which ours does not have.

Limits are those of the documentation of the two functions of torch_npu: fp16 or bf16, and sizes.
What does not fit is decomposed into plain ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.ge.fusions.attention import (
    DTYPES,
    ZERO_BLIND_ROWS,
    Excluded,
    excluded_by,
    is_documented,
    is_mask_of,
)
from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import (
    argument,
    dtype_of,
    is_call,
    known_above,
    number,
    same,
    same_shape,
    shape_of,
)

__all__ = ["dense_attention", "sparse_attention"]

aten = torch.ops.aten

_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
_LATENT = 512
_ROTARY = 64
"""Sizes that sparse attention takes."""

_ALL_KEYS = 0
_OVER_LATENT = 2
"""Values of `sparse_mode` and `attention_mode`."""

_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.clone.default,
)


def dense_attention() -> Fusion:
    """The fusion of dense attention."""
    define_npu_ops()
    define_composite_ops()
    ends = frozenset({torch.ops.rolemesh.attention.default})
    return Fusion(torch.ops.npu.npu_fused_infer_attention_score.default, ends, _find_dense)


def sparse_attention() -> Fusion:
    """The fusion of sparse attention."""
    define_npu_ops()
    define_composite_ops()
    ends = frozenset({torch.ops.rolemesh.sparse_attention.default})
    return Fusion(torch.ops.npu.npu_sparse_flash_attention.default, ends, _find_sparse)


def _operands(end: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    query, key, value = (argument(end, name) for name in ("query", "key", "value"))
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    return query, key, value


def _find_dense(end: fx.Node, setting: Setting) -> Found | None:
    query, key, value = _operands(end)
    kinds = {dtype_of(x) for x in (query, key, value)}
    scale = number(argument(end, "scale"))
    fits = (
        len(kinds) == 1
        and kinds.issubset(DTYPES)
        and scale is not None
        and argument(end, "sinks") is None
        and argument(end, "key_tail") is None
        and not argument(end, "softcap")
        and same_shape(shape_of(key), shape_of(value))
        and (not setting.within_limits or is_documented(shape_of(query), shape_of(key)))
    )
    excluded = _mask(end, query, key)
    if not fits or excluded is False:
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        heads, rows = shape_of(query)[1:3]
        several = known_above(rows, 1)
        options: dict[str, object] = {"num_heads": heads, "scale": scale}
        options |= {"num_key_value_heads": shape_of(key)[1]}
        options |= {"input_layout": "BNSD_BSND" if several else "BNSD"}
        if isinstance(excluded, Excluded):
            mask = excluded.condition
            if excluded.seen:
                mask = new.shared(mask, aten.logical_not.default, mask)
            options["atten_mask"] = mask
            if several:
                options["inner_precise"] = ZERO_BLIND_ROWS
        op = torch.ops.npu.npu_fused_infer_attention_score.default
        found = new.part(new(op, query, key, value, **options), 0)
        return [found if several else new(aten.transpose.int, found, 1, 2)]

    return Found((end,), (), emit)


def _mask(end: fx.Node, query: fx.Node, key: fx.Node) -> Excluded | bool | None:
    """What the mask excludes; None without one, False if it does more than that."""
    mask = argument(end, "mask")
    if mask is None:
        return None
    assert isinstance(mask, fx.Node)
    excluded = excluded_by(mask)
    if dtype_of(mask) is torch.bool:
        excluded = Excluded(mask, seen=True)
    if excluded is None or not is_mask_of(excluded.condition, query, key):
        return False
    return excluded


def _find_sparse(end: fx.Node, setting: Setting) -> Found | None:
    query, key, value = _operands(end)
    query_tail, key_tail = argument(end, "query_tail"), argument(end, "key_tail")
    if not (isinstance(query_tail, fx.Node) and isinstance(key_tail, fx.Node)):
        return None
    indices, scale = argument(end, "indices"), number(argument(end, "scale"))
    assert isinstance(indices, fx.Node)
    kinds = {dtype_of(x) for x in (query, key, value, query_tail, key_tail)}
    widths = (shape_of(key)[3], shape_of(key_tail)[3])
    documented = shape_of(query)[1] in _HEADS and widths == (_LATENT, _ROTARY)
    fits = (
        len(kinds) == 1
        and kinds.issubset(DTYPES)
        and scale is not None
        and argument(end, "sinks") is None
        and same(shape_of(key)[1], 1)
        and _source(key) is _source(value)
        and (not setting.within_limits or documented)
    )
    excluded = _mask(end, query, key)
    if not fits or excluded is False:
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        def tokens_first(x: fx.Node) -> fx.Node:
            return new(aten.transpose.int, x, 1, 2)

        keys = tokens_first(key)
        if isinstance(excluded, Excluded):
            visible = _seen if excluded.seen else _not_hidden
            named = new.traced(visible, indices, key, excluded.condition)
        else:
            named = new.traced(_named, indices, key)
        made = new(
            torch.ops.npu.npu_sparse_flash_attention.default,
            tokens_first(query),
            keys,
            keys,
            named,
            scale,
            query_rope=tokens_first(query_tail),
            key_rope=tokens_first(key_tail),
            sparse_mode=_ALL_KEYS,
            attention_mode=_OVER_LATENT,
        )
        return [new.part(made, 0)]

    return Found((end,), (), emit)


def _named(indices: Tensor, key: Tensor) -> Tensor:
    """The keys that queries name, in order and -1 after that, `[B, T, 1, k]`."""
    return _ordered(indices, _is_key(indices, key), key.shape[2])


def _seen(indices: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """The same without those that a query does not see."""
    valid = _is_key(indices, key)
    places = torch.where(valid, indices, 0).long()
    wide = seen.expand(indices.shape[0], 1, indices.shape[1], key.shape[2])[:, 0]
    return _ordered(indices, valid & wide.gather(-1, places), key.shape[2])


def _not_hidden(indices: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    """The same for a mask of what a query does not see."""
    return _seen(indices, key, ~hidden)


def _is_key(indices: Tensor, key: Tensor) -> Tensor:
    return (indices >= 0) & (indices < key.shape[2])


def _ordered(indices: Tensor, valid: Tensor, columns: int) -> Tensor:
    found = torch.where(valid, indices, columns).sort(-1).values
    return torch.where(found < columns, found, -1).to(torch.int32).unsqueeze(2)


def _source(value: fx.Node) -> fx.Node:
    """What a value is made of by ops that keep its last dim, and the order of elements."""
    while is_call(value, *_VIEWS):
        source = value.args[0]
        assert isinstance(source, fx.Node)
        if not same(shape_of(source)[-1], shape_of(value)[-1]):
            break
        value = source
    return value
