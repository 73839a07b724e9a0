"""Products of ragged pieces as one grouped product.

Some mixtures of experts sort their rows by expert, read the number of rows of each expert as Python
integers, split the rows by them, multiply each piece with the weight of its expert and concatenate
the products:

    sizes = counts.tolist()
    y = cat([piece @ weight[e] for e, piece in enumerate(x.split(sizes))])

Here the sizes only say where the rows of an expert end, which is what a grouped product takes as a
tensor. The form becomes `aten._grouped_mm` where that takes the operands, and otherwise (in PyTorch
2.13 for any dtype but bf16) a batched product of each row with the weight that its expert picks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.compiler.capture.editing import Editor, argument_list, tensor_value

__all__ = ["products_of_ragged_pieces"]

aten = torch.ops.aten

_UNITS = 8
"""Elements of bf16 in the 16 bytes that strides of `aten._grouped_mm` are multiples of."""


class _Products(NamedTuple):
    """`x[R, K]` in pieces along R, each times its part of `weight[E, K, N]`.

    Attributes:
        x: The rows.
        weight: `[E, K, N]`, or `[E, N, K]` if `transposed`.
        transposed: Whether each part of the weight is transposed.
        counts: Number of rows of each piece, `[E]`.
        first: The product of the first piece.
    """

    x: fx.Node
    weight: fx.Node
    transposed: bool
    counts: fx.Node
    first: fx.Node


def products_of_ragged_pieces(node: fx.Node) -> fx.Node | None:
    """The grouped product that a `cat` of products of ragged pieces stands for."""
    found = _products(node)
    if found is None:
        return None
    editor = Editor(node, found.first)
    ends = editor.call(aten.cumsum.default, found.counts, 0)
    emit = _grouped if _takes_groups(found) else _gathered
    return emit(editor, found, ends)


def _products(node: fx.Node) -> _Products | None:
    """What a `cat` concatenates, if it is products of all pieces of a split by counts."""
    if node.target is not aten.cat.default or (len(node.args) > 1 and node.args[1] != 0):
        return None
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    operands = [argument_list(part, aten.mm.default) for part in parts]
    pieces = [argument_list(pair[0], operator.getitem) for pair in operands if pair]
    split = _shared(pieces, len(parts), source=0, index=1)
    cut = argument_list(split, aten.split_with_sizes.default)
    if len(cut) < 2 or (len(cut) > 2 and cut[2] != 0) or len(cut[1]) != len(parts):
        return None
    numbers = [argument_list(size, aten._local_scalar_dense.default) for size in cut[1]]
    picks = [argument_list(number[0], aten.select.int) for number in numbers if number]
    counts = _shared(picks, len(parts), source=0, index=2)
    turned = [argument_list(pair[1], aten.t.default) for pair in operands]
    transposed = all(turned)
    matrices = [t[0] for t in turned] if transposed else [pair[1] for pair in operands]
    choices = [argument_list(matrix, aten.select.int) for matrix in matrices]
    weight = _shared(choices, len(parts), source=0, index=2)
    if counts is None or weight is None:
        return None
    stacked = all(choice[1] == 0 for choice in choices) and tensor_value(weight).ndim == 3
    if not stacked or tensor_value(weight).shape[0] != len(parts) or tensor_value(counts).ndim != 1:
        return None
    first = parts[0]
    assert isinstance(first, fx.Node)
    return _Products(cut[0], weight, transposed, counts, first)


def _shared(
    calls: Sequence[Sequence[object]], count: int, *, source: int, index: int
) -> fx.Node | None:
    """The one node that `count` calls take their parts 0, 1, ... of, in this order."""
    if len(calls) != count or not all(calls):
        return None
    first = calls[0][source]
    same = all(call[source] is first and call[index] == i for i, call in enumerate(calls))
    return first if same and isinstance(first, fx.Node) else None


def _takes_groups(found: _Products) -> bool:
    """Whether `aten._grouped_mm` takes the operands: its strides are multiples of 16 bytes."""
    values = tensor_value(found.x), tensor_value(found.weight)
    return all(
        value.dtype is torch.bfloat16
        and value.stride(-1) == 1
        and all(stride % _UNITS == 0 for stride in value.stride()[:-1])
        for value in values
    )


def _grouped(editor: Editor, found: _Products, ends: fx.Node) -> fx.Node:
    call = editor.call
    weight = found.weight
    if found.transposed:
        weight = call(aten.transpose.int, weight, 1, 2)
    offsets = call(aten._to_copy.default, ends, dtype=torch.int32)
    return call(aten._grouped_mm.default, found.x, weight, offsets)


def _gathered(editor: Editor, found: _Products, ends: fx.Node) -> fx.Node:
    """Each row times the weight of its expert, whose id is the number of experts that end before.

    Rows are numbered without their number, which may be symbolic: by a running sum of ones.
    """
    call = editor.call
    row = call(aten.select.int, found.x, 1, 0)
    ones = call(aten.ones_like.default, row, dtype=torch.int64)
    number = call(aten.unsqueeze.default, call(aten.cumsum.default, ones, 0), 1)
    ids = call(aten.sum.dim_IntList, call(aten.gt.Tensor, number, ends), [1])
    weights = call(aten.index.Tensor, found.weight, [ids])
    if found.transposed:
        weights = call(aten.transpose.int, weights, 1, 2)
    products = call(aten.bmm.default, call(aten.unsqueeze.default, found.x, 1), weights)
    return call(aten.squeeze.dim, products, 1)
