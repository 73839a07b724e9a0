"""Ops that order elements: extrema with their places, sorts, searches.

Among equal elements the first counts as the largest or smallest; places are int32 unless an
attribute says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import FLOATS, INTEGERS, copied, demand, normal_axis, only
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("TopK", "TopKV2")
def top_k(a: Attributes, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) elements along dim, in order, and their places."""
    only(a, sort_policy=1)
    demand(a, FLOATS | INTEGERS, x)
    (count,) = integers(k)
    dim = normal_axis(a, a.int("dim", -1), x.dim())
    if not 0 <= count <= (x.shape[dim] if x.dim() else 1):
        raise ValueError(f"{a.where}: k={count} of dim {dim} of shape {list(x.shape)}")
    values, places = x.topk(count, dim, a.bool("largest", True), a.bool("sorted", True))
    return copied(values), copied(places.int())


@OPS.op("Sort")
def sort(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """The elements in order along an axis, and their places."""
    demand(a, FLOATS | INTEGERS, x)
    values, places = x.sort(
        dim=normal_axis(a, a.int("axis", -1), x.dim()),
        descending=a.bool("descending", False),
        stable=a.bool("stable", False),
    )
    return copied(values), copied(places.int())


@OPS.op("ArgMaxV2")
def arg_max_v2(a: Attributes, x: Tensor, dimension: Tensor) -> Tensor:
    (axis,) = integers(dimension)
    return _extremum(a, x, axis, keep=False, largest=True)[1].to(a.dtype("dtype", torch.int64))


@OPS.op("ArgMaxD")
def arg_max_d(a: Attributes, x: Tensor) -> Tensor:
    places = _extremum(a, x, a.int("dimension"), keep=False, largest=True)[1]
    return places.to(a.dtype("dtype", torch.int64))


@OPS.op("ArgMin")
def arg_min(a: Attributes, x: Tensor, dimension: Tensor) -> Tensor:
    (axis,) = integers(dimension)
    return _extremum(a, x, axis, keep=False, largest=False)[1].to(a.dtype("dtype", torch.int64))


@OPS.op("ArgMaxWithValue")
def arg_max_with_value(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the largest element along a dimension, and the element."""
    keep = a.bool("keep_dims", False)
    values, places = _extremum(a, x, a.int("dimension"), keep, largest=True)
    return places.int(), values


@OPS.op("ArgMinWithValue")
def arg_min_with_value(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """The place of the smallest element along a dimension, and the element."""
    keep = a.bool("keep_dims", False)
    values, places = _extremum(a, x, a.int("dimension"), keep, largest=False)
    return places.int(), values


def _extremum(
    a: Attributes, x: Tensor, axis: int, keep: bool, largest: bool
) -> tuple[Tensor, Tensor]:
    demand(a, FLOATS | INTEGERS, x)
    dim = normal_axis(a, axis, x.dim())
    found = x.max(dim, keepdim=keep) if largest else x.min(dim, keepdim=keep)
    return found.values, found.indices


@OPS.op("SearchSorted", equal=("sorted_sequence", "values"))
def search_sorted(
    a: Attributes, sorted_sequence: Tensor, values: Tensor, sorter: Tensor | None = None
) -> Tensor:
    """Where each value belongs: before equal elements, or after them if right."""
    places = torch.searchsorted(
        sorted_sequence, values, right=a.bool("right", False), sorter=sorter
    )
    return places.to(a.dtype("dtype", torch.int64))
