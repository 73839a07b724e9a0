"""Gradients of grouped products on one rank's experts: the mesh ops `grouped_*` of the dialect.

A grouped product gives all rows before its first offset to its first expert. In the forward pass
such rows of the result belong to other ranks and do not matter; a sum over rows would count them.
So rows of other ranks are zero here before anything is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.chunks import chunk_units

__all__ = ["grouped_backward", "grouped_sums"]


def _own(offs: Tensor, rows: int, size: int, parts: int, index: int) -> tuple[Tensor, Tensor]:
    """Which rows are of this rank's experts, and where its experts' rows end; pads have none."""
    units = chunk_units(size, parts)
    held = (torch.arange(units, device=offs.device) + index * units).clamp(max=size - 1)
    ends = offs.index_select(0, held)
    first, last = min(index * units, size), min((index + 1) * units, size)
    row = torch.arange(rows, device=offs.device)
    start = offs[first - 1] if first else 0
    return (row >= start) & (row < (offs[last - 1] if last else 0)), ends


def grouped_backward(
    x: Tensor, w: Tensor, offs: Tensor, grad: Tensor, *, size: int, parts: int, index: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `transformers::grouped_mm_fallback(x, w, offs)` by one rank's experts.

    Args:
        x: `[R, K]`, rows sorted by expert.
        w: `[E / parts, K, N]`, the rank's chunk, pads included.
        offs: `[E]`, where the rows of each expert end.
        grad: `[R, N]`.
        size: E.
        parts: Ranks that the experts are split over.
        index: The rank's position among them.

    Returns:
        The gradient of x, zero in rows of other ranks, and that of the chunk of w.
    """
    owned, ends = _own(offs, x.shape[0], size, parts, index)
    x, grad = (torch.where(owned[:, None], rows, 0) for rows in (x, grad))
    found: tuple[Tensor, Tensor] = torch.ops.transformers.grouped_mm_fallback_backward(
        x, w, ends, grad
    )
    return found


def grouped_sums(
    x: Tensor, y: Tensor, offs: Tensor, *, size: int, parts: int, index: int
) -> Tensor:
    """`[E / parts, M, N]`: for each expert its columns of `x [M, R]` times its rows of `y [R, N]`.

    The other arguments are those of `grouped_backward`.
    """
    owned, ends = _own(offs, y.shape[0], size, parts, index)
    return torch._grouped_mm(torch.where(owned, x, 0), torch.where(owned[:, None], y, 0), ends)
