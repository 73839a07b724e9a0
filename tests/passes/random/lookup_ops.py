"""Families of ops that look rows up and write them."""

from __future__ import annotations

import torch
from tests.passes.random.case import Ref
from tests.passes.random.draw import Draw, dim_of
from tests.passes.random.infer import UnsuitedError

__all__ = ["lookup", "write", "written"]

aten = torch.ops.aten


def lookup(d: Draw) -> Ref:
    x = d.pick(dim_of)
    v = d.type(x)
    dim = d.dim(v)
    count = v.shape[dim]
    kind = d.rng.choice(["embedding", "index_select", "index", "gather", "index2", "rows"])
    if kind == "embedding":
        if v.ndim != 2:
            raise UnsuitedError
        return d.call(aten.embedding.default, x, d.ids(d.shape(d.rng.randint(1, 2)), v.shape[0]))
    if kind == "index_select":
        return d.call(aten.index_select.default, x, dim, d.ids(d.shape(1), count))
    if kind == "index":
        index = [None] * (dim % v.ndim) + [d.ids(d.shape(d.rng.randint(1, 2)), count)]
        return d.call(aten.index.Tensor, x, index)
    if kind == "gather":
        shape = list(v.shape)
        shape[dim] = d.extent()
        return d.call(aten.gather.default, x, dim, d.ids(shape, count))
    if kind == "rows":  # a table of experts: looked-up rows enter a product
        table = d.leaf((d.rng.choice((3, 4, 8)), d.rng.choice((2, 4)), 3))
        rows = d.call(aten.index.Tensor, table, [d.ids(d.shape(1), d.type(table).shape[0])])
        y = d.leaf((d.type(rows).shape[0], 2, d.type(rows).shape[1]))
        return d.call(aten.bmm.default, y, rows)
    if v.ndim < 2:
        raise UnsuitedError
    shape = d.shape(1)
    return d.call(aten.index.Tensor, x, [d.ids(shape, v.shape[0]), d.ids(shape, v.shape[1])])


def write(d: Draw) -> Ref:
    x = d.pick(dim_of)
    return written(d, x)


def written(d: Draw, x: Ref) -> Ref:
    v = d.type(x)
    dim = d.dim(v)
    count = v.shape[dim]
    shape = list(v.shape)
    kind = d.rng.choice(["index_copy", "index_add", "slice_scatter", "select_scatter", "scatter",
                         "scatter_add", "index_put", "accumulate"])  # fmt: skip
    if kind in ("index_copy", "index_add"):
        shape[dim] = d.count(count)
        # Distinct places: which of two rows wins is not defined.
        ids = d.whole(shape[dim % v.ndim :][:1], torch.int64, count, "places")
        return d.call(getattr(aten, kind).default, x, dim, ids, d.like(v.dtype, shape))
    if kind == "slice_scatter":
        start = d.place(count)
        shape[dim] = d.count(count - start)
        end = start + shape[dim]
        return d.call(aten.slice_scatter.default, x, d.like(v.dtype, shape), dim, start, end)
    if kind == "select_scatter":
        del shape[dim]
        return d.call(aten.select_scatter.default, x, d.like(v.dtype, shape), dim, d.place(count))
    if kind == "scatter":
        shape[dim] = 1
        return d.call(aten.scatter.src, x, dim, d.ids(shape, count), d.like(v.dtype, shape))
    if kind == "scatter_add":
        shape[dim] = d.extent()
        return d.call(aten.scatter_add.default, x, dim, d.ids(shape, count), d.like(v.dtype, shape))
    if kind == "index_put":
        values = d.like(v.dtype, [1, *shape[1:]])
        return d.call(aten.index_put.default, x, [d.ids([1], shape[0])], values)
    rows = d.extent()
    values = d.like(v.dtype, [rows, *shape[1:]])
    return d.call(aten.index_put.default, x, [d.ids([rows], shape[0])], values, True)
