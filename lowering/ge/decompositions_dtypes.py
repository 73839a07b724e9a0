"""Decompositions that give GE ops operands of dtypes and shapes that they take.

ATen computes functions of floats for integers too, orders truth values, and multiplies integer
matrices; the GE ops do not, and torchair's converters hand such operands on as they are. GE tensors
also have no memory format, and some converters need a dim to look at.

Invariant: a decomposition returns NotImplemented for operands that the converter gets right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, NotImplementedType

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["DTYPES"]

aten = torch.ops.aten

_Decomposition = Callable[..., object]


def _of_floats(op: OpOverload) -> _Decomposition:
    """A function of floats: integers become floats."""

    def compute(self: Tensor) -> Tensor | NotImplementedType:
        if self.is_floating_point() or self.is_complex():
            return NotImplemented
        return op(self.to(torch.get_default_dtype()))

    return compute


def _rounded(self: Tensor) -> Tensor | NotImplementedType:
    """An integer is a whole number already."""
    return NotImplemented if self.is_floating_point() else aten.alias.default(self)


def _sign(self: Tensor) -> Tensor | NotImplementedType:
    return aten.alias.default(self) if self.dtype is torch.bool else NotImplemented


def _isinf(self: Tensor) -> Tensor | NotImplementedType:
    if self.is_floating_point() or self.is_complex():
        return NotImplemented
    return torch.zeros_like(self, dtype=torch.bool)


def _of_numbers(op: OpOverload) -> _Decomposition:
    """A function of two numbers: both get the type that ATen promotes them to.

    Truth values become numbers, and a result of theirs is one.
    """

    def compute(
        self: Tensor, other: Tensor | float, **kwargs: object
    ) -> Tensor | NotImplementedType:
        kind = torch.result_type(self, other)
        number = torch.int32 if kind is torch.bool else kind
        operands = [x for x in (self, other) if isinstance(x, Tensor)]
        if all(x.dtype is number for x in operands) and not isinstance(other, bool):
            return NotImplemented
        found = op(_as(self, number), _as(other, number), **kwargs)
        return found != 0 if kind is torch.bool and found.dtype is not torch.bool else found

    return compute


def _as(x: Tensor | float, number: torch.dtype) -> Tensor | float:
    if not isinstance(x, Tensor):
        return int(x) if isinstance(x, bool) else x
    return x.to(number)


def _max(self: Tensor) -> Tensor | NotImplementedType:
    return self.amax() if self.dtype is torch.bool else NotImplemented


def _max_dim(
    self: Tensor, dim: int, keepdim: bool = False
) -> tuple[Tensor, Tensor] | NotImplementedType:
    if self.dtype is not torch.bool:
        return NotImplemented
    values, places = self.to(torch.int32).max(dim, keepdim)
    return values != 0, places


def _min(self: Tensor) -> Tensor:
    return self.amin()


def _min_dim(self: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    numbers = self.to(torch.int32) if self.dtype is torch.bool else self
    return self.amin(dim, keepdim), numbers.argmin(dim, keepdim)


def _extremum(op: OpOverload) -> _Decomposition:
    """`amax` or `amin`: GE reduces numbers, and over at least one dim."""

    def reduce(
        self: Tensor, dim: Sequence[int] = (), keepdim: bool = False
    ) -> Tensor | NotImplementedType:
        if self.dim() == 0:
            return aten.alias.default(self)
        if self.dtype is not torch.bool:
            return NotImplemented
        return op(self.to(torch.int32), dim, keepdim) != 0

    return reduce


def _prod(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor | NotImplementedType:
    if self.dim():
        return NotImplemented
    return self.to(dtype or (self.dtype if self.is_floating_point() else torch.int64))


def _prod_dim(
    self: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | NotImplementedType:
    return _prod(self, dtype=dtype)


def _sort(
    self: Tensor, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor] | NotImplementedType:
    if self.dim() and self.dtype is not torch.bool:
        return NotImplemented
    values, places = torch.sort(self, stable=False, dim=dim, descending=descending)
    return values, places


def _sort_stable(
    self: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor] | NotImplementedType:
    """GE sorts numbers along the last dim."""
    if self.dim() == 0:
        return aten.alias.default(self), torch.zeros_like(self, dtype=torch.int64)
    if self.dtype is not torch.bool and dim % self.dim() == self.dim() - 1:
        return NotImplemented
    numbers = self.to(torch.int32) if self.dtype is torch.bool else self
    values, places = torch.sort(
        numbers.transpose(dim, -1), stable=stable, dim=-1, descending=descending
    )
    return values.to(self.dtype).transpose(dim, -1), places.transpose(dim, -1)


def _mm(self: Tensor, mat2: Tensor) -> Tensor | NotImplementedType:
    """`mm` and `bmm`: GE multiplies matrices of floats."""
    if self.is_floating_point() or self.is_complex():
        return NotImplemented
    return (self.unsqueeze(-1) * mat2.unsqueeze(-3)).sum(-2, dtype=self.dtype)


def _addmm(
    self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | NotImplementedType:
    """Torchair's converter takes any vector for a bias of all columns."""
    if not self.is_floating_point():
        return int(beta) * self + int(alpha) * (mat1 @ mat2)
    if self.dim() != 1 or self.shape[0] == mat2.shape[1]:
        return NotImplemented
    row = self.expand(mat2.shape[1])
    return aten.addmm.default(row, mat1, mat2, beta=beta, alpha=alpha)


def _addbmm(
    self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if not self.is_floating_point():
        return int(beta) * self + int(alpha) * (batch1 @ batch2).sum(0, dtype=self.dtype)
    wide = torch.float64 if self.dtype is torch.float64 else torch.float32
    product = alpha * (batch1.to(wide) @ batch2.to(wide)).sum(0)
    return (beta * self.to(wide) + product if beta else product).to(self.dtype)


def _constant_pad(
    self: Tensor, pad: Sequence[int], value: float = 0
) -> Tensor | NotImplementedType:
    """Torchair's converter makes a constant of the value's own type; GE cuts nothing off."""
    if any(width < 0 for width in pad):
        for place, width in enumerate(pad):
            if width < 0:
                dim = self.dim() - 1 - place // 2
                first = -width if place % 2 == 0 else 0
                self = self.narrow(dim, first, self.shape[dim] + width)
        return aten.constant_pad_nd.default(self, [max(0, width) for width in pad], value)
    if self.dtype is torch.bool:
        return aten.constant_pad_nd.default(self.to(torch.int32), pad, int(value)) != 0
    kind = float if self.is_floating_point() else int
    if type(value) is kind:
        return NotImplemented
    return aten.constant_pad_nd.default(self, pad, kind(value))


def _avg_pool2d(
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor | NotImplementedType:
    """Torchair's converter never counts pads of float16 and int8."""
    if self.dtype is not torch.float16 or not count_include_pad or not any(padding):
        return NotImplemented
    rest = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return aten.avg_pool2d.default(self.float(), *rest).to(self.dtype)


def _softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor | NotImplementedType:
    """Torchair's converter widens float16 only."""
    return torch.softmax(self.float(), dim) if half_to_float else NotImplemented


def _log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor | NotImplementedType:
    return torch.log_softmax(self.float(), dim) if half_to_float else NotImplemented


def _squeeze_dim(self: Tensor, dim: int) -> Tensor | NotImplementedType:
    return NotImplemented if self.dim() else aten.alias.default(self)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | NotImplementedType:
    """ATen leaves out tensors of shape `[0]`, whatever the shape of the others."""
    whole = [x for x in tensors if x.dim() != 1 or x.shape[0] != 0]
    if len(whole) == len(tensors) or not whole or whole[0].dim() == 1:
        return NotImplemented
    return torch.cat(whole, dim)


def _clone(
    self: Tensor, *, memory_format: torch.memory_format | None = None
) -> Tensor | NotImplementedType:
    if memory_format in (None, torch.contiguous_format):
        return NotImplemented
    return aten.clone.default(self)


def _to_copy(
    self: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor | NotImplementedType:
    if memory_format in (None, torch.contiguous_format):
        return NotImplemented
    return aten._to_copy.default(self, dtype=dtype, layout=layout, device=device)


def _view(self: Tensor, size: Sequence[int]) -> Tensor:
    """A reshape that torchair converts as one.

    It joins views and permutes into one op, and reads which from strides. It starts from contiguous
    ones, for which a view of a permuted tensor that is none is a copy, and then loses the permute.
    """
    return aten._unsafe_view.default(self, size)


def _empty_strided(
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """`empty_strided`, and `empty_permuted`, whose second argument is an order of dims."""
    return torch.empty(size, dtype=dtype, device=device)


def _new_empty_strided(
    self: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    return torch.empty(size, dtype=dtype or self.dtype, device=device or self.device)


_FLOATS = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "erfinv", "exp"),
    *("expm1", "log", "log10", "log1p", "log2", "reciprocal", "rsqrt", "sigmoid", "sin", "sinh"),
    *("sqrt", "tan", "tanh"),
)
"""Functions of floats."""

_NUMBERS = (
    aten.add.Tensor,
    *(aten.maximum.default, aten.minimum.default),
    *(aten.ge.Tensor, aten.gt.Tensor, aten.le.Tensor, aten.lt.Tensor),
    *(aten.ge.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.lt.Scalar),
    *(aten.eq.Tensor, aten.ne.Tensor, aten.eq.Scalar, aten.ne.Scalar),
)
"""Functions of two numbers, which have a meaning for truth values too."""

DTYPES: Mapping[OpOverload, _Decomposition] = MappingProxyType(
    {
        **{
            getattr(aten, name).default: _of_floats(getattr(aten, name).default) for name in _FLOATS
        },
        **{op: _of_numbers(op) for op in _NUMBERS},
        aten.ceil.default: _rounded,
        aten.floor.default: _rounded,
        aten.round.default: _rounded,
        aten.sign.default: _sign,
        aten.sgn.default: _sign,
        aten.isinf.default: _isinf,
        aten.max.default: _max,
        aten.max.dim: _max_dim,
        aten.min.default: _min,
        aten.min.dim: _min_dim,
        aten.amax.default: _extremum(aten.amax.default),
        aten.amin.default: _extremum(aten.amin.default),
        aten.prod.default: _prod,
        aten.prod.dim_int: _prod_dim,
        aten.sort.default: _sort,
        aten.sort.stable: _sort_stable,
        aten.mm.default: _mm,
        aten.bmm.default: _mm,
        aten.addmm.default: _addmm,
        aten.addbmm.default: _addbmm,
        aten.constant_pad_nd.default: _constant_pad,
        aten.avg_pool2d.default: _avg_pool2d,
        aten._softmax.default: _softmax,
        aten._log_softmax.default: _log_softmax,
        aten.squeeze.dim: _squeeze_dim,
        aten.cat.default: _cat,
        aten.clone.default: _clone,
        aten._to_copy.default: _to_copy,
        aten.view.default: _view,
        aten.empty_strided.default: _empty_strided,
        aten.empty_permuted.default: _empty_strided,
        aten.new_empty_strided.default: _new_empty_strided,
    }
)
"""Op -> its decomposition, which returns NotImplemented for operands that it leaves alone."""
