"""Sparse attention: the indexer that picks keys for each query, and attention over those picked.

Both work in fp32. Layouts are BSND and TND for queries and keys, and for keys PA_BSND too, pages of
`[blocks, tokens, N, D]` that `block_table` orders. Lengths of queries are ends for TND; those of
keys are ends for TND and lengths otherwise. In sparse mode 3 the diagonal runs to the lower right:
query i of S sees keys up to `T - S + i` of T. In mode 0 it sees all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.npu.attention import attend
from rolemesh.lowering.npu.sequences import lengths_of, pages, sequence_from_pages, sequences
from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = ["OPS", "UNLIMITED", "lightning_indexer", "sparse_flash_attention"]

OPS = NpuOpTable()

UNLIMITED = 9223372036854775807
"""The only value that `pre_tokens` and `next_tokens` may have: no limit."""

_PAGED = "PA_BSND"


def _check(
    op: str,
    query: Tensor,
    key: Tensor,
    layouts: tuple[str, str],
    sparse_mode: int,
    limits: tuple[int, int],
    block_table: Tensor | None,
) -> None:
    layout_query, layout_key = layouts
    refuse(op, layout_query=None if layout_query in ("BSND", "TND") else layout_query)
    known = layout_key in (layout_query, _PAGED)
    refuse(op, f"with layout_query {layout_query}", layout_key=None if known else layout_key)
    refuse(op, sparse_mode=None if sparse_mode in (0, 3) else sparse_mode)
    for name, limit in zip(("pre_tokens", "next_tokens"), limits, strict=True):
        refuse(op, **{name: None if limit == UNLIMITED else limit})
    torch._check(
        query.dim() == len(layout_query) and key.dim() == (3 if layout_key == "TND" else 4),
        lambda: f"{list(query.shape)} is not {layout_query}, or {list(key.shape)} not {layout_key}",
    )
    torch._check(
        (block_table is None) == (layout_key != _PAGED),
        lambda: f"block_table goes with layout {_PAGED}",
    )


def _heads(key: Tensor, layout: str) -> int:
    return key.shape[1 if layout == "TND" else 2]


def _keys(
    x: Tensor, layout: str, lengths: Tensor | None, block_table: Tensor | None
) -> list[Tensor]:
    """Keys of each sequence, `[N, tokens, D]`."""
    found = lengths_of(lengths)
    if block_table is None:
        return sequences(x, layout, found)
    torch._check(found is not None, lambda: "pages of keys need the lengths of sequences")
    assert found is not None
    paged = pages(x, x.shape[2], tokens_first=True)
    rows = zip(block_table, found, strict=True)
    return [sequence_from_pages(paged, blocks, length) for blocks, length in rows]


def _causal(rows: int, columns: int, sparse_mode: int) -> Tensor:
    """What each query may see, `[rows, columns]`."""
    seen = torch.ones(rows, columns, dtype=torch.bool)
    return seen.tril(columns - rows) if sparse_mode == 3 else seen


def _lightning_indexer_shape(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    return_value: bool = False,
) -> tuple[Tensor, Tensor]:
    limits = (pre_tokens, next_tokens)
    layouts = (layout_query, layout_key)
    _check("npu_lightning_indexer", query, key, layouts, sparse_mode, limits, block_table)
    torch._check(
        weights.shape == query.shape[:-1],
        lambda: f"weights {list(weights.shape)} for queries {list(query.shape)}",
    )
    shape = [*query.shape[:-2], _heads(key, layout_key), sparse_count]
    indices = query.new_empty(shape, dtype=torch.int32)
    return indices, query.new_empty(shape if return_value else [0])


@OPS.op(
    "npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *,"
    " Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_key=None,"
    " Tensor? block_table=None, str layout_query='BSND', str layout_key='BSND',"
    " int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807,"
    " int next_tokens=9223372036854775807, bool return_value=False) -> (Tensor, Tensor)",
    ge="LightningIndexer",
    shape=_lightning_indexer_shape,
)
def lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    return_value: bool = False,
) -> tuple[Tensor, Tensor]:
    """The keys with the largest `sum over heads of weight * relu(q k)`, best first.

    Returns:
        int32 indices `[..., N of key, sparse_count]`, -1 where a query sees fewer keys, and with
        `return_value` their scores in query's dtype, minus infinity there.
    """
    indices, values = _lightning_indexer_shape(
        query,
        key,
        weights,
        block_table=block_table,
        layout_query=layout_query,
        layout_key=layout_key,
        sparse_count=sparse_count,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        return_value=return_value,
    )
    indices.fill_(-1)
    values.fill_(-torch.inf)
    lengths = lengths_of(actual_seq_lengths_query)
    queries = sequences(query, layout_query, lengths)
    factors = sequences(weights[..., None], layout_query, lengths)
    keys = _keys(key, layout_key, actual_seq_lengths_key, block_table)
    indices_of = sequences(indices, layout_query, lengths)
    values_of = sequences(values, layout_query, lengths) if return_value else []
    for place, (q, k, factor) in enumerate(zip(queries, keys, factors, strict=True)):
        scores = _index_scores(q, k, factor)
        seen = _causal(q.shape[1], k.shape[1], sparse_mode)
        scores = scores.masked_fill(~seen, -torch.inf)
        ranked = torch.sort(scores, stable=True, dim=-1, descending=True)
        count = min(sparse_count, k.shape[1])
        best = ranked.values[..., :count]
        found = ranked.indices[..., :count].masked_fill(best == -torch.inf, -1)
        indices_of[place][..., :count] = found.int()
        if return_value:
            values_of[place][..., :count] = best.to(values.dtype)
    return indices, values


def _index_scores(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
    """Scores `[N of key, S, T]`; one head at a time, since all heads together may be gigabytes."""
    heads = key.shape[0]
    group = query.shape[0] // heads
    scores = torch.zeros(heads, query.shape[1], key.shape[1])
    for head in range(query.shape[0]):
        products = query[head].float() @ key[head // group].float().mT
        scores[head // group] += products.relu() * weights[head].float()
    return scores


def _check_sparse(
    query: Tensor,
    key: Tensor,
    sparse_indices: Tensor,
    query_rope: Tensor | None,
    key_rope: Tensor | None,
    layouts: tuple[str, str],
    attention_mode: int,
    return_softmax_lse: bool,
) -> None:
    op = "npu_sparse_flash_attention"
    refuse(op, attention_mode=None if attention_mode == 2 else attention_mode)
    torch._check(
        query_rope is not None and key_rope is not None,
        lambda: "attention_mode 2 takes query_rope and key_rope",
    )
    if layouts[1] == _PAGED:
        refuse(op, f"with layout_kv {_PAGED}", return_softmax_lse=return_softmax_lse)
    wanted = [*query.shape[:-2], _heads(key, layouts[1])]
    torch._check(
        list(sparse_indices.shape[:-1]) == wanted,
        lambda: f"sparse_indices {list(sparse_indices.shape)} for queries {list(query.shape)}",
    )


def _sparse_flash_attention_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    *,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    attention_mode: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    limits = (pre_tokens, next_tokens)
    layouts = (layout_query, layout_kv)
    _check("npu_sparse_flash_attention", query, key, layouts, sparse_mode, limits, block_table)
    _check_sparse(
        query,
        key,
        sparse_indices,
        query_rope,
        key_rope,
        layouts,
        attention_mode,
        return_softmax_lse,
    )
    shape = [0]
    if return_softmax_lse:
        heads = _heads(key, layout_kv)
        group = query.shape[-2] // heads
        lead = [query.shape[0], heads, query.shape[1]]
        shape = [*(lead if layout_query == "BSND" else [heads, query.shape[0]]), group]
    out = query.new_empty(query.shape)
    largest = query.new_empty(shape, dtype=torch.float32)
    return out, largest, query.new_empty(shape, dtype=torch.float32)


@OPS.op(
    "npu_sparse_flash_attention(Tensor query, Tensor key, Tensor? value, Tensor sparse_indices,"
    " float scale_value, *, Tensor? block_table=None, Tensor? actual_seq_lengths_query=None,"
    " Tensor? actual_seq_lengths_kv=None, Tensor? query_rope=None, Tensor? key_rope=None,"
    " int sparse_block_size=1, str layout_query='BSND', str layout_kv='BSND', int sparse_mode=3,"
    " int pre_tokens=9223372036854775807, int next_tokens=9223372036854775807,"
    " int attention_mode=0, bool return_softmax_lse=False, Tensor? sinks=None)"
    " -> (Tensor, Tensor, Tensor)",
    ge="SparseFlashAttention",
    shape=_sparse_flash_attention_shape,
)
def sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    *,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    attention_mode: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the blocks of `sparse_block_size` keys that `sparse_indices` picks.

    Args:
        query: The latent dims of the queries, in `layout_query`.
        key: Those of the keys, in `layout_kv`.
        value: As key; None for key itself.
        sparse_indices: int32 `[..., N of key, picks]`; a row ends at its first -1.
        scale_value: Factor of the products.
        block_table: See the module's docstring.
        actual_seq_lengths_query: Likewise.
        actual_seq_lengths_kv: Likewise.
        query_rope: The rotary dims of the queries.
        key_rope: Those of the keys.
        sparse_block_size: Keys in a block.
        layout_query: See the module's docstring.
        layout_kv: Likewise.
        sparse_mode: Likewise.
        pre_tokens: No other value than the default.
        next_tokens: Likewise.
        attention_mode: 2, attention over the latent of MLA, is the only one.
        return_softmax_lse: Whether to give the softmax's maximum and sum.
        sinks: `[N of query]`, the score of one more key, whose value is zero.

    Returns:
        The result, and the softmax's maximum and sum `[B, N of key, S, group]`, or
        `[N of key, T, group]` for TND. A query that sees nothing has zeros in all three.
    """
    out, largest, total = _sparse_flash_attention_shape(
        query,
        key,
        value,
        sparse_indices,
        scale_value,
        block_table=block_table,
        query_rope=query_rope,
        key_rope=key_rope,
        layout_query=layout_query,
        layout_kv=layout_kv,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        attention_mode=attention_mode,
        return_softmax_lse=return_softmax_lse,
    )
    assert query_rope is not None
    assert key_rope is not None
    for result in (out, largest, total):
        result.zero_()
    lengths = lengths_of(actual_seq_lengths_query)
    keys = _keys(torch.cat([key, key_rope], -1), layout_kv, actual_seq_lengths_kv, block_table)
    values = _keys(key if value is None else value, layout_kv, actual_seq_lengths_kv, block_table)
    queries = sequences(torch.cat([query, query_rope], -1), layout_query, lengths)
    picks = sequences(sparse_indices, layout_query, lengths)
    outs = sequences(out, layout_query, lengths)
    layout_lse = "BNSD" if layout_query == "BSND" else "NTD"
    lses = [sequences(x, layout_lse, lengths) for x in (largest, total) if return_softmax_lse]
    for place, (q, k, v, picked) in enumerate(zip(queries, keys, values, picks, strict=True)):
        heads, rows, columns = k.shape[0], q.shape[1], k.shape[1]
        seen = _picked(picked, columns, sparse_block_size) & _causal(rows, columns, sparse_mode)
        seen = seen.repeat_interleave(q.shape[0] // heads, 0)
        found, *softmax = attend(q, k, v, scale_value, seen, sink=sinks)
        outs[place].copy_(found)
        for views, given in zip(lses, softmax, strict=False):
            plain = torch.where(given == -torch.inf, 0.0, given)
            views[place].copy_(plain.unflatten(0, (heads, -1)).mT)
    return out, largest, total


def _picked(picks: Tensor, columns: int, block: int) -> Tensor:
    """Whether a key is in a block that is picked, `[N, S, columns]`."""
    blocks = -(-columns // block)
    valid = (picks >= 0).cummin(-1).values & (picks < blocks)
    chosen = torch.zeros(*picks.shape[:-1], blocks + 1, dtype=torch.bool)
    chosen.scatter_(-1, torch.where(valid, picks, blocks).long(), True)
    return chosen[..., :blocks].repeat_interleave(block, -1)[..., :columns]
