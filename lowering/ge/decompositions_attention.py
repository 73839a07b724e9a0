"""Decompositions of fused attention and of matmuls over groups of rows.

They serve graphs that no pass has rewritten to Ascend's fused ops, and the check of those passes:
plain ops, in float32 where the fused kernels of other devices keep float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType, NotImplementedType

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["ATTENTION", "grouped_rows"]

aten = torch.ops.aten

_Attention = tuple[Tensor | None, ...] | NotImplementedType
"""What a fused op returns. Only its result and the log-sum-exp are computed: the others are the
state of random dropout, and sizes and masks for the backward pass."""


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention in float32. A row that sees no key gives zeros, in both results.

    Args:
        query: `[batch, heads, rows, width]`.
        key: `[batch, groups, columns, width]`; `heads` is a multiple of `groups`.
        value: `[batch, groups, columns, value width]`.
        mask: Boolean (true is seen) or added to the scores; broadcasts to
            `[batch, heads, rows, columns]`.
        is_causal: Whether row i sees columns up to i only.
        scale: Factor of the scores; `1 / sqrt(width)` if None.

    Returns:
        The result `[batch, heads, rows, value width]` in the query's dtype, and the logarithm of
        the sum of exponentials of the scores, `[batch, heads, rows]`.
    """
    batch, heads, rows, width = query.shape
    groups, columns = key.shape[1], key.shape[2]
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    together = (batch, groups, heads // groups * rows)
    scaled = query.to(wide) * (1 / math.sqrt(width) if scale is None else scale)
    scores = scaled.reshape(*together, width) @ key.to(wide).mT
    scores = scores.reshape(batch, heads, rows, columns)
    if is_causal:
        row = torch.arange(rows, device=query.device).unsqueeze(-1)
        seen = torch.arange(columns, device=query.device) <= row
        scores = torch.where(seen, scores, -math.inf)
    if mask is not None and mask.dtype is torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(wide)
    weights = torch.softmax(scores, -1)
    result = weights.reshape(*together, columns) @ value.to(wide)
    result = result.reshape(batch, heads, rows, value.shape[-1])
    total = torch.logsumexp(scores, -1)
    if mask is not None:
        blind = scores.amax(-1) == -math.inf
        result = torch.where(blind.unsqueeze(-1), 0.0, result)
        total = torch.where(blind, 0.0, total)
    return result.to(query.dtype), total


def _flash_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> _Attention:
    if dropout_p:
        return NotImplemented
    return _attend(query, key, value, attn_mask, is_causal, scale)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> _Attention:
    if dropout_p:
        return NotImplemented
    return (*_attend(query, key, value, None, is_causal, scale), *[None] * 7)


def _efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> _Attention:
    """Its log-sum-exp is padded to the kernel's block, and for the backward pass only."""
    if dropout_p:
        return NotImplemented
    return (_attend(query, key, value, attn_bias, is_causal, scale)[0], None, None, None)


def _overrideable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> _Attention:
    if dropout_p:
        return NotImplemented
    return (*_attend(query, key, value, attn_bias, is_causal, scale), *[None] * 7)


def grouped_rows(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Each row times the matrix of its group.

    Every matrix meets every row: which rows a group has is known only when the graph runs, and the
    sizes in a GE graph are not. Ascend's GroupedMatmul has no such cost.

    Args:
        rows: `[rows, inner]`, those of one group in a row.
        matrices: `[groups, inner, columns]`.
        ends: `[groups]`, for each group the number of its last row plus one.

    Returns:
        `[rows, columns]`; zeros for rows behind the last group.
    """
    group = _groups(rows.shape[0], ends)
    result = rows.new_zeros(rows.shape[0], matrices.shape[-1])
    for index in range(matrices.shape[0]):
        result = torch.where((group == index).unsqueeze(-1), rows @ matrices[index], result)
    return result


def _groups(count: int, ends: Tensor) -> Tensor:
    """For each of `count` places the group that it is in, or the number of groups."""
    places = torch.arange(count, dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, places, right=True)


def _grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | NotImplementedType:
    """The four forms of `torch.nn.functional.grouped_mm`, by which operands have a group dim."""
    if bias is not None:
        return NotImplemented
    if offs is None:
        found = self @ mat2
    elif self.dim() == 2 and mat2.dim() == 3:
        found = grouped_rows(self, mat2, offs)
    elif self.dim() == 3:
        found = grouped_rows(mat2.mT, self.mT, offs).mT
    else:
        group = _groups(self.shape[1], offs)
        parts = [torch.where(group == index, self, 0) @ mat2 for index in range(offs.shape[0])]
        found = torch.stack(parts)
    return found.to(out_dtype or self.dtype)


ATTENTION: Mapping[OpOverload, Callable[..., object]] = MappingProxyType(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_for_cpu,
        aten._scaled_dot_product_flash_attention.default: _flash,
        aten._scaled_dot_product_efficient_attention.default: _efficient,
        aten._scaled_dot_product_fused_attention_overrideable.default: _overrideable,
        aten._grouped_mm.default: _grouped_mm,
    }
)
"""Op -> its decomposition, which returns NotImplemented for arguments that it leaves alone."""
