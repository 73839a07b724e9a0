"""Decompositions of element-wise ops, reductions, scans and solves, and of torch's prims.

torch's own decompositions end in prims: element-wise ops and reductions whose operands have one
dtype and one shape already. `PRIMS` leads them back to ATen ops that torchair converts.

Invariant: a decomposition computes what the op does for all valid arguments, or returns
NotImplemented; the op then stays in the graph and is refused there.
"""

# ruff: noqa: A002 - arguments are called what the schemas of the ops call them

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, NotImplementedType

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["MATH", "PRIMS"]

aten = torch.ops.aten
prims = torch.ops.prims


def _complex(real: Tensor, imag: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack(torch.broadcast_tensors(real, imag), -1))


def _polar(abs: Tensor, angle: Tensor) -> Tensor:
    return _complex(abs * angle.cos(), abs * angle.sin())


def _assert_async(self: Tensor, assert_msg: str) -> NotImplementedType | None:
    """GE graphs cannot stop on a value, so an assertion is refused, but for those of `one_hot`.

    Its own check that classes are in range is left out: a class out of range gives a row of zeros
    on a device, where the eager op raises.
    """
    return None if assert_msg.startswith("Class values must be ") else NotImplemented


def _solve_triangular(
    self: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor | NotImplementedType:
    """Blockwise substitution: the halves of the system one after the other."""
    if not isinstance(self.shape[-1], int) or 0 in self.shape or 0 in B.shape:
        return NotImplemented
    if not left:
        return _substitute(self.mT, B.mT, not upper, unitriangular).mT
    return _substitute(self, B, upper, unitriangular)


def _substitute(matrix: Tensor, right: Tensor, upper: bool, unit: bool) -> Tensor:
    size = matrix.shape[-1]
    if size == 1:
        whole = torch.broadcast_shapes(matrix.shape[:-2], right.shape[:-2])
        return right.expand([*whole, *right.shape[-2:]]) if unit else right / matrix
    half = size // 2
    parts = [slice(0, half), slice(half, size)]
    first, second = reversed(parts) if upper else parts
    solved = _substitute(matrix[..., first, first], right[..., first, :], upper, unit)
    rest = right[..., second, :] - matrix[..., second, first] @ solved
    others = _substitute(matrix[..., second, second], rest, upper, unit)
    return torch.cat([others, solved] if upper else [solved, others], -2)


_Combine = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def _scan(combine: _Combine, values: list[Tensor], dim: int) -> list[Tensor] | NotImplementedType:
    """Inclusive prefixes along a dim, in logarithmically many steps.

    Source: W. D. Hillis and G. L. Steele, Data Parallel Algorithms, CACM 29 (1986).

    Args:
        combine: An associative function of earlier and later values.
        values: What to combine, tensors of one shape.
        dim: Its size must be a plain number, since it gives the number of steps.
    """
    if values[0].dim() == 0:
        return values
    size = values[0].shape[dim]
    if not isinstance(size, int):
        return NotImplemented
    distance = 1
    while distance < size:
        count = size - distance
        earlier = [value.narrow(dim, 0, count) for value in values]
        later = [value.narrow(dim, distance, count) for value in values]
        values = [
            torch.cat([value.narrow(dim, 0, distance), new], dim)
            for value, new in zip(values, combine(earlier, later), strict=True)
        ]
        distance *= 2
    return values


def _cummax(self: Tensor, dim: int) -> tuple[Tensor, Tensor] | NotImplementedType:
    return _running(self, dim, torch.ge)


def _cummin(self: Tensor, dim: int) -> tuple[Tensor, Tensor] | NotImplementedType:
    return _running(self, dim, torch.le)


def _running(
    self: Tensor, dim: int, replaces: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor] | NotImplementedType:
    """Running extrema and their places: of equal values the last; NaN stays."""

    def combine(earlier: list[Tensor], later: list[Tensor]) -> list[Tensor]:
        taken = replaces(later[0], earlier[0])
        if self.is_floating_point():
            taken = (taken & (earlier[0] == earlier[0])) | (later[0] != later[0])
        return [torch.where(taken, new, old) for old, new in zip(earlier, later, strict=True)]

    places = torch.zeros_like(self, dtype=torch.int64)
    if self.dim():
        shape = [1] * self.dim()
        shape[dim] = self.shape[dim]
        line = torch.arange(self.shape[dim], device=self.device)
        places = line.reshape(shape).expand(self.shape)
    found = _scan(combine, [self, places], dim)
    return found if found is NotImplemented else (found[0], found[1])


def _logcumsumexp(self: Tensor, dim: int) -> Tensor | NotImplementedType:
    if self.is_complex():
        return NotImplemented
    wide = self.float() if self.dtype in (torch.float16, torch.bfloat16) else self
    found = _scan(lambda earlier, later: [torch.logaddexp(earlier[0], later[0])], [wide], dim)
    return found if found is NotImplemented else found[0].to(self.dtype)


MATH: Mapping[OpOverload, Callable[..., object]] = MappingProxyType(
    {
        aten.__lshift__.Scalar: aten.bitwise_left_shift.Tensor_Scalar,
        aten.__lshift__.Tensor: aten.bitwise_left_shift.Tensor,
        aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor_Scalar,
        aten.__rshift__.Tensor: aten.bitwise_right_shift.Tensor,
        aten.complex.default: _complex,
        aten.polar.default: _polar,
        aten._assert_async.msg: _assert_async,
        aten.linalg_solve_triangular.default: _solve_triangular,
        aten.cummax.default: _cummax,
        aten.cummin.default: _cummin,
        aten.logcumsumexp.default: _logcumsumexp,
    }
)
"""ATen op -> its decomposition, which returns NotImplemented for arguments that it leaves alone."""


def _exp2(self: Tensor) -> Tensor:
    return aten.pow.Scalar(2.0, self)


def _signbit(self: Tensor) -> Tensor:
    """The reciprocal of minus zero is below zero."""
    return (self < 0) | (self.reciprocal() < 0) if self.is_floating_point() else self < 0


def _fmax(self: Tensor, other: Tensor) -> Tensor:
    larger = torch.maximum(self, other)
    return torch.where(self != self, other, torch.where(other != other, self, larger))


def _fmin(self: Tensor, other: Tensor) -> Tensor:
    smaller = torch.minimum(self, other)
    return torch.where(self != self, other, torch.where(other != other, self, smaller))


def _bitwise_xor(self: Tensor, other: Tensor) -> Tensor | NotImplementedType:
    return aten.ne.Tensor(self, other) if self.dtype is torch.bool else NotImplemented


def _isfinite(self: Tensor) -> Tensor:
    return (self == self) & (self.abs() != float("inf"))


def _broadcast_in_dim(
    a: Tensor, shape: Sequence[int], broadcast_dimensions: Sequence[int]
) -> Tensor:
    sizes = [1] * len(shape)
    for dim, size in zip(broadcast_dimensions, a.shape, strict=True):
        sizes[dim] = size
    return a.reshape(sizes).expand(shape)


def _squeeze(a: Tensor, dimensions: Sequence[int]) -> Tensor:
    return a.reshape([size for dim, size in enumerate(a.shape) if dim not in dimensions])


def _copy_strided(a: Tensor, stride: Sequence[int]) -> Tensor:
    return a.clone()


def _dims(self: Tensor, dims: Sequence[int] | None) -> list[int]:
    return list(range(self.dim())) if dims is None else list(dims)


def _sum(
    inp: Tensor, dims: Sequence[int] | None, *, output_dtype: torch.dtype | None = None
) -> Tensor:
    return aten.sum.dim_IntList(inp, _dims(inp, dims), dtype=output_dtype)


def _amax(
    inp: Tensor, dims: Sequence[int] | None, *, output_dtype: torch.dtype | None = None
) -> Tensor:
    return inp.amax(_dims(inp, dims))


def _amin(
    inp: Tensor, dims: Sequence[int] | None, *, output_dtype: torch.dtype | None = None
) -> Tensor:
    return inp.amin(_dims(inp, dims))


def _prod(
    inp: Tensor, dims: Sequence[int] | None, *, output_dtype: torch.dtype | None = None
) -> Tensor:
    for dim in sorted(_dims(inp, dims), reverse=True):
        inp = inp.prod(dim, dtype=output_dtype or inp.dtype)
    return inp


def _var(
    inp: Tensor,
    dims: Sequence[int] | None,
    correction: float | None = 1,
    *,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Not below zero, as in torch, is what the sum of squares is divided by."""
    reduced = _dims(inp, dims)
    count = 1
    for dim in reduced:
        count = count * inp.shape[dim]
    rest = count - (1 if correction is None else correction)
    distance = inp - inp.mean(reduced, keepdim=True)
    return (distance * distance).sum(reduced) / max(0, rest)


def _scalar_tensor(
    s: float, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    return aten.scalar_tensor.default(s, dtype=dtype, device=device)


_SAME = (
    *("abs", "add", "bitwise_and", "bitwise_not", "bitwise_or", "ceil", "cos", "div", "eq", "erf"),
    *("exp", "floor", "ge", "gt", "le", "log", "log1p", "log2", "lt", "maximum", "minimum", "mul"),
    *("ne", "neg", "pow", "reciprocal", "remainder", "round", "rsqrt", "sign", "sin", "sqrt"),
    *("sub", "tan", "tanh", "where"),
)
"""Prims that are the ATen op of that name for operands of one shape and dtype."""

_OVERLOADS = ("self", "Tensor_Tensor", "Tensor", "default")
"""Overloads of such an ATen op, of which the first that it has takes tensors only."""


def _aten(name: str) -> OpOverload:
    packet = getattr(aten, name)
    overload = next(overload for overload in _OVERLOADS if overload in packet.overloads())
    found = getattr(packet, overload)
    assert isinstance(found, OpOverload)
    return found


PRIMS: Mapping[OpOverload, Callable[..., object]] = MappingProxyType(
    {
        **{getattr(prims, name).default: _aten(name) for name in _SAME},
        prims.exp2.default: _exp2,
        prims.signbit.default: _signbit,
        prims.fmax.default: _fmax,
        prims.fmin.default: _fmin,
        prims.bitwise_xor.default: _bitwise_xor,
        prims.isfinite.default: _isfinite,
        prims.broadcast_in_dim.default: _broadcast_in_dim,
        prims.squeeze.default: _squeeze,
        prims.copy_strided.default: _copy_strided,
        prims.view_of.default: aten.alias.default,
        prims.scalar_tensor.default: _scalar_tensor,
        prims.sum.default: _sum,
        prims.amax.default: _amax,
        prims.amin.default: _amin,
        prims.prod.default: _prod,
        prims.var.default: _var,
    }
)
"""Prim -> ATen ops that torchair converts."""
