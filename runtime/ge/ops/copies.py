"""Ops that move elements without computing: copies, casts, assignments, views by strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import COMPLEX, FLOATS, copied, demand, only
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("Identity", view=True)
def identity(a: Attributes, x: Tensor) -> Tensor:
    return x


@OPS.op("IdentityN", dynamic=("x",), view=True)
def identity_n(a: Attributes, x: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x)


@OPS.op("TensorMove")
def tensor_move(a: Attributes, x: Tensor) -> Tensor:
    return copied(x)


@OPS.op("Cast")
def cast(a: Attributes, x: Tensor) -> Tensor:
    """Floating point to integer drops the fraction; anything but 0 becomes True."""
    target = a.dtype("dst_type")
    if x.dtype in COMPLEX and target not in COMPLEX:
        raise ValueError(f"{a.where}: no semantics for a cast of {x.dtype} to {target}")
    return x.to(target, copy=True)


@OPS.op("Bitcast")
def bitcast(a: Attributes, x: Tensor) -> Tensor:
    """The same bytes as another type.

    A narrower type adds a last dim that holds the parts of one element, a wider one takes it away.
    """
    only(a, keep_dim=False)
    target = a.dtype("type")
    before, after = x.element_size(), target.itemsize
    if before > after:
        return copied(x.unsqueeze(-1).view(target))
    if before < after:
        if not x.dim() or x.shape[-1] * before != after:
            raise ValueError(f"{a.where}: {x.dtype} of shape {list(x.shape)} to {target}")
        return copied(x.view(target).squeeze(-1))
    return copied(x.view(target))


@OPS.op("Assign", equal=("ref", "value"), writes={0: "ref"})
def assign(a: Attributes, ref: Tensor, value: Tensor) -> Tensor:
    """Write a value of the same shape; locking has no meaning in a graph."""
    only(a, validate_shape=True)
    if ref.shape != value.shape:
        raise ValueError(f"{a.where}: shape {list(value.shape)} into {list(ref.shape)}")
    return ref.copy_(value)


@OPS.op("AsStrided")
def as_strided(
    a: Attributes, x: Tensor, size: Tensor, stride: Tensor, storage_offset: Tensor
) -> Tensor:
    """The elements of contiguous x that strides reach."""
    (offset,) = integers(storage_offset)
    view = torch.as_strided(x.contiguous().reshape(-1), integers(size), integers(stride), offset)
    return copied(view)


@OPS.op("ViewCopy", equal=("dst", "src"), writes={0: "dst"})
def view_copy(
    a: Attributes,
    dst: Tensor,
    dst_size: Tensor,
    dst_stride: Tensor,
    dst_storage_offset: Tensor,
    src: Tensor,
    src_size: Tensor,
    src_stride: Tensor,
    src_storage_offset: Tensor,
) -> Tensor:
    """Write elements that strides reach in src to those that strides reach in contiguous dst."""
    if not dst.is_contiguous():
        raise ValueError(f"{a.where}: dst is not contiguous")
    (into,), (out_of,) = integers(dst_storage_offset), integers(src_storage_offset)
    target = torch.as_strided(dst, integers(dst_size), integers(dst_stride), into)
    source = src.contiguous().reshape(-1)
    target.copy_(torch.as_strided(source, integers(src_size), integers(src_stride), out_of))
    return dst


@OPS.op("Complex", equal=("real", "imag"))
def complex_(a: Attributes, real: Tensor, imag: Tensor) -> Tensor:
    demand(a, FLOATS, real)
    result = torch.complex(real, imag)
    if result.dtype != a.dtype("Tout", torch.complex64):
        raise ValueError(f"{a.where}: {result.dtype} is not the type of Tout")
    return result


@OPS.op("Real")
def real(a: Attributes, input: Tensor) -> Tensor:  # noqa: A002
    return _part(a, input, 0)


@OPS.op("Imag")
def imag(a: Attributes, input: Tensor) -> Tensor:  # noqa: A002
    return _part(a, input, 1)


def _part(a: Attributes, x: Tensor, part: int) -> Tensor:
    demand(a, COMPLEX, x)
    result = copied(torch.view_as_real(x)[..., part])
    if result.dtype != a.dtype("Tout", torch.float32):
        raise ValueError(f"{a.where}: {result.dtype} is not the type of Tout")
    return result


@OPS.op("FFT")
def fft(a: Attributes, x: Tensor) -> Tensor:
    """The forward transform of the last dim, without a factor."""
    demand(a, COMPLEX, x)
    return torch.fft.fft(x)


@OPS.op("FFT2D")
def fft_2d(a: Attributes, x: Tensor) -> Tensor:
    """The forward transform of the last two dims, without a factor."""
    demand(a, COMPLEX, x)
    return torch.fft.fft2(x)
