"""`rolemesh::attention`: dense attention with grouped queries, masks, sinks and a soft cap.

`softmax(cap(scale * q k^T) + mask) v`, where `cap(x) = softcap * tanh(x / softcap)` if a cap is
given. A boolean mask shows a query the keys where it is true. A sink is the score of one more key
per head, whose value is zero. A query that sees nothing gives zeros, as scaled dot product
attention does; a mask of large negative numbers is plain arithmetic.

A tail is more features of queries and keys, `scale * (q k^T + q_tail k_tail^T)`, so that keys that
lie in two tensors, such as latents and rotary features, need not be copied into one.

Shapes: query `[B, H, T, D]`, key `[B, K, S, D]`, value `[B, K, S, V]`, where K divides H, mask
broadcastable to `[B, H, T, S]`, sinks `[H]`, query_tail `[B, H, T, R]`, key_tail `[B, K, S, R]`,
result `[B, T, H, V]`.
"""

from __future__ import annotations

import math
from types import NotImplementedType

import torch
import torch.nn.functional as F
from torch import Tensor

from rolemesh.lowering.composite.op import CompositeOp, Gradient

__all__ = ["FEW_ROWS", "OP", "additive", "attend", "joined", "scores_of", "softmax"]

_BLOCK = 1 << 20
"""Scores in memory at a time where no fused kernel computes them: what a core's cache holds."""

FEW_ROWS = 32
"""With fewer queries, padding the values costs more than a fused kernel saves."""


def _shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor:
    torch._check(
        (query_tail is None) == (key_tail is None),
        lambda: "query_tail and key_tail come together",
    )
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor:
    """Attention in plain ops, with the softmax in float32; see the module's docstring.

    Returns:
        `[B, H, T, V]`.
    """
    batch, heads, rows, _ = query.shape
    groups, columns = key.shape[1], key.shape[2]
    together = (batch, groups, heads // groups * rows)
    _, scores = scores_of(query, key, mask, scale, softcap, query_tail, key_tail)
    weights = softmax(scores, None if sinks is None else sinks[:, None, None])
    result = weights.to(value.dtype).reshape(*together, columns) @ value
    return result.reshape(batch, heads, rows, value.shape[-1])


def scores_of(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    query_tail: Tensor | None,
    key_tail: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores `[B, H, T, S]` in float32 (in double precision for such operands).

    Returns:
        The scores after the soft cap, and with the mask.
    """
    batch, heads, rows, _ = query.shape
    groups, columns = key.shape[1], key.shape[2]
    together = (batch, groups, heads // groups * rows)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.reshape(*together, key.shape[3]) @ key.mT).to(wide)
    if query_tail is not None and key_tail is not None:
        tail = query_tail.reshape(*together, key_tail.shape[3])
        scores = scores + (tail @ key_tail.mT).to(wide)
    scores = (scores * scale).reshape(batch, heads, rows, columns)
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return scores, scores if mask is None else _masked(scores, mask)


def joined(x: Tensor, tail: Tensor | None) -> Tensor:
    """Queries or keys with all their features in one tensor."""
    return x if tail is None else torch.cat([x, tail], -1)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Weights of scores `[.., S]`, next to sinks that broadcast to `[.., 1]`.

    Zeros where all scores are minus infinity.
    """
    if sinks is None:
        return torch._safe_softmax(scores, -1)
    wide = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, wide], -1), -1)[..., :-1]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, scores, -math.inf) if mask.dtype is torch.bool else scores + mask


def _decomposition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor:
    if sinks is None and not softcap and query_tail is None:
        found = _fused(query, key, value, mask, scale)
    else:
        found = attend(query, key, value, mask, scale, sinks, softcap, query_tail, key_tail)
    return found.transpose(1, 2).contiguous()


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's fused attention, `[B, H, T, V]`."""
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=grouped)


def _inlined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor | NotImplementedType:
    plain = sinks is None and not softcap and query_tail is None
    if not plain or query.shape[-1] != value.shape[-1]:
        return NotImplemented  # all scores would be in memory
    return _decomposition(query, key, value, mask, scale)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor:
    narrow = query_tail is None and query.shape[-1] == value.shape[-1]
    if softcap or not (narrow or query.shape[2] >= FEW_ROWS):
        return _in_blocks(query, key, value, mask, scale, sinks, softcap, query_tail, key_tail)
    query, key = joined(query, query_tail), joined(key, key_tail)
    width, out_width = query.shape[-1], value.shape[-1]
    # PyTorch's kernel has one width for all.
    if out_width < width:
        value = F.pad(value, (0, width - out_width))
    elif width < out_width:
        query, key = (F.pad(x, (0, out_width - width)) for x in (query, key))
    if sinks is None:
        found = _fused(query, key, value, mask, scale)
    else:
        found = _with_sinks(query, key, value, mask, scale, sinks)
    return found[..., :out_width].transpose(1, 2).contiguous()


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor
) -> Tensor:
    """A sink s scales a row by `sum / (sum + exp(s))`, where sum is that of its exponentials."""
    if mask is not None:
        mask = additive(mask, query.shape[2], key.shape[2], query.dtype)
    found, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, scale=scale
    )
    share = torch.sigmoid(total - sinks.to(total.dtype)[:, None])
    return found * share[..., None].to(found.dtype)


def additive(mask: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A mask in the form that PyTorch's fused kernels on a CPU take: `[1 or B, 1 or H, T, S]`."""
    if mask.dtype is torch.bool:
        mask = _masked(torch.zeros((), dtype=dtype), mask)
    lead = (1,) * (4 - mask.dim()) + tuple(mask.shape[:-2])
    return mask.to(dtype).expand(*lead, rows, columns)


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    softcap: float,
    query_tail: Tensor | None,
    key_tail: Tensor | None,
) -> Tensor:
    """Plain attention, a block of queries at a time."""
    batch, heads, rows, _ = query.shape
    out = _shape(query, key, value, mask, scale, query_tail=query_tail, key_tail=key_tail)
    step = max(1, _BLOCK // max(1, batch * heads * key.shape[2]))
    for first in range(0, rows, step):
        block = slice(first, first + step)
        seen = mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            seen = mask[..., block, :]
        tail = None if query_tail is None else query_tail[:, :, block]
        found = attend(query[:, :, block], key, value, seen, scale, sinks, softcap, tail, key_tail)
        out[:, block] = found.transpose(1, 2)
    return out


def _gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> list[Tensor | None]:
    found = torch.ops.rolemesh.attention_backward(
        grad, query, key, value, mask, scale, sinks, softcap, query_tail, key_tail
    )
    given = (query, key, value, sinks, query_tail, key_tail)
    return [None if x is None else of_x for x, of_x in zip(given, found, strict=True)]


OP = CompositeOp(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale,"
    " Tensor? sinks=None, float softcap=0.0, Tensor? query_tail=None, Tensor? key_tail=None)"
    " -> Tensor",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=_inlined,
    gradient=Gradient(("query", "key", "value", "sinks", "query_tail", "key_tail"), _gradient),
)
