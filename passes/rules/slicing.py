"""Rules of ops that copy or select pieces of a dim: slice, split, cat, stack, select, scatters.

All of them are linear. A dim that is cut is seen as `[pieces, unit]` with the largest unit that all
cuts are multiples of: units shard, pieces do not. That is how a packed weight (gate and up, or q,
k and v) and its parts shard alike. Local forms cut the same pieces of local units.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from rolemesh.compiler.ir.dims import gcd
from rolemesh.compiler.ir.rule import Cuts, Kind, OpCall, Rule, RuleBuilder, TakeSegments
from rolemesh.passes.rules.arguments import dim_argument, int_argument
from rolemesh.passes.rules.registry import LocalCall, LocalForm, LocalFunction, RuleFunction
from rolemesh.passes.rules.views import UNARY, Dims, drop_dims, identity

__all__ = ["LOCAL", "RULES"]


class _Pieces:
    """A dim whose `[pieces, unit]` parts are copied; each value has its own number of pieces."""

    def __init__(self, builder: RuleBuilder, cuts: Iterable[int]) -> None:
        self.builder = builder
        self.unit = gcd(*cuts)
        self.factor = builder.factor(self.unit) if self.unit > 1 else ()

    def dim(self, extent: int) -> tuple[int, ...]:
        """Factors of a dim of `extent`."""
        if not self.factor or not extent:
            return self.builder.factor(extent, Kind.REPLICATE)
        if extent == self.unit:
            return self.factor
        return self.builder.factor(extent // self.unit, Kind.REPLICATE) + self.factor


def _with(dims: Dims, dim: int, factors: tuple[int, ...]) -> Dims:
    return [*dims[:dim], factors, *dims[dim + 1 :]]


def _dims_but(builder: RuleBuilder, shape: Sequence[int], dim: int) -> Dims:
    return [builder.factor(size) if i != dim else () for i, size in enumerate(shape)]


def _slice_bounds(call: OpCall, first: int, extent: int) -> tuple[int, int]:
    """Start and step of a slice call whose start is at argument `first`."""
    start = int_argument(call, first, "start", 0)
    start = max(start + extent, 0) if start < 0 else min(start, extent)
    return start, int_argument(call, first + 2, "step", 1)


def slice_(call: OpCall) -> Rule:
    """`slice(x, dim, start, end, step)` and `narrow(x, dim, start, length)`."""
    shape, target = call.operands[0].shape, call.results[0].shape
    dim = dim_argument(call, 1, len(shape))
    extent, length = shape[dim], target[dim]
    if extent == length:
        return identity(call)
    builder = RuleBuilder()
    start, step = _slice_bounds(call, 2, extent)
    dims = _dims_but(builder, shape, dim)
    if step > 1 and length * step == extent:
        kept = builder.factor(length)
        source = kept + builder.factor(step, Kind.REPLICATE)
    elif step > 1:
        source, kept = (builder.factor(size, Kind.REPLICATE) for size in (extent, length))
    else:
        pieces = _Pieces(builder, (extent, start, length) if length else (1,))
        source, kept = pieces.dim(extent), pieces.dim(length)
    cuts = Cuts(dim, ((start, length),)) if step == 1 and length else None
    return builder.build(
        [_with(dims, dim, source)], [_with(dims, dim, kept)], linear=UNARY, cuts=cuts
    )


def _consecutive(dim: int, lengths: Sequence[int]) -> Cuts:
    """Pieces of these lengths, one after the other."""
    starts = itertools.accumulate(lengths[:-1], initial=0)
    return Cuts(dim, tuple(zip(starts, lengths, strict=True)))


def split(call: OpCall) -> Rule:
    """`split(x, size, dim)`, `split_with_sizes(x, sizes, dim)`, `chunk(x, chunks, dim)`."""
    shape = call.operands[0].shape
    dim = dim_argument(call, 2, len(shape))
    builder = RuleBuilder()
    dims = _dims_but(builder, shape, dim)
    if len(call.results) == 1:
        dims[dim] = builder.factor(shape[dim])
        return builder.build([dims], [dims], linear=UNARY)
    lengths = [result.shape[dim] for result in call.results]
    pieces = _Pieces(builder, lengths)
    return builder.build(
        [_with(dims, dim, pieces.dim(shape[dim]))],
        [_with(dims, dim, pieces.dim(length)) for length in lengths],
        linear=UNARY,
        cuts=_consecutive(dim, lengths),
    )


def cat(call: OpCall) -> Rule:
    """`cat(tensors, dim)`. Empty 1-d tensors among them are ignored, as the op does."""
    shape = call.results[0].shape
    dim = dim_argument(call, 1, len(shape))
    linear = ((True,) * len(call.operands),)
    builder = RuleBuilder()
    dims = _dims_but(builder, shape, dim)
    parts = [value.shape for value in call.operands]
    if sum(1 for part in parts if len(part) == len(shape) and part[dim]) == 1:
        whole = _with(dims, dim, builder.factor(shape[dim]))
        empty = _with(dims, dim, ())
        operands = [_part_of_cat(part, shape, dim, whole, empty) for part in parts]
        return builder.build(operands, [whole], linear=linear)
    aligned = [part[dim] for part in parts if len(part) == len(shape)]
    pieces = _Pieces(builder, aligned)
    operands = [
        _with(dims, dim, pieces.dim(part[dim])) if len(part) == len(shape) else [()]
        for part in parts
    ]
    each_counts = len(aligned) == len(parts) and all(aligned)
    joins = _consecutive(dim, aligned) if each_counts else None
    result = _with(dims, dim, pieces.dim(shape[dim]))
    return builder.build(operands, [result], linear=linear, joins=joins)


def _part_of_cat(
    part: Sequence[int], shape: Sequence[int], dim: int, whole: Dims, empty: Dims
) -> Dims:
    if len(part) != len(shape):
        return [()]
    return whole if part[dim] else empty


def stack(call: OpCall) -> Rule:
    """`stack(tensors, dim)`."""
    shape = call.results[0].shape
    dim = dim_argument(call, 1, len(shape))
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    result = [*dims[:dim], builder.factor(shape[dim], Kind.REPLICATE), *dims[dim:]]
    count = len(call.operands)
    return builder.build([dims] * count, [result], linear=((True,) * count,))


def select(call: OpCall) -> Rule:
    """`select(x, dim, index)` and `unbind(x, dim)`: the results lack one dim."""
    shape = call.operands[0].shape
    dim = dim_argument(call, 1, len(shape))
    builder = RuleBuilder()
    if shape[dim] == 1:
        full, kept = drop_dims(shape, (dim,), builder)
    else:
        full = builder.dims(shape)
        builder.kinds[dim] = Kind.REPLICATE
        kept = full[:dim] + full[dim + 1 :]
    return builder.build([full], [kept] * len(call.results), linear=UNARY)


def slice_scatter(call: OpCall) -> Rule:
    """`slice_scatter(x, src, dim, start, end, step)`."""
    x, src = call.operands
    dim = dim_argument(call, 2, x.ndim)
    extent, length = x.shape[dim], src.shape[dim]
    builder = RuleBuilder()
    if extent == length and x.dtype == src.dtype:  # all of x is overwritten
        dims = builder.dims(x.shape)
        return builder.build([dims, dims], [dims], linear=((False, True),), unread=(0,))
    dims = _dims_but(builder, x.shape, dim)
    start, step = _slice_bounds(call, 3, extent)
    pieces = _Pieces(builder, (extent, start, length) if step == 1 else (1,))
    whole = _with(dims, dim, pieces.dim(extent))
    part = _with(dims, dim, pieces.dim(length))
    return builder.build([whole, part], [whole], linear=((True, True),))


def slice_backward(call: OpCall) -> Rule:
    """`slice_backward(grad, input_sizes, dim, start, end, step)`: a slice into zeros."""
    shape, part = call.results[0].shape, call.operands[0].shape
    dim = dim_argument(call, 2, len(shape))
    extent, length = shape[dim], part[dim]
    builder = RuleBuilder()
    if extent == length:
        return identity(call)
    dims = _dims_but(builder, shape, dim)
    start, step = _slice_bounds(call, 3, extent)
    pieces = _Pieces(builder, (extent, start, length) if step == 1 else (1,))
    return builder.build(
        [_with(dims, dim, pieces.dim(length))],
        [_with(dims, dim, pieces.dim(extent))],
        linear=UNARY,
    )


def select_scatter(call: OpCall) -> Rule:
    """`select_scatter(x, src, dim, index)`."""
    builder = RuleBuilder()
    shape = call.operands[0].shape
    dim = dim_argument(call, 2, len(shape))
    dims = builder.dims(shape)
    builder.kinds[dim] = Kind.REPLICATE
    part = dims[:dim] + dims[dim + 1 :]
    return builder.build([dims, part], [dims], linear=((True, True),))


def select_backward(call: OpCall) -> Rule:
    """`select_backward(grad, input_sizes, dim, index)`: a row of zeros is set."""
    builder = RuleBuilder()
    shape = call.results[0].shape
    dim = dim_argument(call, 2, len(shape))
    dims = builder.dims(shape)
    builder.kinds[dim] = Kind.REPLICATE
    return builder.build([dims[:dim] + dims[dim + 1 :]], [dims], linear=UNARY)


# ----------------------------------------------------------------------------------- local forms


def slice_local(local: LocalCall) -> LocalForm:
    """`slice` of the local pieces, for `narrow` too."""
    for axis, choice in enumerate(local.choices):
        if isinstance(choice, TakeSegments):
            return _segments_local(local, choice, local.mesh.sizes[axis])
    whole = local.call.operands[0].shape
    bounds = _local_bounds(local, 1, whole, local.operand_shape(0), local.result_shape())
    return torch.ops.aten.slice.Tensor, (local.args[0], *bounds), {}


def _segments_local(local: LocalCall, choice: TakeSegments, ranks: int) -> LocalForm:
    """The same segments of a packed dim, from where they start on a rank."""
    assert local.rule.cuts is not None
    source, ((start, _),) = choice.source, local.rule.cuts.bounds
    before = first = 0
    for length, held in zip(source.lengths, source.held(ranks), strict=True):
        if before == start:
            break
        before, first = before + length, first + held
    end = first + local.result_shape()[source.dim]
    return torch.ops.aten.slice.Tensor, (local.args[0], source.dim, first, end), {}


def split_local(local: LocalCall) -> LocalForm:
    """Pieces of the local sizes."""
    dim = dim_argument(local.call, 2, local.call.operands[0].ndim)
    sizes = [local.result_shape(i)[dim] for i in range(len(local.call.results))]
    return torch.ops.aten.split_with_sizes.default, (local.args[0], sizes, dim), {}


def slice_scatter_local(local: LocalCall) -> LocalForm:
    """The same pieces of local units; the source itself where it overwrites everything."""
    if local.rule.unread:
        return torch.ops.aten.clone.default, (local.args[1],), {}
    whole = local.call.results[0].shape
    bounds = _local_bounds(local, 2, whole, local.result_shape(), local.operand_shape(1))
    return local.call.target, (*local.args[:2], *bounds), {}


def slice_backward_local(local: LocalCall) -> LocalForm:
    """The same pieces of local units, into zeros of the local sizes."""
    whole, sizes = local.call.results[0].shape, local.result_shape()
    bounds = _local_bounds(local, 2, whole, sizes, local.operand_shape(0))
    return local.call.target, (local.args[0], list(sizes), *bounds), {}


def _local_bounds(
    local: LocalCall,
    index: int,
    whole: Sequence[int],
    mine: Sequence[int],
    part: Sequence[int],
) -> tuple[int, int, int, int]:
    """Local dim, start, end and step of a call.

    Args:
        local: The call.
        index: Position of its dim argument; start, end and step follow.
        whole: Logical shape of the value that is cut.
        mine: Local shape of that value.
        part: Local shape of the slice.
    """
    dim = dim_argument(local.call, index, len(whole))
    start, step = _slice_bounds(local.call, index + 1, whole[dim])
    if mine[dim] == part[dim]:
        start = 0
    elif step == 1:  # the start is a multiple of the unit, which shrinks like the dim itself
        start = start * mine[dim] // whole[dim]
    end = start + (part[dim] - 1) * step + 1 if part[dim] else start
    return dim, start, end, step


def select_backward_local(local: LocalCall) -> LocalForm:
    """Zeros of the local sizes."""
    return local.call.target, (local.args[0], list(local.result_shape()), *local.args[2:]), {}


RULES: dict[str, RuleFunction] = {
    "aten::slice": slice_,
    "aten::narrow": slice_,
    "aten::split": split,
    "aten::split_with_sizes": split,
    "aten::unsafe_split": split,
    "aten::unsafe_split_with_sizes": split,
    "aten::chunk": split,
    "aten::unsafe_chunk": split,
    "aten::cat": cat,
    "aten::stack": stack,
    "aten::select": select,
    "aten::unbind": select,
    "aten::slice_scatter": slice_scatter,
    "aten::slice_backward": slice_backward,
    "aten::select_scatter": select_scatter,
    "aten::select_backward": select_backward,
}

LOCAL: dict[str, LocalFunction] = {
    "aten::slice": slice_local,
    "aten::narrow": slice_local,
    "aten::split": split_local,
    "aten::split_with_sizes": split_local,
    "aten::unsafe_split": split_local,
    "aten::unsafe_split_with_sizes": split_local,
    "aten::chunk": split_local,
    "aten::unsafe_chunk": split_local,
    "aten::slice_scatter": slice_scatter_local,
    "aten::slice_backward": slice_backward_local,
    "aten::select_backward": select_backward_local,
}
