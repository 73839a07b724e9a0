"""`rolemesh::sparse_attention`: attention of each query to the keys that it names.

As `rolemesh::attention`, but query t sees key s only if s is among its `indices`. An index outside
of `[0, S)` names no key, and the mask hides named keys as it hides any. A key must not be named
twice.

Shapes: those of `rolemesh::attention`, and indices `[B, T, k]`, for all heads.

The kernel gathers the named keys and values of a block of queries, which it multiplies with all
heads that share them: O(T k) work, and the memory of one block. Values that are the first features
of keys are gathered with them. An element is moved before it is multiplied, once a head; where so
few heads share it, and S is so few times k, that multiplying all S keys takes less time, it does
that instead, which is O(T k) too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import NotImplementedType

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
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor:
    found = DENSE.shape(
        query, key, value, mask, scale, sinks, query_tail=query_tail, key_tail=key_tail
    )
    assert isinstance(found, Tensor)
    return found


def _decomposition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor:
    seen = _seen(indices, mask, key.shape[2])
    found = DENSE.decomposition(
        query, key, value, seen, scale, sinks, query_tail=query_tail, key_tail=key_tail
    )
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
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor:
    batch, heads, rows, _ = query.shape
    groups, columns, named = key.shape[1], key.shape[2], indices.shape[2]
    shared = heads // max(1, groups)
    mask = _of_all_queries(mask, query, columns)
    if _multiplies_all(query, key, named):
        return _dense(query, key, value, indices, mask, scale, sinks, query_tail, key_tail)
    out = _shape(query, key, value, indices, mask, scale, sinks, query_tail, key_tail)
    none = (indices < 0) | (indices >= columns)
    places = indices.masked_fill(none, 0).long()
    parts = [key] if key_tail is None else [key, key_tail]
    within = _begins_with(key, value)
    if not within:
        parts.append(value)
    width = sum(part.shape[3] for part in parts)
    step = max(1, _BLOCK // max(1, named * width * key.dtype.itemsize))
    # Fresh memory for each block would cost more than what is gathered into it.
    most = min(step, batch * rows) * named
    memory = [part.new_empty(most, part.shape[3]) for part in parts]
    for block in _blocks(batch, rows, step):
        where = places[block]
        bias = _bias(none[block], None if mask is None else mask[block[0], :, block[1]], where)
        for group in range(groups):
            found = [
                _rows(part[block[0], group], where, target)
                for part, target in zip(parts, memory, strict=True)
            ]
            some = slice(group * shared, (group + 1) * shared)
            queries = [x[block[0], some, block[1]] for x in (query, query_tail) if x is not None]
            result = _attend(
                [x.transpose(1, 2).flatten(0, 1) * scale for x in queries],
                found[: len(queries)],
                found[0][..., : value.shape[3]] if within else found[-1],
                bias.flatten(0, 1) if bias.shape[2] == 1 else bias[:, :, some].flatten(0, 1),
                None if sinks is None else sinks[some, None],
            )
            out[*block, some] = result.unflatten(0, where.shape[:2])
    return out


def _inlined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    query_tail: Tensor | None = None,
    key_tail: Tensor | None = None,
) -> Tensor | NotImplementedType:
    """What one block of the kernel computes, in plain ops: fused, they take less than a call."""
    sources = [key if key_tail is None else key_tail, key, value]
    sizes = [size for x in (query, indices, *sources) for size in x.shape]
    if key.shape[1] != 1 or any(isinstance(size, torch.SymInt) for size in sizes):
        return NotImplemented
    (batch, _, rows, _), columns, named = query.shape, key.shape[2], indices.shape[2]
    width = sum(x.shape[3] for x in {id(x): x for x in sources}.values())
    large = batch * rows * named * width * key.dtype.itemsize > _BLOCK
    if large or _multiplies_all(query, key, named):
        return NotImplemented
    none = (indices < 0) | (indices >= columns)
    places = indices.masked_fill(none, 0).long()
    item = torch.arange(batch, device=indices.device)[:, None, None]

    def gathered(x: Tensor) -> Tensor:
        return x[:, 0][item, places].flatten(0, 1)

    keys = gathered(key)
    found = _attend(
        [x.transpose(1, 2).flatten(0, 1) * scale for x in (query, query_tail) if x is not None],
        [keys] if key_tail is None else [keys, gathered(key_tail)],
        keys if value is key else gathered(value),
        _bias(none, _of_all_queries(mask, query, columns), places).flatten(0, 1),
        None if sinks is None else sinks[:, None],
    )
    return found.unflatten(0, (batch, rows))


def _multiplies_all(query: Tensor, key: Tensor, named: int) -> bool:
    """Whether multiplying all keys takes less time than gathering those that are named."""
    shared = query.shape[1] // max(1, key.shape[1])
    fused = query.dtype.itemsize == 2 and query.shape[2] >= FEW_ROWS
    return key.shape[2] * shared <= named * (shared * (_SLOWER if fused else 1) + _GATHERED)


def _of_all_queries(mask: Tensor | None, query: Tensor, columns: int) -> Tensor | None:
    """A mask as `[B, H or 1, T, S]`."""
    if mask is None:
        return None
    mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    return mask.expand(query.shape[0], -1, query.shape[2], columns)


def _begins_with(key: Tensor, value: Tensor) -> bool:
    """Whether values are the first features of keys, in the same memory."""
    return (
        key.data_ptr() == value.data_ptr()
        and key.stride() == value.stride()
        and key.shape[3] >= value.shape[3]
    )


def _blocks(batch: int, rows: int, step: int) -> Iterator[tuple[slice, slice]]:
    """Runs of sequences and of their queries, of at most `step` queries in all."""
    together = max(1, step // max(1, rows))
    for item in range(0, batch, together):
        for row in range(0, rows, step):
            yield slice(item, item + together), slice(row, row + step)


def _rows(source: Tensor, where: Tensor, target: Tensor) -> Tensor:
    """Rows `where` `[I, T, k]` of `source` `[I, S, ..]`: `[I T, k, ..]`, in memory of `target`."""
    items, rows, named = where.shape
    found = target[: where.numel()].view(items, rows * named, target.shape[1])
    for item, places, part in zip(source, where.flatten(1), found, strict=True):
        torch.index_select(item, 0, places, out=part)
    return found.view(items * rows, named, target.shape[1])


def _attend(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Tensor,
    bias: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of queries `[N, G, ..]` to keys `[N, k, ..]` and values of their own.

    Scores are the sum of the products of queries and keys.
    """
    scores = bias
    for query, key in zip(queries, keys, strict=True):
        scores = torch.bmm(query, key.mT).float().add_(scores)
    return torch.bmm(softmax(scores, sinks).to(values.dtype), values)


def _bias(none: Tensor, mask: Tensor | None, where: Tensor) -> Tensor:
    """What a mask `[I, H or 1, T, S]` adds to scores of keys, `[I, T, H or 1, k]`.

    Minus infinity where `none` `[I, T, k]` is true.
    """
    none = none[:, :, None]
    if mask is None:
        return torch.zeros_like(none, dtype=torch.float32).masked_fill_(none, -torch.inf)
    found = mask.gather(-1, where[:, None].expand(-1, mask.shape[1], -1, -1)).transpose(1, 2)
    if found.dtype is torch.bool:
        hidden = none | ~found
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
    return found.float().masked_fill(none, -torch.inf)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None,
    query_tail: Tensor | None,
    key_tail: Tensor | None,
) -> Tensor:
    """Dense attention with a mask of the named keys, a block of queries at a time."""
    batch, _, rows, _ = query.shape
    columns = key.shape[2]
    step = max(1, _DENSE_BLOCK // max(1, batch * columns))
    found = []
    for first in range(0, max(1, rows), step):
        block = slice(first, first + step)
        seen = _seen(indices[:, block], None if mask is None else mask[:, :, block], columns)
        tail = None if query_tail is None else query_tail[:, :, block]
        result = DENSE.kernel(
            query[:, :, block], key, value, seen, scale, sinks, query_tail=tail, key_tail=key_tail
        )
        assert isinstance(result, Tensor)
        found.append(result)
    return found[0] if len(found) == 1 else torch.cat(found, 1)


OP = CompositeOp(
    "sparse_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? mask,"
    " float scale, Tensor? sinks=None, Tensor? query_tail=None, Tensor? key_tail=None) -> Tensor",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=_inlined,
)
