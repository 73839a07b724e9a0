"""Segments of packed features: what one projection's result is cut into further down.

A model that computes q, k and v, or gate and up, with one weight cuts the result by slices or
splits. Where it cuts is read off the graph: the features are followed through reshapes, transposes
and pointwise ops to every slice and split along them. A segment is a run of features that the model
reads by itself.

Invariant: segments are disjoint, in order, and make up all features.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from rolemesh.compiler.ir.program import tensor_type, tensor_types

__all__ = ["FeatureSegment", "feature_segments"]

aten = torch.ops.aten


@dataclass(frozen=True)
class FeatureSegment:
    """One run of features and the value that consists of it.

    Attributes:
        length: How many features.
        value: The piece of the packed result.
    """

    length: int
    value: fx.Node


@dataclass(frozen=True)
class _Run:
    """Features `[start, start + length)` as dim `dim` of a value."""

    value: fx.Node
    dim: int
    start: int
    length: int

    @property
    def extent(self) -> int:
        """Extent of the dim; each index along it stands for a block of features."""
        return tensor_type(self.value).shape[self.dim]


_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default})
_RESHAPES = frozenset(
    {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims}
)
_SWAPS = frozenset({aten.transpose.int, aten.t.default})
_MOST_RUNS = 128


def feature_segments(result: fx.Node) -> tuple[FeatureSegment, ...]:
    """The segments that the last dim of a projection's result is cut into; none if it is not cut.

    Args:
        result: The result, `[.., features]`.
    """
    last = tensor_type(result).ndim - 1
    width = tensor_type(result).shape[last]
    cut: dict[tuple[int, int], fx.Node] = {}
    queue, seen = [_Run(result, last, 0, width)], 1
    while queue:
        for piece in _pieces(queue.pop()):
            if piece.length < width:
                cut.setdefault((piece.start, piece.length), piece.value)
            seen += 1
            if seen <= _MOST_RUNS:
                queue.append(piece)
    bounds = sorted({0, width, *(end for at, length in cut for end in (at, at + length))})
    runs = [(start, end - start) for start, end in itertools.pairwise(bounds)]
    if len(runs) == 1 or any(run not in cut for run in runs):
        return ()
    return tuple(FeatureSegment(length, cut[start, length]) for start, length in runs)


def _pieces(run: _Run) -> Iterator[_Run]:
    """The same features, or some of them, in the values computed from one."""
    for user in run.value.users:
        if user.op != "call_function":
            continue
        if user.target in _SPLITS:
            yield from _split(run, user)
        elif len(tensor_types(user)) != 1 or user.target is operator.getitem:
            continue
        elif user.target is aten.slice.Tensor:
            yield from _slice(run, user)
        elif user.target in _RESHAPES:
            yield from _reshape(run, user)
        elif user.target in _SWAPS or user.target is aten.permute.default:
            yield _Run(user, _moved(run, user), run.start, run.length)
        elif torch.Tag.pointwise in getattr(user.target, "tags", ()) or user.target in _COPIES:
            back = tensor_type(run.value).ndim - run.dim
            shape = tensor_type(user).shape
            if len(shape) >= back and shape[-back] == run.extent:
                yield _Run(user, len(shape) - back, run.start, run.length)


_COPIES = frozenset({aten.clone.default, aten._to_copy.default})


def _split(run: _Run, user: fx.Node) -> Iterator[_Run]:
    dim = _dim(user, 2, run)
    start = run.start
    for index, kind in enumerate(tensor_types(user)):
        length = run.length
        if dim == run.dim:
            length = kind.shape[dim] * run.length // run.extent
        for pick in user.users:
            if pick.args[1] == index:
                yield _Run(pick, run.dim, start, length)
        if dim == run.dim:
            start += length


def _slice(run: _Run, user: fx.Node) -> Iterator[_Run]:
    dim = _dim(user, 1, run)
    if dim != run.dim:
        yield _Run(user, run.dim, run.start, run.length)
        return
    first = user.args[2] if len(user.args) > 2 and user.args[2] is not None else 0
    step = user.args[4] if len(user.args) > 4 else 1
    kept = tensor_type(user).shape[dim]
    if isinstance(first, int) and step == 1 and kept:
        block = run.length // run.extent
        first = first + run.extent if first < 0 else first
        yield _Run(user, dim, run.start + first * block, kept * block)


def _reshape(run: _Run, user: fx.Node) -> Iterator[_Run]:
    """Through a reshape that leaves the dim as it is, or cuts it into blocks."""
    shape = tensor_type(user).shape
    before = math.prod(tensor_type(run.value).shape[: run.dim])
    for dim, extent in enumerate(shape):
        if isinstance(extent, int) and extent > 1 and math.prod(shape[:dim]) == before:
            if run.extent % extent == 0:
                yield _Run(user, dim, run.start, run.length)
            return


def _moved(run: _Run, user: fx.Node) -> int:
    ndim = tensor_type(user).ndim
    if user.target is aten.permute.default:
        order = user.args[1]
        assert isinstance(order, list | tuple)
        return [dim % ndim for dim in order if isinstance(dim, int)].index(run.dim)
    a, b = (0, ndim - 1) if user.target is aten.t.default else user.args[1:3]
    assert isinstance(a, int)
    assert isinstance(b, int)
    return {a % ndim: b % ndim, b % ndim: a % ndim}.get(run.dim, run.dim)


def _dim(user: fx.Node, position: int, run: _Run) -> int:
    dim = user.args[position] if len(user.args) > position else user.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % tensor_type(run.value).ndim
