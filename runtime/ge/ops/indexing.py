"""Ops that pick elements by index tensors.

An index out of range is an error; a negative one too, unless an attribute or the op allows it: what
a kernel reads there is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import BOOL, FLOATS, INDICES, copied, demand, normal_axis, only
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS", "by_mask", "coordinates"]

OPS = OpTable()


@OPS.op("Gather")
def gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Slices of dim 0; the dims of the indices take its place."""
    return _gather(a, x, indices, 0)


@OPS.op("GatherV2")
def gather_v2(a: Attributes, x: Tensor, indices: Tensor, axis: Tensor) -> Tensor:
    """Slices of a dim; the dims of the indices take its place."""
    (dim,) = integers(axis)
    return _gather(a, x, indices, dim)


def _gather(a: Attributes, x: Tensor, indices: Tensor, axis: int) -> Tensor:
    only(a, batch_dims=0, is_preprocessed=False)
    demand(a, INDICES, indices)
    dim = normal_axis(a, axis, x.dim())
    flat = _within(a, indices.reshape(-1), x.shape[dim], a.bool("negative_index_support", False))
    shape = x.shape[:dim] + indices.shape + x.shape[dim + 1 :]
    return x.index_select(dim, flat).reshape(shape)


def _within(a: Attributes, indices: Tensor, size: int, negative: bool) -> Tensor:
    """Indices of a dim, counted from its start."""
    if indices.numel():
        lowest, highest = (int(bound) for bound in indices.aminmax())
        if highest >= size or lowest < (-size if negative else 0):
            raise ValueError(
                f"{a.where}: indices from {lowest} to {highest} of a dim of size {size}"
                + ("" if negative or lowest >= 0 else ", without negative_index_support")
            )
        if lowest < 0:
            return torch.where(indices < 0, indices + size, indices)
    return indices


@OPS.op("GatherElements")
def gather_elements(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    """For each element of index the one of x at its place, but for the index along dim."""
    demand(a, INDICES, index)
    dim = normal_axis(a, a.int("dim", 0), x.dim())
    return x.gather(dim, index.long())


@OPS.op("GatherNd")
def gather_nd(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    """Slices at coordinates, which are the last dim of indices."""
    return x[coordinates(a, x, indices, a.bool("negative_index_support", False))]


def coordinates(
    a: Attributes, x: Tensor, indices: Tensor, negative: bool = False
) -> tuple[Tensor, ...]:
    """The index tensors of the first dims of x that the last dim of `indices` holds.

    Raises:
        ValueError: If there are more than x has dims, or one is out of range.
    """
    demand(a, INDICES, indices)
    if not indices.dim() or not 0 < indices.shape[-1] <= x.dim():
        raise ValueError(f"{a.where}: indices {list(indices.shape)} of a shape {list(x.shape)}")
    return tuple(
        _within(a, index, size, negative).long()
        for index, size in zip(indices.unbind(-1), x.shape, strict=False)
    )


@OPS.op("IndexByTensor", dynamic=("indices",))
def index_by_tensor(a: Attributes, x: Tensor, indices: Sequence[Tensor]) -> Tensor:
    """Advanced indexing as in numpy; a 1 of the mask is a dim that the next index indexes."""
    return copied(x[by_mask(a, x, a.ints("indices_mask", ()), indices)])


@OPS.op("Index", dynamic=("indices",))
def index(
    a: Attributes,
    x: Tensor,
    indexed_sizes: Tensor,
    indexed_strides: Tensor,
    indices: Sequence[Tensor],
) -> Tensor:
    """IndexByTensor with the mask in indexed_sizes; indexed_strides follows from the others."""
    return copied(x[by_mask(a, x, integers(indexed_sizes), indices)])


def by_mask(
    a: Attributes, x: Tensor, mask: list[int], indices: Sequence[Tensor]
) -> tuple[Tensor | slice, ...]:
    """A subscript for x: an index tensor for each 1 of the mask, `:` for each 0.

    Raises:
        ValueError: If mask, indices and x do not fit each other.
    """
    demand(a, frozenset({torch.int64}), *indices)
    if len(mask) > x.dim() or sum(mask) != len(indices) or not set(mask) <= {0, 1}:
        raise ValueError(f"{a.where}: mask {mask}, {len(indices)} index tensors, {x.dim()} dims")
    given = iter(indices)
    return tuple(next(given) if bit else slice(None) for bit in mask)


@OPS.op("OneHot", equal=("on_value", "off_value"))
def one_hot(a: Attributes, x: Tensor, depth: Tensor, on_value: Tensor, off_value: Tensor) -> Tensor:
    """on_value at each index along a new dim, elsewhere off_value; all off if out of range."""
    (classes,) = integers(depth)
    dim = normal_axis(a, a.int("axis", -1), x.dim() + 1)
    places = torch.arange(classes).reshape(-1, *[1] * (x.dim() - dim))
    return torch.where(x.unsqueeze(dim) == places, on_value.reshape(()), off_value.reshape(()))


@OPS.op("MaskedSelect")
def masked_select(a: Attributes, x: Tensor, mask: Tensor) -> Tensor:
    """The elements where the mask, which broadcasts with x, is set."""
    demand(a, BOOL, mask)
    return torch.masked_select(x, mask)


@OPS.op("EmbeddingBag")
def embedding_bag(
    a: Attributes,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The sum, mean or max of the rows of each bag; zeros for an empty one.

    Also the bag of each index, the size of each bag and, for max, the index of each maximum: the
    gradient needs them. For the other modes there are no maxima.
    """
    only(a, scale_grad_by_freq=False, sparse=False, padding_idx=-1)
    demand(a, FLOATS, weight)
    demand(a, INDICES, indices)
    modes = ("sum", "mean", "max")
    mode = a.str("mode", "mean")
    if mode not in modes or offsets is None or indices.dim() != 1:
        raise ValueError(f"{a.where}: no semantics for mode={mode!r} or for bags without offsets")
    include_last = a.bool("include_last_offset", False)
    y, _, _, maxima = torch.ops.aten._embedding_bag.default(
        weight,
        indices,
        offsets,
        mode=modes.index(mode),
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last,
    )
    starts = offsets[:-1] if include_last else offsets
    places = torch.arange(indices.numel(), dtype=indices.dtype)
    bags = (torch.searchsorted(starts, places, right=True) - 1).to(indices.dtype)
    sizes = torch.bincount(bags, minlength=starts.numel()).to(indices.dtype)
    return y, bags, sizes, maxima if mode == "max" else indices.new_empty(0)
