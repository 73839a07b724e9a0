"""Re-association: the two products of attention with the weight of an expansion moved over.

Queries and results are `[batch, heads, rows, ..]`, where neighbouring rows may be those of a group
of query heads that share a key head, and keys are `[batch, keys, ..]`. Products with the weight
have the heads as their batch and its dtype, those with the cache the batch of the call and the
dtype that the expanded keys had.

Invariant: the weight and the cache are read through views, but for a cast where keys were cast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir.program import tensor_type
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.canonical_forms import Emitter
from rolemesh.passes.expansions import Axes, Piece, Placed
from rolemesh.passes.sides import Side

__all__ = ["Writer"]

aten = torch.ops.aten

_REASON = "the weight that expands the cache goes to queries and results"


@dataclass(frozen=True)
class Writer:
    """Emits the ops of one re-association; equal ones are emitted once."""

    new: Emitter
    values: Mapping[fx.Node, fx.Node]

    def op(
        self, target: OpOverload, args: Sequence[object], shape: Sequence[int], dtype: torch.dtype
    ) -> fx.Node:
        """One op, with the type of its result."""
        name = f"absorbed_{target._schema.name.rpartition('::')[2]}"
        kind = TensorType(tuple(shape), dtype)
        return self.new.emit_part(name, target, args, kind, None, _REASON)

    def reshape(self, value: fx.Node, *shape: int) -> fx.Node:
        """A value in another shape; itself if it has that."""
        while value.target is aten.reshape.default:
            value = value.all_input_nodes[0]
        kind = tensor_type(value)
        if kind.shape == shape:
            return value
        return self.op(aten.reshape.default, (value, list(shape)), shape, kind.dtype)

    def permute(self, value: fx.Node, *order: int) -> fx.Node:
        """A value with its dims in another order."""
        kind = tensor_type(value)
        shape = [kind.shape[dim] for dim in order]
        moved = [dim for dim in order if kind.shape[dim] != 1]
        if moved == sorted(moved):
            return self.reshape(value, *shape)
        return self.op(aten.permute.default, (value, list(order)), shape, kind.dtype)

    def turned(self, value: fx.Node) -> fx.Node:
        """A stack of matrices, each transposed."""
        kind = tensor_type(value)
        a, b, c = kind.shape
        return self.op(aten.transpose.int, (value, 1, 2), (a, c, b), kind.dtype)

    def features(self, value: fx.Node, dim: int, start: int, length: int) -> fx.Node:
        """A run of one dim of a value."""
        kind = tensor_type(value)
        if kind.shape[dim] == length:
            return value
        shape = (*kind.shape[:dim], length, *kind.shape[dim + 1 :])
        return self.op(aten.slice.Tensor, (value, dim, start, start + length), shape, kind.dtype)

    def times(self, value: fx.Node, factor: float) -> fx.Node:
        """A value times a number."""
        if factor == 1:
            return value
        kind = tensor_type(value)
        return self.op(aten.mul.Tensor, (value, factor), kind.shape, kind.dtype)

    def cast(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A value in another dtype."""
        kind = tensor_type(value)
        if kind.dtype == dtype:
            return value
        result = TensorType(kind.shape, dtype)
        options = {"dtype": dtype}
        args = (value,)
        target = aten._to_copy.default
        return self.new.emit_part("absorbed_cast", target, args, result, options, _REASON)

    def bmm(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """A batched product."""
        (batch, rows, _), dtype = tensor_type(left)
        columns = tensor_type(right).shape[-1]
        return self.op(aten.bmm.default, (left, right), (batch, rows, columns), dtype)

    def cat(self, values: Sequence[fx.Node]) -> fx.Node:
        """Values next to each other along their last dim."""
        if len(values) == 1:
            return values[0]
        shape, dtype = tensor_type(values[0])
        width = sum(tensor_type(value).shape[-1] for value in values)
        last = len(shape) - 1
        return self.op(aten.cat.default, (list(values), last), (*shape[:last], width), dtype)

    def arranged(self, placed: Placed, axes: Axes, *groups: tuple[int, ...]) -> fx.Node:
        """A value with a dim for each group of axes."""
        value, dims = self.values[placed.value], tuple(axes.flat(dim) for dim in placed.dims)
        found = [axis for dim in dims for axis in dim]
        wanted = [axis for group in groups for axis in group]
        if found != wanted:
            value = self.reshape(value, *(axes.extent((axis,)) for axis in found))
            value = self.permute(value, *(found.index(axis) for axis in wanted))
        return self.reshape(value, *(axes.extent(group) for group in groups))

    def cached(self, side: Side, piece: Piece, dtype: torch.dtype) -> fx.Node:
        """What a piece comes from: `[batch, keys, width]`, or `[batch * heads, keys, width]`."""
        axes = side.axes
        lead = side.batch if side.is_shared(piece) else (*side.batch, *side.heads)
        if piece.expansion is not None:
            feature = axes.flat((piece.expansion.latent,))
            return self.cast(self.arranged(piece.source, axes, lead, side.keys, feature), dtype)
        value = self.arranged(piece.source, axes, lead, side.keys, axes.flat((piece.feature,)))
        return self.cast(self.features(value, 2, piece.start, piece.length), dtype)

    def weight(self, side: Side, piece: Piece) -> fx.Node:
        """The part of a weight that expands to a piece: `[heads, length, latent]`."""
        axes, expansion = side.axes, piece.expansion
        assert expansion is not None
        groups = (side.heads, axes.flat((piece.feature,)), axes.flat((expansion.latent,)))
        value = self.arranged(expansion.weight, axes, *groups)
        return self.features(value, 1, piece.start, piece.length)

    def weighted(
        self, value: fx.Node, weight: fx.Node, batch: int, heads: int, dtype: torch.dtype
    ) -> fx.Node:
        """`[batch, heads, rows, k]` times `[heads, k, n]`, computed in the weight's dtype."""
        rows, inner = tensor_type(value).shape[2:]
        given = self.cast(value, tensor_type(weight).dtype)
        given = self.reshape(self.permute(given, 1, 0, 2, 3), heads, batch * rows, inner)
        found = self.bmm(given, weight)
        found = self.reshape(found, heads, batch, rows, tensor_type(weight).shape[2])
        return self.cast(self.permute(found, 1, 0, 2, 3), dtype)

    def scores(self, query: fx.Node, side: Side, dtype: torch.dtype) -> fx.Node:
        """Scores of queries `[batch, heads, rows, features]`, `[batch * heads, rows, keys]`."""
        batch, heads, _, keys = side.shape
        rows = tensor_type(query).shape[2]
        total: fx.Node | None = None
        start, scale = 0, side.operand.pieces[0].scale
        query = self.times(query, scale)
        for piece in side.operand.pieces:
            part = self.times(self.features(query, 3, start, piece.length), piece.scale / scale)
            start += piece.length
            if piece.expansion is not None:
                part = self.weighted(part, self.weight(side, piece), batch, heads, dtype)
            together = batch if side.is_shared(piece) else batch * heads
            part = self.reshape(part, together, batch * heads // together * rows, side.width(piece))
            part = self.bmm(part, self.turned(self.cached(side, piece, dtype)))
            part = self.reshape(part, batch * heads, rows, keys)
            if total is not None:
                args = (total, part)
                part = self.op(aten.add.Tensor, args, tensor_type(part).shape, dtype)
            total = part
        assert total is not None
        return total

    def results(self, weights: fx.Node, side: Side, dtype: torch.dtype) -> fx.Node:
        """Values weighted by `[batch * heads, rows, keys]`: `[batch, heads, rows, features]`."""
        batch, heads, _, keys = side.shape
        rows = tensor_type(weights).shape[1]
        found = []
        for piece in side.operand.pieces:
            together = batch if side.is_shared(piece) else batch * heads
            part = self.reshape(weights, together, batch * heads // together * rows, keys)
            part = self.bmm(part, self.cached(side, piece, dtype))
            part = self.reshape(part, batch, heads, rows, side.width(piece))
            if piece.expansion is not None:
                weight = self.turned(self.weight(side, piece))
                part = self.weighted(part, weight, batch, heads, dtype)
            found.append(self.times(part, piece.scale))
        return self.cat(found)
