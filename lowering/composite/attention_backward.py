"""`rolemesh::attention_backward`: the gradients of `rolemesh::attention`.

The weights are computed anew from queries and keys, as in FlashAttention (Dao et al., 2022, section
3.1), so that the forward pass keeps nothing but its operands. With weights p, the gradient g of the
result, and delta the sum of `g * result` over a row's features:

    of value    p^T g                    of scores   p (g value^T - delta)
    of query    scale * of scores key    of key      scale * of scores^T query
    of a sink   - sum of p_sink delta, as a score whose value is zero

A soft cap multiplies the gradient of a score by `1 - (score / cap)^2`. Results are in the order of
query, key, value, sinks, query_tail and key_tail, in their shapes and dtypes; without elements for
those that were not given. A mask is taken as a constant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rolemesh.lowering.composite.attention import additive, joined, scores_of, softmax
from rolemesh.lowering.composite.op import CompositeOp

__all__ = ["OP"]

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _shape(
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
) -> _Gradients:
    given = (query, key, value, sinks, query_tail, key_tail)
    found = [query.new_empty(0) if x is None else x.new_empty(x.shape) for x in given]
    return found[0], found[1], found[2], found[3], found[4], found[5]


def _decomposition(
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
) -> _Gradients:
    batch, heads, rows, width = query.shape
    groups, columns = key.shape[1], key.shape[2]
    together = (batch, groups, heads // groups * rows)
    capped, scores = scores_of(query, key, mask, scale, softcap, query_tail, key_tail)
    weights = softmax(scores, None if sinks is None else sinks[:, None, None])
    upright = grad.transpose(1, 2)
    result = weights.to(value.dtype).reshape(*together, columns) @ value
    result = result.reshape(batch, heads, rows, value.shape[-1])
    delta = (upright.to(weights.dtype) * result.to(weights.dtype)).sum(-1, keepdim=True)
    flat = upright.reshape(*together, value.shape[-1])
    of_value = weights.to(value.dtype).reshape(*together, columns).mT @ flat
    of_weights = (flat @ value.mT).to(weights.dtype).reshape(batch, heads, rows, columns)
    of_scores = weights * (of_weights - delta)
    if softcap:
        of_scores = of_scores * (1 - (capped / softcap).square())
    of_scores = (of_scores * scale).to(query.dtype).reshape(*together, columns)
    # One more key, whose weight is what the others leave.
    left = 1 - weights.sum(-1, keepdim=True)
    of_sinks = None if sinks is None else -(left * delta).sum((0, 2, 3)).to(sinks.dtype)
    of_query = (of_scores @ key).reshape(query.shape)
    of_key = of_scores.mT @ query.reshape(*together, width)
    of_tails: tuple[Tensor | None, Tensor | None] = (None, None)
    if query_tail is not None and key_tail is not None:
        flat_tail = query_tail.reshape(*together, key_tail.shape[3])
        of_tails = (of_scores @ key_tail).reshape(query_tail.shape), of_scores.mT @ flat_tail
    return _given(query, of_query, of_key, of_value, of_sinks, *of_tails)


def _given(like: Tensor, *found: Tensor | None) -> _Gradients:
    """Results, with those that were not asked for without elements."""
    q, k, v, s, t, u = (like.new_empty(0) if x is None else x.contiguous() for x in found)
    return q, k, v, s, t, u


def _kernel(
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
) -> _Gradients:
    """PyTorch's fused kernels, forward and backward, where there is no soft cap.

    A sink makes the weights of the other keys smaller, which is all that the backward kernel needs
    to know: it gets the log-sum-exp of all scores, the sink's included.
    """
    if softcap or not (query.numel() and key.numel()):
        return _decomposition(
            grad, query, key, value, mask, scale, sinks, softcap, query_tail, key_tail
        )
    aten = torch.ops.aten
    q, k = joined(query, query_tail), joined(key, key_tail)
    width, out_width = q.shape[-1], value.shape[-1]
    wide = max(width, out_width)  # PyTorch's kernel has one width for all
    q, k = (F.pad(x, (0, wide - width)) for x in (q, k))
    v, g = (F.pad(x, (0, wide - out_width)) for x in (value, grad.transpose(1, 2)))
    bias = None if mask is None else additive(mask, query.shape[2], key.shape[2], query.dtype)
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    out, total = forward(q, k, v, attn_mask=bias, scale=scale)
    left = None
    if sinks is not None:
        sink = sinks.to(total.dtype)[:, None]
        both = torch.logaddexp(total, sink)
        left = torch.exp(sink - both)
        out, total = out * torch.exp(total - both)[..., None].to(out.dtype), both
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    of_q, of_k, of_v = backward(g, q, k, v, out, total, 0.0, False, attn_mask=bias, scale=scale)
    of_sinks = None
    if sinks is not None and left is not None:
        delta = (g.to(left.dtype) * out.to(left.dtype)).sum(-1)
        of_sinks = -(left * delta).sum((0, 2)).to(sinks.dtype)
    inner = query.shape[-1]
    tails = (of_q[..., inner:width], of_k[..., inner:width])
    of_tails = (None, None) if query_tail is None else tails
    heads = (of_q[..., :inner], of_k[..., :inner], of_v[..., :out_width])
    return _given(query, *heads, of_sinks, *of_tails)


OP = CompositeOp(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask,"
    " float scale, Tensor? sinks=None, float softcap=0.0, Tensor? query_tail=None,"
    " Tensor? key_tail=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=None,
)
