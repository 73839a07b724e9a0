"""`rolemesh::sparse_attention`: attention of each query to the keys that it names.

As `rolemesh::attention`, but query t sees key s only if s is among its `indices`. An index outside
of `[0, S)` names no key, and the mask hides named keys as it hides any. A key must not be named
twice.

Shapes: those of `rolemesh::attention`, and indices `[B, T, k]`, for all heads.

The kernel gathers the named keys and values of a block of queries, which it multiplies with all
heads that share them: O(T k) work, and the memory of one block. An element is moved before it is
multiplied, once a head; where so few heads share it, and S is so few times k, that multiplying all
S keys takes less time, it does that instead, which is O(T k) too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.composite.attention import FEW_ROWS, softmax
from rolemesh.lowering.composite.attention import OP as DENSE
from rolemesh.lowering.composite.op import CompositeOp

__all__ = ["OP"]

_GATHERED = 24
"""Multiply-adds that take as long as gathering one element."""

_SLOWER = 4
"""Multiply-adds of small products in 16 bits that take as long as one in a fused kernel."""

_BLOCK = 1 << 22
"""Bytes that are gathered at a time: a few times what a core's cache holds."""

_DENSE_BLOCK = 1 << 24
"""Elements of the mask at a time, where keys are not gathered."""


def _shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1])


def _decomposition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    seen = _seen(indices, mask, key.shape[2])
    found = DENSE.decomposition(query, key, value, seen, scale, sinks)
    assert isinstance(found, Tensor)
    return found


def _seen(indices: Tensor, mask: Tensor | None, columns: int) -> Tensor:
    """The mask of named keys, `[B, 1, T, S]`, with what `mask` hides or adds."""
    batch, rows, _ = indices.shape
    valid = (indices >= 0) & (indices < columns)
    places = torch.where(valid, indices, columns).long()
    named = torch.zeros(batch, rows, columns + 1, dtype=torch.bool, device=indices.device)
    named = named.scatter(-1, places, True)[:, None, :, :columns]
    if mask is None:
        return named
    return named & mask if mask.dtype is torch.bool else torch.where(named, mask, -torch.inf)


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    heads, groups, columns, named = query.shape[1], key.shape[1], key.shape[2], indices.shape[2]
    shared = heads // max(1, groups)
    if mask is not None:
        mask = mask.expand(query.shape[0], -1, query.shape[2], columns)
    fused = query.dtype.itemsize == 2 and query.shape[2] >= FEW_ROWS
    slower = _SLOWER if fused else 1
    if columns * shared <= named * (shared * slower + _GATHERED):
        return _dense(query, key, value, indices, mask, scale, sinks)
    out = _shape(query, key, value, indices, mask, scale)
    valid = (indices >= 0) & (indices < columns)
    places = torch.where(valid, indices, 0).long()
    step = max(1, _BLOCK // (named * (key.shape[3] + value.shape[3]) * key.dtype.itemsize))
    # Fresh memory for each block would cost more than what is gathered into it.
    keys, values = (x.new_empty(step * named, x.shape[3]) for x in (key, value))
    for item in range(query.shape[0]):
        for first in range(0, query.shape[2], step):
            block = slice(first, first + step)
            where = places[item, block]
            count = where.numel()
            bias = torch.where(valid[item, block], 0.0, -torch.inf)[:, None]
            if mask is not None:
                bias = bias + _gathered_mask(mask[item, :, block], where)
            for group in range(groups):
                part = slice(group * shared, (group + 1) * shared)
                out[item, block, part] = _attend(
                    query[item, part, block].transpose(0, 1) * scale,
                    _rows(key[item, group], where, keys[:count]),
                    _rows(value[item, group], where, values[:count]),
                    bias if bias.shape[1] == 1 else bias[:, part],
                    None if sinks is None else sinks[part, None],
                )
    return out


def _rows(source: Tensor, where: Tensor, target: Tensor) -> Tensor:
    """Rows `where` `[T, k]` of `source`, in the memory of `target`."""
    torch.index_select(source, 0, where.flatten(), out=target)
    return target.view(*where.shape, -1)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, sinks: Tensor | None
) -> Tensor:
    """Attention of queries `[T, G, D]` to keys `[T, k, D]` and values `[T, k, V]` of their own."""
    scores = torch.bmm(query, keys.mT).float().add_(bias)
    return torch.bmm(softmax(scores, sinks).to(values.dtype), values)


def _gathered_mask(mask: Tensor, where: Tensor) -> Tensor:
    """Of a mask `[H or 1, T, S]` what it adds to scores, `[T, H or 1, k]`."""
    found = mask.gather(-1, where.expand(mask.shape[0], -1, -1)).transpose(0, 1)
    return torch.where(found, 0.0, -torch.inf) if found.dtype is torch.bool else found.float()


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention with a mask of the named keys, a block of queries at a time."""
    batch, _, rows, _ = query.shape
    columns = key.shape[2]
    step = max(1, _DENSE_BLOCK // max(1, batch * columns))
    found = []
    for first in range(0, max(1, rows), step):
        block = slice(first, first + step)
        seen = _seen(indices[:, block], None if mask is None else mask[:, :, block], columns)
        result = DENSE.kernel(query[:, :, block], key, value, seen, scale, sinks)
        assert isinstance(result, Tensor)
        found.append(result)
    return found[0] if len(found) == 1 else torch.cat(found, 1)


OP = CompositeOp(
    "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? mask,"
    " float scale, Tensor? sinks=None) -> Tensor",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=None,
)
