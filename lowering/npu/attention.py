"""Attention over whole, packed and paged keys, with grouped queries, masks and split rotary dims.

`softmax(scale * (q k^T + q_rope k_rope^T) + pse_shift) v` in fp32, rounded once. A mask excludes
what is not zero. By `sparse_mode`:

    0  the given mask, within `pre_tokens` and `next_tokens` of the diagonal from the upper left;
       without a mask everything is seen
    1  the given mask alone
    2  causal, the diagonal from the upper left
    3  causal, the diagonal to the lower right
    4  a band of `pre_tokens` and `next_tokens` around the diagonal to the lower right

Modes 2 to 4 are worked out from the lengths; their mask is always the same, the strictly upper
triangle of 2048 by 2048, and has to be given. A row that sees nothing is zero, and its log-sum-exp
is infinite. Rows past a sequence's length are zero too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rolemesh.lowering.npu.sequences import (
    lengths_of,
    pages,
    sequence_from_pages,
    sequences,
    split_heads,
)
from rolemesh.lowering.npu.table import refuse

__all__ = ["UNLIMITED", "Attention", "attend"]

UNLIMITED = 2147483647
"""The default of `pre_tokens` and `next_tokens`: no limit."""

TRIANGLE = 2048
"""Extent of the mask that modes 2 to 4 take."""

_RESULT = {
    **{layout: layout for layout in ("BSH", "BSND", "BNSD", "TND", "NTD", "NSD")},
    "BNSD_BSND": "BSND",
    "BSH_BNSD": "BNSD",
    "BSND_BNSD": "BNSD",
    "BSH_NBSD": "NBSD",
    "BSND_NBSD": "NBSD",
    "BNSD_NBSD": "NBSD",
    "NTD_TND": "TND",
    "TND_NTD": "NTD",
}
"""Layout of the result, by `input_layout`; that of the operands stands before the underscore."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of one sequence, in fp32.

    Args:
        query: `[N, S, D]`.
        key: `[M, T, D]`, where M divides N.
        value: `[M, T, E]`.
        scale: Factor of the products.
        seen: Boolean, broadcasts to `[N, S, T]`: keys that a query sees. None for all.
        bias: Added to the scaled products; broadcasts likewise.
        sink: `[N]`, the score of one more key, whose value is zero.

    Returns:
        `[N, S, E]`, the largest score `[N, S]`, and the sum of exponentials relative to it. For a
        row that sees nothing: zeros, minus infinity and zero.
    """
    heads, rows, width = query.shape
    kv_heads, columns, _ = key.shape
    grouped = query.float().reshape(kv_heads, heads // kv_heads * rows, width)
    scores = (grouped @ key.float().mT * scale).reshape(heads, rows, columns)
    if bias is not None:
        scores = scores + bias.float()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    largest = scores.new_full((heads, rows), -torch.inf)
    if columns:
        largest = scores.amax(-1)
    if sink is not None:
        largest = torch.maximum(largest, sink.float()[:, None])
    reference = torch.where(largest == -torch.inf, 0.0, largest)
    weights = (scores - reference[..., None]).exp()
    total = weights.sum(-1)
    if sink is not None:
        total = total + (sink.float()[:, None] - reference).exp()
    summed = weights.reshape(*grouped.shape[:2], columns) @ value.float()
    divisor = torch.where(total == 0, 1.0, total)
    return summed.reshape(heads, rows, value.shape[-1]) / divisor[..., None], largest, total


@dataclass(frozen=True)
class Attention:
    """One call of fused attention.

    Attributes:
        op: Name of the op, for messages.
        query: In `layout`'s order of dims.
        key: Likewise; with `block_table` a paged cache, see `pages`.
        value: Likewise.
        heads: Number of query heads.
        kv_heads: Number of key heads; 0 for as many.
        scale: Factor of the products.
        layout: A key of `_RESULT`.
        pse_shift: Added to the scores, `[B or 1, N, S, T]`, maybe with more columns.
        mask: See the module's docstring.
        query_lengths: Valid queries, see `sequences`.
        key_lengths: Valid keys; with `block_table` never ends, but lengths.
        block_table: `[B, blocks]`: the pages of each sequence.
        query_rope: More dims of the query's heads.
        key_rope: More dims of the key's heads.
        sink: `[N]`, see `attend`.
        sparse_mode: See the module's docstring.
        pre_tokens: Likewise.
        next_tokens: Likewise.
        block_size: Tokens in a page.
        lse: Whether the log-sum-exp is asked for.
    """

    op: str
    query: Tensor
    key: Tensor
    value: Tensor
    heads: int
    kv_heads: int
    scale: float
    layout: str
    pse_shift: Tensor | None
    mask: Tensor | None
    query_lengths: Sequence[int] | Tensor | None
    key_lengths: Sequence[int] | Tensor | None
    block_table: Tensor | None
    query_rope: Tensor | None
    key_rope: Tensor | None
    sink: Tensor | None
    sparse_mode: int
    pre_tokens: int
    next_tokens: int
    block_size: int
    lse: bool

    def result(self) -> tuple[Tensor, Tensor]:
        """Results without values, after a check of the options.

        Returns:
            The result of attention and the log-sum-exp `[B, N, S, 1]`, or `[T, N, 1]` for packed
            tokens; `[0]` if it was not asked for.
        """
        self._check()
        query, layout = split_heads(self.query, self._layout, self.heads)
        extent = dict(zip(layout, query.shape, strict=True))
        extent["D"] = self._value_width()
        extent["H"] = self.heads * extent["D"]
        dims = _RESULT[self.layout]
        out = query.new_empty([extent[dim] for dim in dims])
        order = "TN" if "T" in layout else "BNS"
        lse = [extent.get(dim, 1) for dim in order]
        return out, query.new_empty([*lse, 1] if self.lse else [0], dtype=torch.float32)

    def run(self) -> tuple[Tensor, Tensor]:
        """Results; see `result`."""
        out, lse = self.result()
        out.zero_()
        lse.zero_()
        query_lengths = None if self._one_query() else lengths_of(self.query_lengths)
        queries = self._views(self.query, query_lengths)
        if self.query_rope is not None:
            ropes = self._views(self.query_rope, query_lengths)
            queries = [torch.cat(pair, -1) for pair in zip(queries, ropes, strict=True)]
        keys, values = self._keys(len(queries))
        view, dims = split_heads(out, _RESULT[self.layout], self.heads)
        outs = sequences(view, dims, query_lengths)
        lses: list[Tensor | None] = [None] * len(queries)
        if self.lse:
            lses = list(sequences(lse, "TND" if "T" in dims else "BNSD", query_lengths))
        for index, (query, key) in enumerate(zip(queries, keys, strict=True)):
            rows, columns = query.shape[1], key.shape[1]
            seen = self._seen(index, rows, columns)
            bias = None
            if self.pse_shift is not None:
                bias = self.pse_shift[index % self.pse_shift.shape[0], :, :rows, :columns]
            found = attend(query, key, values[index], self.scale, seen, bias, self.sink)
            outs[index].copy_(found[0])
            given = lses[index]
            if given is not None:
                none = found[1] == -torch.inf
                given.copy_(torch.where(none, torch.inf, found[1] + found[2].log())[..., None])
        return out, lse

    @property
    def _layout(self) -> str:
        return self.layout.partition("_")[0]

    @property
    def _kv_heads(self) -> int:
        return self.kv_heads or self.heads

    def _check(self) -> None:
        known = self.layout in _RESULT
        refuse(self.op, input_layout=None if known else self.layout)
        refuse(self.op, sparse_mode=None if self.sparse_mode in range(5) else self.sparse_mode)
        torch._check(
            self.query.dim() == len(self._layout),
            lambda: f"query {list(self.query.shape)} is not {self._layout}",
        )
        if "N" in self._layout:
            found = self.query.shape[self._layout.index("N")]
            torch._check(found == self.heads, lambda: f"{found} heads, not num_heads={self.heads}")
        torch._check(
            self.heads % self._kv_heads == 0,
            lambda: f"{self._kv_heads} key heads do not divide {self.heads} query heads",
        )
        torch._check(
            (self.query_rope is None) == (self.key_rope is None),
            lambda: "query_rope and key_rope come together",
        )
        torch._check(
            self.block_table is not None or self.key.dim() == self.query.dim(),
            lambda: f"key {list(self.key.shape)} is not {self._layout}",
        )
        for value in (self.query, self.key, self.value):
            torch._check(value.is_floating_point(), lambda: "quantized operands need their scales")
        if "T" in self._layout:
            when = f"with input_layout {self.layout}"
            mask = self.mask if self.sparse_mode < 2 else None
            refuse(self.op, when, pse_shift=self.pse_shift, atten_mask=mask)
        self._check_mask()

    def _check_mask(self) -> None:
        if self.sparse_mode < 2:
            torch._check(
                self.sparse_mode == 0 or self.mask is not None,
                lambda: "sparse_mode 1 needs atten_mask",
            )
            return
        mask = self.mask
        torch._check(
            mask is not None and tuple(mask.shape[-2:]) == (TRIANGLE, TRIANGLE),
            lambda: f"sparse_mode {self.sparse_mode} needs atten_mask of {TRIANGLE} by {TRIANGLE}",
        )
        if self._one_query() and self.sparse_mode != 3 and self.query_rope is None:
            # Mode 3 shows one query everything, which is what ignoring the mode does too.
            refuse(self.op, "for one query: the device ignores it", sparse_mode=self.sparse_mode)

    def _value_width(self) -> int:
        if self.block_table is not None:
            return pages(self.value, self._kv_heads).shape[-1]
        return split_heads(self.value, self._layout, self._kv_heads)[0].shape[-1]

    def _views(self, x: Tensor, lengths: Sequence[int] | None) -> list[Tensor]:
        view, layout = split_heads(x, self._layout, self.heads)
        return sequences(view, layout, lengths)

    def _keys(self, count: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each sequence."""
        lengths = lengths_of(self.key_lengths)
        tensors = [self.key, self.value]
        if self.key_rope is not None:
            tensors.append(self.key_rope)
        found: list[list[Tensor]] = []
        for tensor in tensors:
            if self.block_table is None:
                view, layout = split_heads(tensor, self._layout, self._kv_heads)
                found.append(sequences(view, layout, lengths))
                continue
            torch._check(lengths is not None, lambda: "block_table needs the lengths of keys")
            assert lengths is not None
            lengths = lengths * count if len(lengths) == 1 else lengths
            paged = pages(tensor, self._kv_heads)
            torch._check(
                paged.shape[1] == self.block_size,
                lambda: f"block_size={self.block_size} for a cache of {list(tensor.shape)}",  # noqa: B023
            )
            rows = zip(self.block_table, lengths, strict=False)
            found.append([sequence_from_pages(paged, row, length) for row, length in rows])
        keys, values, *ropes = found
        for rope in ropes:
            keys = [torch.cat(pair, -1) for pair in zip(keys, rope, strict=True)]
        return keys, values

    def _seen(self, index: int, rows: int, columns: int) -> Tensor | None:
        """What each query of a sequence sees."""
        mask, mode = self.mask, self.sparse_mode
        if mask is None:
            return None
        if mode < 2:
            # [S, T], or for one query [B, T]; else [B or 1, ..., S, T].
            if mask.dim() == 2:
                mask = mask[:, None] if self._one_query() else mask[None]
            seen = mask[index % mask.shape[0]].reshape(-1, *mask.shape[-2:])[0] == 0
            seen = seen[:rows, :columns]
            if mode == 1 or self._one_query():
                return seen
            return seen & self._band(rows, columns, 0)
        torch._check(
            torch.equal(mask.reshape(TRIANGLE, TRIANGLE) != 0, _triangle()),
            lambda: f"sparse_mode {mode} takes the strictly upper triangle as atten_mask",
        )
        offset = 0 if mode == 2 else columns - rows
        if mode == 4:
            return self._band(rows, columns, offset)
        return _distance(rows, columns, offset) <= 0

    def _one_query(self) -> bool:
        """Whether each row is one query; the device then ignores options of longer rows."""
        return "S" in self._layout and bool(self.query.shape[self._layout.index("S")] == 1)

    def _band(self, rows: int, columns: int, offset: int) -> Tensor:
        distance = _distance(rows, columns, offset)
        return (distance <= self.next_tokens) & (distance >= -self.pre_tokens)


def _distance(rows: int, columns: int, offset: int) -> Tensor:
    """How far each key lies after each query, when query 0 lies at key `offset`."""
    return torch.arange(columns)[None] - torch.arange(rows)[:, None] - offset


@functools.cache
def _triangle() -> Tensor:
    return torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool).triu(1)
