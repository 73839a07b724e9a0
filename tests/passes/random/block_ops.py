"""Families of products, and of blocks of ops as models have them."""

from __future__ import annotations

import torch
from tests.passes.random.case import Fill, Leaf, Ref
from tests.passes.random.draw import EXTENTS, Draw, dim_of

import rolemesh.compiler.annotate  # noqa: F401 - registers the op `constrain`
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["attention", "bias", "constrain", "experts", "matmul", "table"]

aten = torch.ops.aten


def matmul(d: Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 2)
    shape = d.type(x).shape
    n = d.extent()
    if len(shape) == 2:
        y = d.like(d.type(x).dtype, (shape[1], n))
        kind = d.rng.choice(["mm", "mm", "addmm", "linear", "reversed"])
        if kind == "addmm":
            bias = d.leaf((n,), d.type(x).dtype)
            return d.call(aten.addmm.default, bias, x, y)
        if kind == "linear":
            weight = d.leaf((n, shape[1]), d.type(x).dtype)
            return d.call(aten.linear.default, x, weight, d.leaf((n,), d.type(x).dtype))
        if kind == "reversed":
            return d.call(aten.mm.default, d.like(d.type(x).dtype, (n, shape[0])), x)
        return d.call(aten.mm.default, x, y)
    if len(shape) == 3:
        y = d.like(d.type(x).dtype, (shape[0], shape[2], n))
        if d.rng.random() < 0.2:
            bias = d.leaf((shape[0], shape[1], n), d.type(x).dtype)
            return d.call(aten.baddbmm.default, bias, x, y)
        return d.call(aten.bmm.default, x, y)
    return d.call(aten.matmul.default, x, d.like(d.type(x).dtype, (shape[-1], n)))


def bias(d: Draw) -> Ref:
    """A product and a bias: the bias must be added once."""
    y = matmul(d)
    shape = d.type(y).shape
    return d.call(aten.add.Tensor, y, d.like(d.type(y).dtype, shape[-1:]))


def attention(d: Draw) -> Ref:
    """Attention over heads; keys may have fewer heads than queries have."""
    batch, heads = (d.rng.choice((1, 2, 3, 4)) for _ in range(2))
    rows, columns = (d.rng.choice((1, 3, 4, *d.symbols)) for _ in range(2))
    groups = d.rng.choice((1, 1, 2))
    query = d.like(torch.float64, (batch, heads * groups, rows, 2))
    keys, values = (d.leaf((batch, heads, columns, 2)) for _ in range(2))
    mask = d.leaf(
        d.rng.choice([(rows, columns), (batch, 1, rows, columns), (1, heads * groups, 1, columns)])
    )
    if groups > 1:
        shapes = [batch, heads, groups, columns, 2], [batch, heads * groups, columns, 2]
        keys, values = (d.call(aten.unsqueeze.default, x, 2) for x in (keys, values))
        keys, values = (d.call(aten.expand.default, x, shapes[0]) for x in (keys, values))
        keys, values = (d.call(aten.reshape.default, x, shapes[1]) for x in (keys, values))
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    return d.call(op, query, keys, values, 0.0, False, attn_mask=mask, inexact=True)


def experts(d: Draw) -> Ref:
    """Rows sorted by expert, a weight for each expert, and tokens that get the rows' sum."""
    rows = d.rng.choice((4, 6, 8, *(size * 2 for size in d.symbols)))
    count, width = d.rng.choice((2, 3, 4)), d.rng.choice((4, 8))
    offsets = d.whole((count,), torch.int32, rows, "ends")
    x = d.like(torch.float32, (rows, 8))
    y = d.call(aten._grouped_mm.default, x, d.leaf((count, 8, width), torch.float32), offsets)
    if d.flag():
        y = d.call(aten.mul.Tensor, y, d.leaf((rows, 1), torch.float32))
    if d.flag():
        y = d.call(aten.reshape.default, y, [rows // 2, 2, width])
    return d.call(aten.sum.dim_IntList, y, [1]) if d.flag() else y


def table(d: Draw) -> Ref:
    """Rows of a table that is cut by rows, made part of a larger dim, and used up."""
    entries, width = (d.rng.choice(EXTENTS[1:]) for _ in range(2))
    count = d.rng.choice((*EXTENTS[1:], *d.symbols, *d.symbols))
    axis = d.rng.randrange(len(d.mesh.names))
    layout = Layout.replicated(d.mesh).replace(axis, Shard(0, 1, entries))
    value = TensorType((entries, width), torch.float64)
    x = d.add(Leaf(value, Fill(d.rng.randrange(1 << 30), -3, 4), layout))
    ids = d.ids([count], entries)
    if d.flag():
        rows = d.call(aten.index.Tensor, x, [ids])
    else:
        rows = d.call(aten.index_select.default, x, 0, ids)
    lead = d.rng.choice((1, 2, 4))
    y = d.leaf((lead, count, width))
    y = d.call(aten.mul.Tensor, y, rows)
    kind = d.rng.choice(["merge", "inner", "whole", "split", "plain"])
    if kind == "merge":
        y = d.call(aten.reshape.default, y, [lead * count, width])
    elif kind == "inner":
        y = d.call(aten.reshape.default, y, [lead, count * width])
    elif kind == "whole":
        y = d.call(aten.reshape.default, y, [-1])
    elif kind == "split" and count % 2 == 0:
        y = d.call(aten.reshape.default, y, [lead, count // 2, 2, width])
    if d.flag():
        name = d.rng.choice(["sum", "amax", "amin", "relu"])
        if name == "relu":
            return d.call(aten.relu.default, y)
        op = aten.sum.dim_IntList if name == "sum" else getattr(aten, name).default
        return d.call(op, y, [d.dim(d.type(y))])
    return y


def constrain(d: Draw) -> Ref:
    """A layout asked for in the model's code."""
    x = d.pick(dim_of)
    axes = list(d.mesh.names)
    entries: list[str | tuple[str, ...] | None] = [None] * d.type(x).ndim
    entries[d.rng.randrange(len(entries))] = tuple(axes) if d.flag() else d.rng.choice(axes)
    return d.call(torch.ops.rolemesh.constrain.default, x, str(P(*entries)))
