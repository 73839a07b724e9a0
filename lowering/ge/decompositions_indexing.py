"""Decompositions of ops that read or write elements at places given by indices.

Everything becomes ops whose places are one index per row of one dim: `scatter`, `index_add`,
`index_select`, `cumsum`, `where`, and slices.

Invariants:

* A decomposition computes what the op does for all valid arguments, or returns NotImplemented; the
  op then stays in the graph and is refused there.
* No result depends on memory layout: there are no strides in a GE graph.
* Negative indices are made positive: GE's scatters count from the front only.
"""

# ruff: noqa: A002 - arguments are called what the schemas of the ops call them

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, NotImplementedType

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["INDEXING"]

aten = torch.ops.aten

_MASKS = (torch.bool, torch.uint8)
"""Dtypes of an index that is a mask: it names the places where it is true."""

_Indices = Sequence[Tensor | None]


def _index_put(
    self: Tensor, indices: _Indices, values: Tensor, accumulate: bool = False
) -> Tensor | NotImplementedType:
    """`index_put`, and its `_unsafe` form that does not check indices.

    See https://numpy.org/doc/stable/user/basics.indexing.html#combining-advanced-and-basic-indexing
    for where the indexed dims are in `values`.
    """
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(index.dtype in _MASKS for _, index in given):
        return (
            _put_at_mask(self, *given[0], values, accumulate) if len(given) == 1 else NotImplemented
        )
    dims = [dim for dim, _ in given]
    first, count = dims[0], len(dims)
    if dims != list(range(first, first + count)):
        order = dims + [dim for dim in range(self.dim()) if dim not in dims]
        places = [index for _, index in given]
        moved = _index_put(self.permute(order), places, values, accumulate)
        assert isinstance(moved, Tensor)
        return moved.permute([order.index(dim) for dim in range(self.dim())])
    sizes = self.shape[first : first + count]
    places = torch.broadcast_tensors(*(index.to(torch.int64) for _, index in given))
    rows = _row_numbers(places, sizes)
    before, after = list(self.shape[:first]), list(self.shape[first + count :])
    values = values.expand([*before, *rows.shape, *after])
    values = values.reshape([*before, rows.numel(), *after])
    flat = self.reshape([*before, math.prod(sizes), *after])
    return _put_rows(flat, first, rows.reshape(-1), values, accumulate).reshape(self.shape)


def _row_numbers(places: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Positions in dims of these sizes, merged into one, of coordinates that may be negative."""
    rows: Tensor | None = None
    for place, size in zip(places, sizes, strict=True):
        place = torch.where(place < 0, place + size, place)
        rows = place if rows is None else rows * size + place
    assert rows is not None
    return rows


def _put_rows(self: Tensor, dim: int, rows: Tensor, values: Tensor, accumulate: bool) -> Tensor:
    """Write, or add, `values[i]` to `self[rows[i]]` along `dim`."""
    if values.numel() == 0:
        return self.clone()
    if self.dtype is torch.bool:  # GE scatters numbers; adding truth values is a logical or
        number = torch.int32
        return _put_rows(self.to(number), dim, rows, values.to(number), accumulate) != 0
    if accumulate:
        return aten.index_add.default(self, dim, rows, values)
    shape = [1] * self.dim()
    shape[dim] = rows.shape[0]
    return aten.scatter.src(self, dim, rows.reshape(shape).expand(values.shape), values)


def _put_at_mask(self: Tensor, dim: int, mask: Tensor, values: Tensor, accumulate: bool) -> Tensor:
    """Write, or add, where a mask over `mask.dim()` dims from `dim` on is true."""
    mask = mask != 0
    after = self.dim() - dim - mask.dim()
    if values.dim() > after:  # then the dim before those counts the places where it is true
        lead, trail = (
            list(values.shape[: values.dim() - after - 1]),
            values.shape[values.dim() - after :],
        )
        count = values.shape[values.dim() - after - 1]
        if count == 0:
            return self.clone()
        if count != 1:
            values = values.index_select(values.dim() - after - 1, _order(mask, count))
        places = [1] * mask.dim() if count == 1 else list(mask.shape)
        values = values.reshape([*lead, *places, *trail])
    where = mask.reshape([*mask.shape, *[1] * after])
    if not accumulate:
        return torch.where(where, values, self)
    return torch.where(where, self | values if self.dtype is torch.bool else self + values, self)


def _order(mask: Tensor, count: int) -> Tensor:
    """For each element of a mask, in a row, how many true ones are before it; below `count`."""
    before = mask.reshape(-1).to(torch.int64).cumsum(0) - 1
    return before.clamp(0, count - 1)


def _masked_scatter(self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    self, mask = torch.broadcast_tensors(self, mask)
    if source.numel() == 0:
        return self.clone()
    values = source.reshape(-1).index_select(0, _order(mask, source.numel()))
    return torch.where(mask, values.reshape(self.shape), self)


def _unsafe_index(self: Tensor, indices: _Indices) -> Tensor:
    return aten.index.Tensor(self, indices)


def _index_select(self: Tensor, dim: int, index: Tensor) -> Tensor | NotImplementedType:
    """Torchair's converter gives a tensor without dims a first dim."""
    return NotImplemented if self.dim() else self.clone()


def _index_add(
    self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1
) -> Tensor | NotImplementedType:
    """Torchair's converter needs a dim to count rows in."""
    if self.dim():
        return NotImplemented
    row = self.reshape(1)
    return aten.index_add.default(row, 0, index.reshape(1), source.reshape(1), alpha=alpha)[0]


def _embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | NotImplementedType:
    """The flags concern gradients only; torchair's converter refuses them."""
    if not scale_grad_by_freq and not sparse:
        return NotImplemented
    return aten.embedding.default(weight, indices)


def _scatter_reduce(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if self.dim() == 0:
        row, places, values = (x.reshape(1) for x in (self, index, src))
        return _scatter_reduce(row, 0, places, values, reduce, include_self=include_self)[0]
    if index.numel() == 0:
        return self.clone()
    if self.dtype is torch.bool:
        number, values = self.to(torch.int32), src.to(torch.int32)
        found = _scatter_reduce(number, dim, index, values, reduce, include_self=include_self)
        return found != 0
    for axis, size in enumerate(index.shape):
        src = src.narrow(axis, 0, size)
    if reduce not in ("sum", "mean"):
        return _scatter_reduce_by_comparing(
            self, dim % self.dim(), index, src, reduce, include_self
        )
    base = self if include_self else aten.scatter.value(self, dim, index, 0)
    total = aten.scatter_add.default(base, dim, index, src)
    if reduce == "sum":
        return total
    ones = torch.ones_like(self)
    starts = ones if include_self else aten.scatter.value(ones, dim, index, 0)
    count = aten.scatter_add.default(starts, dim, index, torch.ones_like(src))
    return total / count if total.is_floating_point() else total // count


def _scatter_reduce_by_comparing(
    self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool
) -> Tensor:
    """Reductions that GE's scatter has not, over `[..., rows of self, rows of src]`."""
    place = index.to(torch.int64).movedim(dim, -1).unsqueeze(-2)
    hit = place == torch.arange(self.shape[dim], device=self.device).unsqueeze(-1)
    neutral = _neutral(reduce, self.dtype)
    spread = torch.where(hit, src.movedim(dim, -1).unsqueeze(-2), neutral)
    if reduce == "prod":
        found = spread.prod(-1, dtype=self.dtype)
    else:
        found = spread.amax(-1) if reduce == "amax" else spread.amin(-1)
    found, any_hit = found.movedim(-1, dim), hit.any(-1).movedim(-1, dim)
    pads = [(0, whole - part) for whole, part in zip(self.shape, found.shape, strict=True)]
    if any(pad != (0, 0) for pad in pads):  # the index may cover a part of the other dims
        widths = [width for pad in reversed(pads) for width in pad]
        found = aten.constant_pad_nd.default(found, widths, neutral)
        any_hit = aten.constant_pad_nd.default(any_hit.to(torch.int32), widths, 0) != 0
    if not include_self:
        return torch.where(any_hit, found, self)
    return _COMBINE[reduce](self, found)


_COMBINE: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"prod": torch.mul, "amax": torch.maximum, "amin": torch.minimum}
)
"""Reductions of two values."""


def _neutral(reduce: str, dtype: torch.dtype) -> float:
    """The value that changes no other one in a reduction."""
    if reduce == "prod":
        return 1.0 if dtype.is_floating_point else 1
    if dtype.is_floating_point:
        return -math.inf if reduce == "amax" else math.inf
    limits = torch.iinfo(dtype)
    return limits.min if reduce == "amax" else limits.max


def _scatter_with(self: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    """`scatter.reduce`, an older form of `scatter_reduce`."""
    return _scatter_reduce(self, dim, index, src, {"add": "sum", "multiply": "prod"}[reduce])


def _scatter_value_with(
    self: Tensor, dim: int, index: Tensor, value: float, *, reduce: str
) -> Tensor:
    """`scatter.value_reduce`, likewise."""
    src = torch.full(index.shape, value, dtype=self.dtype, device=self.device)
    return _scatter_with(self, dim, index, src, reduce=reduce)


def _index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if self.dim() == 0:
        row, values = self.reshape(1), source.reshape(1)
        return _index_reduce(row, 0, index, values, reduce, include_self=include_self)[0]
    shape = [1] * self.dim()
    shape[dim] = index.shape[0] if index.dim() else 1
    places = index.reshape(shape).expand(source.shape)
    return _scatter_reduce(self, dim, places, source, reduce, include_self=include_self)


def _repeat_interleave(
    repeats: Tensor, *, output_size: int | None = None
) -> Tensor | NotImplementedType:
    """Row i of the result is the entry whose repeats cover place i."""
    if output_size is None:  # then the size is the sum of the values
        return NotImplemented
    ends = repeats.to(torch.int64).cumsum(0)
    places = torch.arange(output_size, device=repeats.device)
    return torch.searchsorted(ends, places, right=True).to(repeats.dtype)


def _bincount(
    self: Tensor, weights: Tensor | None = None, minlength: int = 0
) -> Tensor | NotImplementedType:
    """Counts of the values below `minlength`. A larger value is an index out of range."""
    if minlength == 0:  # then the size is one more than the largest value
        return NotImplemented
    if weights is None:
        weights = torch.ones_like(self, dtype=torch.int64)
    elif weights.dtype is not torch.float32:
        weights = weights.to(torch.float64)
    counts = torch.zeros(minlength, dtype=weights.dtype, device=self.device)
    return aten.index_add.default(counts, 0, self, weights)


def _histc(self: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Values outside the range, and NaN, are counted in a bin that is dropped."""
    values = self.reshape(-1)
    if self.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    low: Tensor | float = min
    high: Tensor | float = max
    if min == max and self.numel():
        low, high = values.amin(), values.amax()
        point = low == high
        low, high = torch.where(point, low - 1, low), torch.where(point, high + 1, high)
    elif min == max:
        low, high = min - 1, max + 1
    inside = (values >= low) & (values <= high)
    places = ((values - low) * bins / (high - low)).to(torch.int64).clamp(max=bins - 1)
    places = torch.where(inside, places, bins)
    counts = torch.zeros(bins + 1, dtype=torch.int32, device=self.device)
    ones = torch.ones_like(places, dtype=torch.int32)
    return aten.index_add.default(counts, 0, places, ones)[:bins].to(self.dtype)


def _diagonal(self: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    """Every `columns + 1`-th element of the two dims merged."""
    rows, columns = self.shape[dim1], self.shape[dim2]
    count, first = _diagonal_places(rows, columns, offset)
    flat = self.movedim((dim1, dim2), (-2, -1)).flatten(-2)
    return flat[..., first : first + count * (columns + 1) : columns + 1][..., :count]


def _diagonal_scatter(
    self: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    rows, columns = self.shape[dim1], self.shape[dim2]
    count, first = _diagonal_places(rows, columns, offset)
    moved = self.movedim((dim1, dim2), (-2, -1))
    places = torch.arange(count, device=self.device) * (columns + 1) + first
    flat = moved.flatten(-2)
    flat = _put_rows(flat, flat.dim() - 1, places, src, accumulate=False)
    return flat.reshape(moved.shape).movedim((-2, -1), (dim1, dim2))


def _diagonal_places(rows: int, columns: int, offset: int) -> tuple[int, int]:
    """Length of a diagonal, and the position of its first element in the merged dims."""
    below, right = max(-offset, 0), max(offset, 0)
    return max(min(rows - below, columns - right), 0), below * columns + right


def _select_scatter(self: Tensor, src: Tensor, dim: int, index: int) -> Tensor | NotImplementedType:
    """Torchair's converter counts from the front only."""
    if index >= 0:
        return NotImplemented
    return aten.select_scatter.default(self, src, dim, index + self.shape[dim])


def _unfold(self: Tensor, dim: int, size: int, step: int) -> Tensor:
    """Windows along `dim`, which become the last dim."""
    if self.dim() == 0:
        return self.reshape(1)[:size]
    dim = dim % self.dim()
    count = (self.shape[dim] - size) // step + 1
    starts = torch.arange(count, device=self.device).unsqueeze(-1) * step
    places = starts + torch.arange(size, device=self.device)
    windows = self.index_select(dim, places.reshape(-1)).unflatten(dim, (count, size))
    return windows.movedim(dim + 1, -1)


INDEXING: Mapping[OpOverload, Callable[..., object]] = MappingProxyType(
    {
        aten.index_put.default: _index_put,
        aten._unsafe_index_put.default: _index_put,
        aten._unsafe_index.Tensor: _unsafe_index,
        aten.index_select.default: _index_select,
        aten.index_add.default: _index_add,
        aten.embedding.default: _embedding,
        aten.masked_scatter.default: _masked_scatter,
        aten.scatter_reduce.two: _scatter_reduce,
        aten.scatter.reduce: _scatter_with,
        aten.scatter.value_reduce: _scatter_value_with,
        aten.index_reduce.default: _index_reduce,
        aten.repeat_interleave.Tensor: _repeat_interleave,
        aten.bincount.default: _bincount,
        aten.histc.default: _histc,
        aten.diagonal.default: _diagonal,
        aten.diagonal_copy.default: _diagonal,
        aten.diagonal_scatter.default: _diagonal_scatter,
        aten.select_scatter.default: _select_scatter,
        aten.unfold.default: _unfold,
        aten.unfold_copy.default: _unfold,
    }
)
"""Op -> its decomposition, which returns NotImplemented for arguments that it leaves alone."""
