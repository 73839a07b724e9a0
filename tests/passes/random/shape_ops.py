"""Families of ops that rearrange, cut, join and create values."""

from __future__ import annotations

import math

import torch
from tests.layouts import divisors
from tests.passes.random.case import Ref
from tests.passes.random.draw import Draw
from tests.passes.random.infer import UnsuitedError

from rolemesh.compiler.ir.dims import Dim

__all__ = ["arrange", "create", "cut", "join", "regroup", "reshape"]

aten = torch.ops.aten


def reshape(d: Draw) -> Ref:
    x = d.pick(floats=d.rng.random() < 0.9)
    shape = list(d.type(x).shape)
    for _ in range(d.rng.randint(1, 3)):
        place = d.rng.randrange(len(shape) + 1)
        kind = d.rng.choice(["split", "merge", "one"])
        if kind == "one":
            shape.insert(place, 1)
        elif kind == "merge" and place + 1 < len(shape):
            shape[place : place + 2] = [shape[place] * shape[place + 1]]
        elif kind == "split" and place < len(shape):
            outer = d.rng.choice(divisors(shape[place]))
            shape[place : place + 1] = [outer, shape[place] // outer]
    if shape and d.flag():
        shape[d.rng.randrange(len(shape))] = -1
    target = d.rng.choice([aten.view.default, aten.reshape.default, aten._unsafe_view.default])
    return d.call(target, x, shape)


def regroup(d: Draw) -> Ref:
    """A reshape into other factors of the same number of elements."""
    x = d.pick()
    count = math.prod(d.type(x).shape)
    a = d.rng.choice(divisors(count) or [1])
    return d.call(aten.reshape.default, x, [a, count // a])


def arrange(d: Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1, floats=d.rng.random() < 0.9)
    v = d.type(x)
    kind = d.rng.choice(["transpose", "permute", "unsqueeze", "squeeze", "expand", "repeat", "flip",
                         "roll", "t", "pad", "diagonal"])  # fmt: skip
    if kind == "transpose":
        return d.call(aten.transpose.int, x, d.dim(v), d.dim(v))
    if kind == "permute":
        return d.call(aten.permute.default, x, d.rng.sample(range(v.ndim), v.ndim))
    if kind == "unsqueeze":
        return d.call(aten.unsqueeze.default, x, d.rng.randint(0, v.ndim))
    if kind == "squeeze":
        return d.call(aten.squeeze.dim, x, d.dim(v))
    if kind == "expand":
        lead = d.rng.choice([[], [2], [d.extent()]])
        return d.call(
            aten.expand.default, x, [*lead, *(d.extent() if n == 1 else -1 for n in v.shape)]
        )
    if kind == "repeat":
        return d.call(
            aten.repeat.default, x, [d.rng.choice([1, 1, 2, 3, d.extent()]) for _ in v.shape]
        )
    if kind == "flip":
        return d.call(aten.flip.default, x, [d.dim(v)])
    if kind == "roll":
        return d.call(aten.roll.default, x, [1], [d.dim(v)])
    if kind == "t" and v.ndim == 2:
        return d.call(aten.t.default, x)
    if kind == "pad":
        return d.call(aten.constant_pad_nd.default, x, [d.rng.choice([0, 1]), 1], 0.0)
    if kind == "diagonal" and v.ndim >= 2:
        return d.call(aten.diagonal.default, x, 0, 0, 1)
    raise UnsuitedError


def cut(d: Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1, floats=d.rng.random() < 0.9)
    v = d.type(x)
    dim = d.dim(v)
    extent = v.shape[dim]
    if extent == 0:
        raise UnsuitedError
    kind = d.rng.choice(["slice", "slice", "split", "sizes", "select", "unbind", "stride"])
    if kind == "slice":
        return d.call(aten.slice.Tensor, x, dim, *_bounds(d, extent))
    if kind == "stride":
        return d.call(aten.slice.Tensor, x, dim, 0, extent, 2)
    if kind == "split":
        if not isinstance(extent, Dim):
            return d.call(aten.split.Tensor, x, d.count(extent), dim)
        pieces = d.rng.choice([n for n in divisors(extent) if not isinstance(n, Dim)])
        return d.call(aten.split.Tensor, x, extent // pieces, dim)
    if kind == "sizes":
        return d.call(aten.split_with_sizes.default, x, _lengths(d, extent), dim)
    if kind == "unbind" and not isinstance(extent, Dim):
        return d.call(aten.unbind.int, x, dim)
    return d.call(aten.select.int, x, dim, d.place(extent))


def _bounds(d: Draw, extent: int) -> tuple[int, int]:
    """Start and end of a slice that is never empty; every size is at least 2."""
    if isinstance(extent, Dim):
        options = [(0, 1), (0, 2), (1, 2), (0, extent - 1), (1, extent), (extent - 1, extent),
                   (0, extent), (1, 1 << 62), (-1, 1 << 62), (0, -1)]  # fmt: skip
        return d.rng.choice(options)
    start = d.rng.randrange(extent)
    return start, d.rng.randint(start + 1, extent)


def _lengths(d: Draw, extent: int) -> list[int]:
    if isinstance(extent, Dim):
        return d.rng.choice([[1, extent - 1], [extent - 1, 1], [extent], [1, extent - 2, 1]])
    first = d.rng.randint(1, extent)
    return [first, extent - first] if extent > first else [first]


def join(d: Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1)
    v = d.type(x)
    dim = d.dim(v)
    if d.rng.random() < 0.25:
        return d.call(aten.stack.default, [x, d.like(v.dtype, v.shape)], dim)
    shape = list(v.shape)
    if d.flag():
        shape[dim] = d.extent()
    parts = [x, d.like(v.dtype, shape)]
    if d.flag():
        parts.reverse()
    return d.call(aten.cat.default, parts, dim)


def create(d: Draw) -> Ref:
    x = d.pick()
    v = d.type(x)
    shape = list(v.shape)
    kind = d.rng.choice(["arange", "full", "new_zeros", "ones_like", "mask", "tril", "triu", "eye"])
    if kind == "arange":
        count = d.extent()
        start = d.rng.choice([0, 1, count])
        return d.call(aten.arange.start_step, start, count + start, 1, dtype=torch.int64)
    if kind == "full":
        return d.call(aten.full.default, shape, 2.0, dtype=v.dtype)
    if kind == "new_zeros":
        return d.call(aten.new_zeros.default, x, shape)
    if kind == "ones_like":
        return d.call(aten.ones_like.default, x)
    if kind == "mask":  # as a causal mask is made
        count = d.extent()
        row = d.call(aten.arange.default, count, dtype=torch.int64)
        column = d.call(aten.unsqueeze.default, row, 1)
        return d.call(aten.le.Tensor, row, column)
    if kind == "eye":
        return d.call(aten.eye.default, d.extent(), dtype=v.dtype)
    if v.ndim < 2:
        raise UnsuitedError
    return d.call(getattr(aten, kind).default, x, d.rng.choice([-1, 0, 1]))
