"""Which rows of a tensor a rank holds, and what it gets of a block of rows.

A block is a range of indices of dim 0 of a whole tensor ("rows"; a tensor without dims counts as
one row). Rows are placed by the layout's shards of dim 0; within a row, its other shards cut. So a
tensor can be handed out block by block, without ever being whole.

All cuts are those of `rolemesh.lowering.chunks.scatter_one`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Segmented, Shard
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.chunks import holds, scatter_one

__all__ = ["Run", "as_bytes", "as_rows", "clipped", "empty_local", "piece", "runs"]


class Run(NamedTuple):
    """Consecutive rows of a tensor that are consecutive in a rank's shard, too.

    Attributes:
        start: The first one's index in the whole tensor.
        local: Its index in the shard.
        rows: Number of rows.
    """

    start: int
    local: int
    rows: int


@lru_cache(maxsize=4096)
def runs(layout: Layout, kind: TensorType, mesh: Mesh, rank: int) -> tuple[Run, ...]:
    """The rows of a tensor that a rank holds, in the order of its shard; pads repeat a row."""
    if not holds(layout, mesh, rank):
        return ()
    rows = kind.shape[0] if kind.shape else 1
    held = scatter_one(torch.arange(rows), _cuts_of(layout, of_rows=True), mesh, rank)
    breaks = (held.diff() != 1).nonzero().flatten() + 1
    edges = pairwise([0, *breaks.tolist(), len(held)])
    return tuple(Run(int(held[begin]), begin, end - begin) for begin, end in edges if end > begin)


def clipped(held: Sequence[Run], start: int, stop: int) -> list[Run]:
    """The part of runs that lies in the rows from `start` to before `stop`."""
    parts = []
    for run in held:
        begin, end = max(run.start, start), min(run.start + run.rows, stop)
        if begin < end:
            parts.append(Run(begin, run.local + begin - run.start, end - begin))
    return parts


def piece(
    block: torch.Tensor, start: int, held: Sequence[Run], layout: Layout, mesh: Mesh, rank: int
) -> torch.Tensor:
    """What a rank gets of a block: its rows one after the other, each cut as the layout says.

    Args:
        block: Rows of the whole tensor.
        start: Index of the first one.
        held: The runs of the rank within the block, at least one.
        layout: The tensor's layout.
        mesh: The mesh.
        rank: The rank.

    Returns:
        A contiguous tensor; a view of the block where nothing needs to be copied.
    """
    parts = [block.narrow(0, run.start - start, run.rows) for run in held]
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    within = _cuts_of(layout, of_rows=False)
    return rows if within.is_replicated else scatter_one(rows, within, mesh, rank)


def empty_local(kind: TensorType, layout: Layout, mesh: Mesh, rank: int) -> torch.Tensor:
    """A rank's shard before its rows arrive; without bytes if it holds none of the tensor."""
    shape = layout.local_shape(kind.shape, mesh) if holds(layout, mesh, rank) else (0,)
    return torch.empty(shape, dtype=kind.dtype)


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one row of it if it has no dims."""
    return tensor if tensor.ndim else tensor.view(1)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, as a view."""
    return tensor.view(-1).view(torch.uint8)


def _cuts_of(layout: Layout, *, of_rows: bool) -> Layout:
    """The shards of dim 0 alone, or all others."""
    return Layout(
        tuple(
            p if isinstance(p, Shard | Segmented) and (p.dim == 0) == of_rows else REPLICATE
            for p in layout.placements
        )
    )
