"""Which rows go from which rank to which, if tokens move only to ranks that have experts for them.

Every rank knows the expert ids of all tokens, so it also knows how many rows each other rank sends
to it, and none of them has to say. A token goes once to a rank, however many experts it has there.
A dispatch and a combine are one exchange, in two directions: what a rank sends in the one, it
receives in the other.

Invariants:

* Rows of a block are in the order of their tokens, on both sides.
* Pads are no tokens: they do not move, and their contents are unspecified.
* Sums go from the first rank to the last, as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rolemesh.compiler.ir.placement import Shard
from rolemesh.lowering.chunks import chunk_units, cut, fill_pads

__all__ = [
    "Routes",
    "combine_pack",
    "combine_unpack",
    "dispatch_pack",
    "dispatch_unpack",
    "routes_of",
]


class Routes(NamedTuple):
    """The rows that one rank exchanges with each of its group, itself included.

    Attributes:
        own: Rows of its chunk that the ranks work on, those of the first rank first.
        own_counts: How many for each rank.
        whole: Rows of the whole value that it works on, those of the first rank's chunk first.
        whole_counts: How many from each rank's chunk.
    """

    own: Tensor
    own_counts: list[int]
    whole: Tensor
    whole_counts: list[int]

    def received(self, index: int, *, combines: bool) -> int:
        """Rows that the rank at `index` receives from others in a dispatch, or in a combine."""
        counts = self.own_counts if combines else self.whole_counts
        return sum(counts) - counts[index]


def routes_of(
    ids: Tensor, rows: Sequence[int], *, shard: Shard, size: int, parts: int, index: int
) -> Routes:
    """The routes of one rank.

    Args:
        ids: Expert ids of all tokens, `[N, k]`; one that names no expert leads nowhere.
        rows: Dims of the whole value that count tokens; together N.
        shard: The factor of one of them that is split over the ranks.
        size: Number of experts.
        parts: Ranks that tokens and experts are split over.
        index: The rank's position among them.
    """
    tokens, units = ids.shape[0], chunk_units(size, parts)
    owner = torch.where((ids >= 0) & (ids < size), ids // units, parts).long()
    works = torch.zeros(tokens + 1, parts + 1, dtype=torch.bool, device=ids.device)
    works[:tokens].scatter_(1, owner, True)  # its last row stands for pads, no rank works on them
    chunks = cut(torch.arange(tokens, device=ids.device).reshape(*rows), shard, parts)
    filled = [fill_pads(chunk, shard, parts, at, -1) for at, chunk in enumerate(chunks)]
    places = torch.stack(filled).reshape(parts, -1)
    sent, kept = works[places[index], :parts].T, works[places, index]
    return Routes(sent.nonzero()[:, 1], sent.sum(1).tolist(), places[kept], kept.sum(1).tolist())


def dispatch_pack(x: Tensor, routes: Routes) -> Tensor:
    """The rows that a rank sends, of its chunk `[.., H]`."""
    return x.reshape(-1, x.shape[-1]).index_select(0, routes.own)


def dispatch_unpack(
    received: Tensor, routes: Routes, *, tokens: int, fill: float | None = None
) -> Tensor:
    """The rows that a rank works on, among those of all tokens `[N, H]`; the others are `fill`."""
    shape = (tokens, received.shape[1])
    result = received.new_empty(shape) if fill is None else received.new_full(shape, fill)
    return result.index_copy_(0, routes.whole, received)


def combine_pack(x: Tensor, routes: Routes) -> Tensor:
    """The rows that a rank worked on, of its summand `[.., H]`."""
    return x.reshape(-1, x.shape[-1]).index_select(0, routes.whole)


def combine_unpack(received: Tensor, routes: Routes, *, shape: Sequence[int]) -> Tensor:
    """A rank's chunk of the sum, of `shape`."""
    total = received.new_zeros(shape)
    flat = total.view(-1, total.shape[-1])
    blocks = received.split(routes.own_counts)
    for rows, block in zip(routes.own.split(routes.own_counts), blocks, strict=True):
        flat.index_add_(0, rows, block)
    return total
