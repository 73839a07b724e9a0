"""Ops that make tensors from sizes and values."""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import FLOATS, INTEGERS, demand
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("Fill")
def fill(a: Attributes, dims: Tensor, value: Tensor) -> Tensor:
    """A shape filled with one value."""
    if value.numel() != 1:
        raise ValueError(f"{a.where}: the value has {value.numel()} elements")
    return value.new_empty(integers(dims)).copy_(value.reshape(()))


@OPS.op("FillD")
def fill_d(a: Attributes, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"{a.where}: the value has {value.numel()} elements")
    return value.new_empty(a.ints("dims")).copy_(value.reshape(()))


@OPS.op("Fills")
def fills(a: Attributes, x: Tensor) -> Tensor:
    """The shape and dtype of x filled with an attribute."""
    return torch.full_like(x, a.float("value"))


@OPS.op("ZerosLike")
def zeros_like(a: Attributes, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


@OPS.op("OnesLike")
def ones_like(a: Attributes, x: Tensor) -> Tensor:
    return torch.ones_like(x)


@OPS.op("Empty")
def empty(a: Attributes, shape: Tensor) -> Tensor:
    """Zeros if init, else unspecified contents: NaN or the lowest integer, so that a use shows."""
    dtype = a.dtype("dtype", torch.int32)
    if a.bool("init", False) or dtype == torch.bool:
        return torch.zeros(integers(shape), dtype=dtype)
    poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(integers(shape), poison, dtype=dtype)


@OPS.op("Range")
def range_(a: Attributes, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """From start in steps of delta until before limit, in the widest of their dtypes."""
    demand(a, FLOATS | INTEGERS, start, limit, delta)
    dtype = torch.promote_types(torch.promote_types(start.dtype, limit.dtype), delta.dtype)
    first, last, step = (bound.reshape(()).item() for bound in (start, limit, delta))
    if not step or (last - first) / step < 0:
        raise ValueError(f"{a.where}: steps of {step} from {first} do not lead to {last}")
    return torch.arange(first, last, step, dtype=dtype)


@OPS.op("LinSpace", equal=("start", "stop"))
def lin_space(a: Attributes, start: Tensor, stop: Tensor, num: Tensor) -> Tensor:
    """So many values from start to stop, both included."""
    demand(a, FLOATS, start)
    (count,) = integers(num)
    first, last = (bound.reshape(()).item() for bound in (start, stop))
    return torch.linspace(first, last, count, dtype=start.dtype)


@OPS.op("Eye")
def eye(a: Attributes) -> Tensor:
    """Ones on the diagonal of each matrix of a batch; num_columns of 0 means square."""
    rows, columns = a.int("num_rows"), a.int("num_columns", 0)
    square = torch.eye(rows, columns or rows, dtype=a.dtype("dtype", torch.float32))
    return square.expand(*a.ints("batch_shape", ()), -1, -1).contiguous()


@OPS.op("Diag")
def diag(a: Attributes, x: Tensor) -> Tensor:
    """The elements of x on the diagonal of a tensor of twice its dims, elsewhere 0."""
    return torch.diag(x.reshape(-1)).reshape(*x.shape, *x.shape)


@OPS.op("DiagPart")
def diag_part(a: Attributes, x: Tensor) -> Tensor:
    """The diagonal of a tensor whose first half of dims equals the second."""
    half = x.shape[: x.dim() // 2]
    if x.shape != half + half:
        raise ValueError(f"{a.where}: shape {list(x.shape)} has no diagonal")
    return x.reshape(half.numel(), half.numel()).diagonal().clone().reshape(half)
