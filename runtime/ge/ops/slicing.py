"""Ops that take or add a margin: slices, paddings, triangles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import copied, normal_axis, only
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()

_MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


@dataclass(frozen=True)
class _Range:
    """What a slice takes of one dim: every step-th element from start, count in all."""

    start: int
    step: int
    count: int


def _range(a: Attributes, size: int, begin: int | None, end: int | None, step: int) -> _Range:
    if step == 0:
        raise ValueError(f"{a.where}: a stride of 0")
    taken = range(*slice(begin, end, step).indices(size))
    return _Range(taken.start, taken.step, len(taken))


def _take(x: Tensor, dim: int, taken: _Range) -> Tensor:
    if not taken.count:
        return x.narrow(dim, 0, 0)
    span = (taken.count - 1) * abs(taken.step) + 1
    if taken.step < 0:
        x = x.narrow(dim, taken.start - span + 1, span).flip(dim)
    else:
        x = x.narrow(dim, taken.start, span)
    return x[(*[slice(None)] * dim, slice(None, None, abs(taken.step)))]


@OPS.op("Slice")
def slice_(a: Attributes, x: Tensor, offsets: Tensor, size: Tensor) -> Tensor:
    """So many elements of each dim from an offset; -1 takes the rest."""
    starts, counts = integers(offsets), integers(size)
    if len(starts) != x.dim() or len(counts) != x.dim():
        raise ValueError(f"{a.where}: {len(starts)} offsets, {len(counts)} sizes, {x.dim()} dims")
    for dim, (start, count) in enumerate(zip(starts, counts, strict=True)):
        x = x.narrow(dim, start, x.shape[dim] - start if count == -1 else count)
    return copied(x)


@OPS.op("StridedSliceV2")
def strided_slice_v2(
    a: Attributes,
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    axes: Tensor | None = None,
    strides: Tensor | None = None,
) -> Tensor:
    """Python's slices along some axes, or along the first dims if axes is unfed.

    Bounds are cut to the dim, negative ones count from its end. With axes there can be no masks:
    the definition does not say which slice a bit stands for.
    """
    begins, ends = integers(begin), integers(end)
    steps = [1] * len(begins) if strides is None else integers(strides)
    if axes is None:
        return _strided_slice(a, x, begins, ends, steps)
    only(a, **dict.fromkeys(_MASKS, 0))
    dims = [normal_axis(a, axis, x.dim()) for axis in integers(axes)]
    if not len(begins) == len(ends) == len(steps) == len(dims) == len(set(dims)):
        raise ValueError(f"{a.where}: {begins}, {ends}, {steps} along axes {dims}")
    for dim, first, last, step in zip(dims, begins, ends, steps, strict=True):
        x = _take(x, dim, _range(a, x.shape[dim], first, last, step))
    return copied(x)


@OPS.op("StridedSlice")
def strided_slice(a: Attributes, x: Tensor, begin: Tensor, end: Tensor, strides: Tensor) -> Tensor:
    return _strided_slice(a, x, integers(begin), integers(end), integers(strides))


@OPS.op("StridedSliceD")
def strided_slice_d(a: Attributes, x: Tensor) -> Tensor:
    return _strided_slice(a, x, a.ints("begin"), a.ints("end"), a.ints("strides"))


def _strided_slice(
    a: Attributes, x: Tensor, begins: list[int], ends: list[int], steps: list[int]
) -> Tensor:
    """TensorFlow's strided_slice: bit i of a mask concerns the i-th specification.

    A begin or end bit leaves that bound open, the ellipsis bit stands for all dims not named, a new
    axis bit adds a dim of size 1, a shrink bit takes the element at begin and drops the dim.
    """
    open_begin, open_end, ellipsis, new_axis, shrink = (a.int(name, 0) for name in _MASKS)
    if not len(begins) == len(ends) == len(steps):
        raise ValueError(f"{a.where}: {begins}, {ends}, {steps} differ in length")
    if ellipsis.bit_count() > 1:
        raise ValueError(f"{a.where}: more than one ellipsis")
    count = len(begins)
    named = sum(1 for i in range(count) if not (ellipsis | new_axis) >> i & 1)
    if named > x.dim():
        raise ValueError(f"{a.where}: {named} slices of a tensor with {x.dim()} dims")
    dim = 0
    for i in range(count):
        if ellipsis >> i & 1:
            dim += x.dim() - dim - sum(1 for j in range(i + 1, count) if not new_axis >> j & 1)
        elif new_axis >> i & 1:
            x = x.unsqueeze(dim)
            dim += 1
        elif shrink >> i & 1:
            x = x.select(dim, begins[i])
        else:
            first = None if open_begin >> i & 1 else begins[i]
            last = None if open_end >> i & 1 else ends[i]
            x = _take(x, dim, _range(a, x.shape[dim], first, last, steps[i]))
            dim += 1
    return copied(x)


@OPS.op("PadV3", equal=("x", "constant_values"))
def pad_v3(
    a: Attributes, x: Tensor, paddings: Tensor, constant_values: Tensor | None = None
) -> Tensor:
    """Elements before and after each dim: constant (0 if unfed), edge, or reflect.

    The counts lie in pairs by dim, or all of those before first if not paddings_contiguous.
    """
    counts = integers(paddings)
    if a.bool("paddings_contiguous", True):
        befores, afters = counts[::2], counts[1::2]
    else:
        befores, afters = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    value = x.new_zeros(()) if constant_values is None else constant_values
    return _pad(a, x, befores, afters, a.str("mode", "constant"), value)


@OPS.op("Pad")
def pad(a: Attributes, x: Tensor, paddings: Tensor) -> Tensor:
    counts = integers(paddings)
    return _pad(a, x, counts[::2], counts[1::2], "constant", x.new_zeros(()))


@OPS.op("PadV2", equal=("x", "constant_values"))
def pad_v2(a: Attributes, x: Tensor, paddings: Tensor, constant_values: Tensor) -> Tensor:
    counts = integers(paddings)
    return _pad(a, x, counts[::2], counts[1::2], "constant", constant_values)


@OPS.op("MirrorPad")
def mirror_pad(a: Attributes, x: Tensor, paddings: Tensor) -> Tensor:
    """Mirrored at the outermost element (REFLECT) or behind it (SYMMETRIC)."""
    counts, mode = integers(paddings), a.str("mode")
    if mode not in ("REFLECT", "SYMMETRIC"):
        raise ValueError(f"{a.where}: no semantics for mode={mode!r}")
    return _pad(a, x, counts[::2], counts[1::2], mode.lower(), x.new_zeros(()))


def _pad(
    a: Attributes, x: Tensor, befores: list[int], afters: list[int], mode: str, value: Tensor
) -> Tensor:
    if not len(befores) == len(afters) == x.dim():
        raise ValueError(f"{a.where}: {len(befores) + len(afters)} paddings for {x.dim()} dims")
    if min([*befores, *afters], default=0) < 0:
        raise ValueError(f"{a.where}: a negative padding; cut with a slice before the op")
    if mode == "constant":
        shape = [b + n + e for b, n, e in zip(befores, x.shape, afters, strict=True)]
        padded = x.new_empty(shape).copy_(value.reshape(()).expand(shape))
        inner = padded
        for dim, before in enumerate(befores):
            inner = inner.narrow(dim, before, x.shape[dim])
        inner.copy_(x)
        return padded
    for dim, (before, after) in enumerate(zip(befores, afters, strict=True)):
        x = x.index_select(dim, _sources(a, x.shape[dim], before, after, mode))
    return copied(x)


def _sources(a: Attributes, size: int, before: int, after: int, mode: str) -> Tensor:
    """For each element of a padded dim the element that it copies."""
    place = torch.arange(-before, size + after)
    if mode == "edge":
        return place.clamp(0, size - 1)
    if mode == "reflect":
        period, beyond = 2 * size - 2, size - 1
    elif mode == "symmetric":
        period, beyond = 2 * size, size
    else:
        raise ValueError(f"{a.where}: no semantics for mode={mode!r}")
    if max(before, after) > beyond:
        raise ValueError(f"{a.where}: {max(before, after)} mirrored elements of {size}")
    place = place.remainder(max(period, 1))
    return torch.where(place < size, place, period - place - int(mode == "symmetric"))


@OPS.op("Triu")
def triu(a: Attributes, x: Tensor) -> Tensor:
    """The last two dims from a diagonal up, else 0."""
    return torch.triu(x, a.int("diagonal", 0))


@OPS.op("Tril")
def tril(a: Attributes, x: Tensor) -> Tensor:
    """The last two dims from a diagonal down, else 0."""
    return torch.tril(x, a.int("diagonal", 0))


@OPS.op("MatrixBandPart")
def matrix_band_part(a: Attributes, x: Tensor, num_lower: Tensor, num_upper: Tensor) -> Tensor:
    """So many diagonals below and above the main one, else 0; -1 keeps all on that side."""
    (below,), (above,) = integers(num_lower), integers(num_upper)
    if below >= 0:
        x = torch.triu(x, -below)
    if above >= 0:
        x = torch.tril(x, above)
    return copied(x)


@OPS.op("StridedSliceAssign", equal=("var", "input_value"), writes={0: "var"})
def strided_slice_assign(
    a: Attributes, var: Tensor, begin: Tensor, end: Tensor, strides: Tensor, input_value: Tensor
) -> Tensor:
    """Write a value of the slice's shape to a slice with positive strides and no masks."""
    only(a, **dict.fromkeys(_MASKS, 0))
    part = var
    bounds = zip(integers(begin), integers(end), integers(strides), strict=True)
    for dim, (first, last, step) in enumerate(bounds):
        if step < 1:
            raise ValueError(f"{a.where}: a stride of {step}")
        part = _take(part, dim, _range(a, var.shape[dim], first, last, step))
    if part.shape != input_value.shape:
        raise ValueError(f"{a.where}: shape {list(input_value.shape)} into {list(part.shape)}")
    part.copy_(input_value)
    return var
