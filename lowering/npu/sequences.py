"""Sequences of tokens inside tensors: batches, packed tokens and pages.

A layout names the dims of a tensor, one letter each: B batch, S tokens of a sequence, T tokens of
all sequences, N heads, D head dim. Everything here is a view, but for what is gathered from pages;
so a result is written by writing to the views of its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["lengths_of", "pages", "sequence_from_pages", "sequences", "split_heads"]


def lengths_of(given: Sequence[int] | Tensor | None) -> list[int] | None:
    """Lengths as integers."""
    if isinstance(given, Tensor):
        given = given.tolist()
    return None if given is None else [int(length) for length in given]


def split_heads(x: Tensor, layout: str, heads: int) -> tuple[Tensor, str]:
    """A view with a dim for the heads, and its layout; H is heads and head dim in one."""
    if layout.endswith("H"):
        return x.unflatten(-1, (heads, -1)), f"{layout[:-1]}ND"
    return x, layout


def sequences(x: Tensor, layout: str, lengths: Sequence[int] | None) -> list[Tensor]:
    """The valid tokens of each sequence.

    Args:
        x: A tensor.
        layout: Its dims. With T, sequences lie one after the other; with S, each starts a row of
            its own; without B there is one.
        lengths: Number of valid tokens of each sequence; with T, the end of each sequence. None
            for whole rows. One length stands for every row, and lengths beyond the batch are
            ignored.

    Returns:
        Views `[N, tokens, D]`, one per sequence.
    """
    if "T" in layout:
        torch._check(lengths is not None, lambda: f"layout {layout} needs the ends of sequences")
        assert lengths is not None
        tokens = x.permute([layout.index(dim) for dim in "NTD"])
        starts = [0, *lengths][: len(lengths)]
        _check_ends([0, *lengths], tokens.shape[1])
        return [tokens[:, start:end] for start, end in zip(starts, lengths, strict=True)]
    if "B" not in layout:
        x, layout = x.unsqueeze(0), f"B{layout}"
    rows = x.permute([layout.index(dim) for dim in "BNSD"])
    batch = rows.shape[0]
    if lengths is None:
        lengths = [rows.shape[2]] * batch
    elif len(lengths) == 1:
        lengths = [lengths[0]] * batch
    torch._check(len(lengths) >= batch, lambda: f"{len(lengths)} lengths for {batch} sequences")
    for length in lengths[:batch]:
        _check_ends([0, length], rows.shape[2])
    return [row[:, :length] for row, length in zip(rows, lengths, strict=False)]


def _check_ends(ends: Sequence[int], tokens: int) -> None:
    torch._check(
        list(ends) == sorted(ends) and ends[-1] <= tokens,
        lambda: f"sequences that end at {list(ends)} of {tokens} tokens",
    )


def pages(cache: Tensor, heads: int, *, tokens_first: bool = False) -> Tensor:
    """A view `[blocks, tokens, N, D]` of a paged cache.

    Args:
        cache: `[blocks, tokens, N * D]`; `[blocks, N, tokens, D]`, or with `tokens_first`
            `[blocks, tokens, N, D]`; or in fractal form `[blocks, N, D / 16, tokens, 16]`.
        heads: N.
        tokens_first: See `cache`.
    """
    torch._check(3 <= cache.dim() <= 5, lambda: f"{list(cache.shape)} is no paged cache")
    if cache.dim() == 3:
        return cache.unflatten(-1, (heads, -1))
    if cache.dim() == 5:
        return cache.permute(0, 3, 1, 2, 4).flatten(-2)
    return cache if tokens_first else cache.transpose(1, 2)


def sequence_from_pages(paged: Tensor, blocks: Tensor, length: int) -> Tensor:
    """One sequence `[N, tokens, D]`, from `pages` and the ids of its blocks, in order."""
    size = paged.shape[1]
    needed = -(-length // size)
    torch._check(
        needed <= blocks.shape[0],
        lambda: f"{length} tokens are in {needed} blocks; the block table has {blocks.shape[0]}",
    )
    found = paged[blocks[:needed].long()]
    return found.flatten(0, 1)[:length].transpose(0, 1)
