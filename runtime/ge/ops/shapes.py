"""Ops that change the shape or the order of elements: reshapes, transposes, repeats, joins.

Ops that only rename dims may return memory of their input; all others return new memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import INDICES, copied, normal_axis, only
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("Reshape", view=True)
def reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """A size of 0 copies the dim of x at the same place, -1 takes what is left.

    If x has no elements, there is nothing to infer from and 0 means 0.
    """
    only(a, axis=0, num_axes=-1)
    sizes = integers(shape)
    if x.numel():
        for dim, size in enumerate(sizes):
            if size == 0:
                if dim >= x.dim():
                    raise ValueError(f"{a.where}: size 0 at dim {dim} copies a dim that x lacks")
                sizes[dim] = x.shape[dim]
    return x.reshape(sizes)


@OPS.op("Flatten", view=True)
def flatten(a: Attributes, x: Tensor) -> Tensor:
    """Two dims: those before an axis and those from it on."""
    axis = a.int("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if not 0 <= axis <= x.dim():
        raise ValueError(f"{a.where}: axis {axis} of a tensor with {x.dim()} dims")
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@OPS.op("FlattenV2", view=True)
def flatten_v2(a: Attributes, x: Tensor) -> Tensor:
    """The dims from axis to end_axis as one."""
    first = normal_axis(a, a.int("axis", 1), x.dim())
    last = normal_axis(a, a.int("end_axis", -1), x.dim())
    return x.flatten(first, last)


@OPS.op("Squeeze", view=True)
def squeeze(a: Attributes, x: Tensor) -> Tensor:
    """Without the dims of size 1 that axis names; without axis, without any of them."""
    named = {normal_axis(a, axis, x.dim()) for axis in a.ints("axis", ())}
    for axis in named:
        if x.dim() and x.shape[axis] != 1:
            raise ValueError(f"{a.where}: dim {axis} has size {x.shape[axis]}, not 1")
    gone = named or {dim for dim, size in enumerate(x.shape) if size == 1}
    return x.reshape([size for dim, size in enumerate(x.shape) if dim not in gone])


@OPS.op("Unsqueeze", view=True)
def unsqueeze(a: Attributes, x: Tensor) -> Tensor:
    """With dims of size 1 at the axes of the result."""
    given = a.ints("axes", ())
    rank = x.dim() + len(given)
    axes = {normal_axis(a, axis, rank) for axis in given}
    if len(axes) != len(given):
        raise ValueError(f"{a.where}: axes {given} of {rank} dims repeat")
    sizes = iter(x.shape)
    return x.reshape([1 if dim in axes else next(sizes) for dim in range(rank)])


@OPS.op("ExpandDims", view=True)
def expand_dims(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    (dim,) = integers(axis)
    return x.unsqueeze(normal_axis(a, dim, x.dim() + 1))


@OPS.op("Transpose")
def transpose(a: Attributes, x: Tensor, perm: Tensor) -> Tensor:
    return copied(x.permute(integers(perm)))


@OPS.op("TransposeD")
def transpose_d(a: Attributes, x: Tensor) -> Tensor:
    return copied(x.permute(a.ints("perm")))


@OPS.op("Permute")
def permute(a: Attributes, x: Tensor) -> Tensor:
    return copied(x.permute(a.ints("order", (0,))))


@OPS.op("BroadcastTo")
def broadcast_to(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """To exactly a shape, in which -1 keeps the size of x."""
    return _broadcast(a, x, integers(shape))


@OPS.op("BroadcastToD")
def broadcast_to_d(a: Attributes, x: Tensor) -> Tensor:
    return _broadcast(a, x, a.ints("shape"))


def _broadcast(a: Attributes, x: Tensor, sizes: list[int]) -> Tensor:
    new = len(sizes) - x.dim()
    if new < 0 or -1 in sizes[:new]:
        raise ValueError(f"{a.where}: shape {list(x.shape)} to {sizes}")
    return copied(x.expand([x.shape[i - new] if n == -1 else n for i, n in enumerate(sizes)]))


@OPS.op("Expand")
def expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    """To the shape that x and `shape` broadcast to, which can be larger than either."""
    return copied(x.expand(torch.broadcast_shapes(x.shape, integers(shape))))


@OPS.op("Tile")
def tile(a: Attributes, x: Tensor, multiples: Tensor) -> Tensor:
    """Each dim so many times; more multiples than dims add leading dims."""
    counts = integers(multiples)
    if len(counts) < x.dim():
        raise ValueError(f"{a.where}: {len(counts)} multiples for {x.dim()} dims")
    return x.repeat(counts)


@OPS.op("TileD")
def tile_d(a: Attributes, x: Tensor) -> Tensor:
    counts = a.ints("multiples")
    if len(counts) < x.dim():
        raise ValueError(f"{a.where}: {len(counts)} multiples for {x.dim()} dims")
    return x.repeat(counts)


@OPS.op("ReverseV2")
def reverse_v2(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    return x.flip([normal_axis(a, dim, x.dim()) for dim in integers(axis)])


@OPS.op("Roll")
def roll(a: Attributes, x: Tensor) -> Tensor:
    """Without dims, the elements in their order."""
    return _roll(a, x, a.ints("shifts"), a.ints("dims", ()))


@OPS.op("RollV2")
def roll_v2(a: Attributes, input: Tensor, shift: Tensor, axes: Tensor) -> Tensor:  # noqa: A002
    return _roll(a, input, integers(shift), integers(axes))


def _roll(a: Attributes, x: Tensor, shifts: list[int], axes: list[int]) -> Tensor:
    if len(shifts) != (len(axes) or 1):
        raise ValueError(f"{a.where}: {len(shifts)} shifts for {len(axes)} axes")
    return copied(torch.roll(x, shifts, axes))


@OPS.op("ConcatV2", dynamic=("x",), equal=("x",))
def concat_v2(a: Attributes, x: Sequence[Tensor], concat_dim: Tensor) -> Tensor:
    (axis,) = integers(concat_dim)
    return _concat(a, x, axis)


@OPS.op("Concat", dynamic=("x",), equal=("x",))
def concat(a: Attributes, concat_dim: Tensor, x: Sequence[Tensor]) -> Tensor:
    (axis,) = integers(concat_dim)
    return _concat(a, x, axis)


@OPS.op("ConcatD", "ConcatV2D", dynamic=("x",), equal=("x",))
def concat_d(a: Attributes, x: Sequence[Tensor]) -> Tensor:
    return _concat(a, x, a.int("concat_dim"))


def _concat(a: Attributes, x: Sequence[Tensor], axis: int) -> Tensor:
    """Join tensors of equal rank: unlike torch.cat, an empty one with one dim is no exception."""
    _counted(a, x)
    if len({tensor.dim() for tensor in x}) != 1:
        raise ValueError(f"{a.where}: ranks {[tensor.dim() for tensor in x]} differ")
    return torch.cat(list(x), normal_axis(a, axis, x[0].dim()))


def _counted(a: Attributes, x: Sequence[Tensor]) -> None:
    """N, if there is one, is the number of tensors."""
    if a.int("N", len(x)) != len(x):
        raise ValueError(f"{a.where}: N is {a.int('N')}, but {len(x)} tensors are fed")


@OPS.op("Pack", dynamic=("x",))
def pack(a: Attributes, x: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new dim.

    Of one dtype too, but for the sizes of a shape, which torchair mixes from int32 and int64.
    """
    _counted(a, x)
    dtypes = {tensor.dtype for tensor in x}
    if len(dtypes) > 1 and not dtypes <= INDICES:
        raise ValueError(f"{a.where}: dtypes {[str(tensor.dtype) for tensor in x]} differ")
    return torch.stack(list(x), normal_axis(a, a.int("axis", 0), x[0].dim() + 1))


@OPS.op("Unpack")
def unpack(a: Attributes, x: Tensor) -> tuple[Tensor, ...]:
    """The slices along a dim, which goes."""
    axis = normal_axis(a, a.int("axis", 0), x.dim())
    if x.shape[axis] != a.int("num"):
        raise ValueError(f"{a.where}: dim {axis} has {x.shape[axis]} slices, not {a.int('num')}")
    return tuple(copied(part) for part in x.unbind(axis))


@OPS.op("Split")
def split(a: Attributes, split_dim: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    (axis,) = integers(split_dim)
    return _split_evenly(a, x, axis)


@OPS.op("SplitD")
def split_d(a: Attributes, x: Tensor) -> tuple[Tensor, ...]:
    return _split_evenly(a, x, a.int("split_dim"))


@OPS.op("SplitV")
def split_v(a: Attributes, x: Tensor, size_splits: Tensor, split_dim: Tensor) -> tuple[Tensor, ...]:
    """Parts of given sizes, of which one may be -1: what is left."""
    (axis,) = integers(split_dim)
    return _split(a, x, integers(size_splits), axis)


@OPS.op("SplitVD")
def split_vd(a: Attributes, x: Tensor) -> tuple[Tensor, ...]:
    return _split(a, x, a.ints("size_splits"), a.int("split_dim"))


def _split_evenly(a: Attributes, x: Tensor, axis: int) -> tuple[Tensor, ...]:
    size, count = x.shape[normal_axis(a, axis, x.dim())], a.int("num_split")
    if size % count:
        raise ValueError(f"{a.where}: dim {axis} of size {size} has no {count} equal parts")
    return _split(a, x, [size // count] * count, axis)


def _split(a: Attributes, x: Tensor, sizes: list[int], axis: int) -> tuple[Tensor, ...]:
    axis = normal_axis(a, axis, x.dim())
    if len(sizes) != a.int("num_split"):
        raise ValueError(f"{a.where}: {len(sizes)} sizes for {a.int('num_split')} parts")
    if -1 in sizes:
        place = sizes.index(-1)
        sizes[place] = x.shape[axis] - sum(sizes) - 1
    if min(sizes) < 0 or sum(sizes) != x.shape[axis]:
        raise ValueError(f"{a.where}: dim {axis} of size {x.shape[axis]} into {sizes}")
    return tuple(copied(part) for part in x.split(sizes, axis))


@OPS.op("Shape")
def shape_(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape), dtype=a.dtype("dtype", torch.int32))


@OPS.op("ShapeN", dynamic=("x",))
def shape_n(a: Attributes, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    dtype = a.dtype("dtype", torch.int32)
    return tuple(torch.tensor(list(tensor.shape), dtype=dtype) for tensor in x)


@OPS.op("Rank")
def rank(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.dim(), dtype=torch.int32)


@OPS.op("Size")
def size_(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=a.dtype("dtype", torch.int32))
