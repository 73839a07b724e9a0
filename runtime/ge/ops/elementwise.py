"""Ops that compute each element of the result from the elements at the same place.

Operands broadcast as in numpy. Their dtypes must be equal: GE promotes nothing. The result has
the dtype of the operands, but for comparisons, whose result is bool.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import (
    ANY,
    BOOL,
    COMPLEX,
    FLOATS,
    INTEGERS,
    NUMBERS,
    demand,
    wide,
)
from rolemesh.runtime.ge.ops.table import Attributes, Function, OpTable

__all__ = ["OPS"]

OPS = OpTable()

_Unary = Callable[[Tensor], Tensor]
_Binary = Callable[[Tensor, Tensor], Tensor]
_Kinds = frozenset[torch.dtype]


def _truncating(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.div(x1, x2, rounding_mode="trunc")


def _flooring(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.div(x1, x2, rounding_mode="floor")


def _dividing(x1: Tensor, x2: Tensor) -> Tensor:
    """Div of integers drops the fraction."""
    return _truncating(x1, x2) if x1.dtype in INTEGERS else x1 / x2


def _dividing_but_by_zero(x1: Tensor, x2: Tensor) -> Tensor:
    zero = x2 == 0
    return _dividing(x1, x2.masked_fill(zero, 1)).masked_fill(zero, 0)


def _squared_difference(x1: Tensor, x2: Tensor) -> Tensor:
    return (wide(x1) - wide(x2)).square().to(x1.dtype)


def _x_log_y(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.xlogy(x1, x2)


UNARY: Mapping[str, tuple[_Unary, _Kinds]] = {
    "Abs": (torch.abs, FLOATS | INTEGERS),
    "Acos": (torch.acos, FLOATS | COMPLEX),
    "Acosh": (torch.acosh, FLOATS | COMPLEX),
    "Asin": (torch.asin, FLOATS | COMPLEX),
    "Asinh": (torch.asinh, FLOATS | COMPLEX),
    "Atan": (torch.atan, FLOATS | COMPLEX),
    "Atanh": (torch.atanh, FLOATS | COMPLEX),
    "Ceil": (torch.ceil, FLOATS),
    "Cos": (torch.cos, FLOATS | COMPLEX),
    "Cosh": (torch.cosh, FLOATS | COMPLEX),
    "Erf": (torch.erf, FLOATS),
    "Erfc": (torch.erfc, FLOATS),
    "Expm1": (torch.expm1, FLOATS | COMPLEX),
    "Floor": (torch.floor, FLOATS),
    "Invert": (torch.bitwise_not, INTEGERS),
    "Log1p": (torch.log1p, FLOATS | COMPLEX),
    "LogicalNot": (torch.logical_not, BOOL),
    "Neg": (torch.neg, NUMBERS),
    "Reciprocal": (torch.reciprocal, FLOATS | COMPLEX),
    "Rint": (torch.round, FLOATS),
    "Round": (torch.round, FLOATS | INTEGERS),
    "Rsqrt": (torch.rsqrt, FLOATS | COMPLEX),
    "Sign": (torch.sgn, NUMBERS),
    "Sin": (torch.sin, FLOATS | COMPLEX),
    "Sinh": (torch.sinh, FLOATS | COMPLEX),
    "Sqrt": (torch.sqrt, FLOATS | COMPLEX),
    "Square": (torch.square, NUMBERS),
    "Tan": (torch.tan, FLOATS | COMPLEX),
    "Tanh": (torch.tanh, FLOATS | COMPLEX),
}
"""Ops of an input x, with the dtypes that they take. Round and Rint round half to even."""

TESTS: Mapping[str, tuple[_Unary, _Kinds]] = {
    "IsFinite": (torch.isfinite, FLOATS),
    "IsInf": (torch.isinf, FLOATS),
    "IsNan": (torch.isnan, FLOATS),
}
"""Ops of an input x whose result is bool."""

BINARY: Mapping[str, tuple[_Binary, _Kinds]] = {
    "Add": (torch.add, NUMBERS),
    "AddV2": (torch.add, NUMBERS),
    "Atan2": (torch.atan2, FLOATS),
    "BitwiseAnd": (torch.bitwise_and, INTEGERS),
    "BitwiseOr": (torch.bitwise_or, INTEGERS),
    "BitwiseXor": (torch.bitwise_xor, INTEGERS),
    "Div": (_dividing, NUMBERS),
    "DivNoNan": (_dividing_but_by_zero, NUMBERS),
    "FloorDiv": (_flooring, FLOATS | INTEGERS),
    "FloorMod": (torch.remainder, FLOATS | INTEGERS),
    "LogicalAnd": (torch.logical_and, BOOL),
    "LogicalOr": (torch.logical_or, BOOL),
    "Maximum": (torch.maximum, FLOATS | INTEGERS),
    "Minimum": (torch.minimum, FLOATS | INTEGERS),
    "Mod": (torch.fmod, FLOATS | INTEGERS),
    "Mul": (torch.mul, ANY),
    "Pow": (torch.pow, NUMBERS),
    "RealDiv": (torch.true_divide, FLOATS | COMPLEX),
    "SquaredDifference": (_squared_difference, FLOATS | INTEGERS),
    "Sub": (torch.sub, NUMBERS),
    "TruncateDiv": (_truncating, FLOATS | INTEGERS),
    "TruncateMod": (torch.fmod, FLOATS | INTEGERS),
    "Xlogy": (_x_log_y, FLOATS),
}
"""Ops of inputs x1 and x2, with the dtypes that they take; Mul of bools is their conjunction.

Div and the two truncating ops round towards zero, so that Mod and TruncateMod have the sign of x1;
FloorDiv rounds down, so that FloorMod has the sign of x2. RealDiv has no integer form: what its
kernels do there is not documented.
"""

COMPARISONS: Mapping[str, tuple[_Binary, _Kinds]] = {
    "Equal": (torch.eq, ANY),
    "Greater": (torch.gt, FLOATS | INTEGERS),
    "GreaterEqual": (torch.ge, FLOATS | INTEGERS),
    "Less": (torch.lt, FLOATS | INTEGERS),
    "LessEqual": (torch.le, FLOATS | INTEGERS),
    "NotEqual": (torch.ne, ANY),
}
"""Ops of inputs x1 and x2 whose result is bool."""


def _unary(compute: _Unary, kinds: _Kinds) -> Function:
    def function(a: Attributes, x: Tensor) -> Tensor:
        demand(a, kinds, x)
        return compute(x)

    return function


def _binary(compute: _Binary, kinds: _Kinds) -> Function:
    def function(a: Attributes, x1: Tensor, x2: Tensor) -> Tensor:
        demand(a, kinds, x1)
        return compute(x1, x2)

    return function


for _type, (_compute_one, _of) in {**UNARY, **TESTS}.items():
    OPS.op(_type)(_unary(_compute_one, _of))
for _type, (_compute_two, _of) in {**BINARY, **COMPARISONS}.items():
    OPS.op(_type, equal=("x1", "x2"))(_binary(_compute_two, _of))


@OPS.op("Trunc")
def trunc(a: Attributes, input_x: Tensor) -> Tensor:
    demand(a, FLOATS | INTEGERS, input_x)
    return torch.trunc(input_x)


@OPS.op("Erfinv")
def erfinv(a: Attributes, input_x: Tensor) -> Tensor:
    demand(a, FLOATS, input_x)
    return torch.erfinv(input_x)


@OPS.op("Exp")
def exp(a: Attributes, x: Tensor) -> Tensor:
    """`base ** (scale * x + shift)`; a base of -1 stands for e."""
    demand(a, FLOATS | COMPLEX, x)
    base, scale, shift = a.float("base", -1.0), a.float("scale", 1.0), a.float("shift", 0.0)
    if (base, scale, shift) == (-1.0, 1.0, 0.0):
        return torch.exp(x)
    factor = 1.0 if base == -1.0 else math.log(base)
    return torch.exp((wide(x) * scale + shift) * factor).to(x.dtype)


@OPS.op("Log")
def log(a: Attributes, x: Tensor) -> Tensor:
    """The logarithm of scale * x + shift to a base; a base of -1 stands for e."""
    demand(a, FLOATS | COMPLEX, x)
    base, scale, shift = a.float("base", -1.0), a.float("scale", 1.0), a.float("shift", 0.0)
    known = {-1.0: torch.log, 2.0: torch.log2, 10.0: torch.log10}
    if base in known and (scale, shift) == (1.0, 0.0):
        return known[base](x)
    result = torch.log(wide(x) * scale + shift)
    return (result if base == -1.0 else result / math.log(base)).to(x.dtype)


@OPS.op("LeftShift", equal=("x", "y"))
def left_shift(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    demand(a, INTEGERS, x)
    return torch.bitwise_left_shift(x, y)


@OPS.op("RightShift", equal=("x", "y"))
def right_shift(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    demand(a, INTEGERS, x)
    return torch.bitwise_right_shift(x, y)


@OPS.op("Muls")
def muls(a: Attributes, x: Tensor) -> Tensor:
    demand(a, NUMBERS, x)
    return (x * a.float("value")).to(x.dtype)


@OPS.op("Adds")
def adds(a: Attributes, x: Tensor) -> Tensor:
    demand(a, NUMBERS, x)
    return (x + a.float("value")).to(x.dtype)


@OPS.op("AddN", dynamic=("x",), equal=("x",))
def add_n(a: Attributes, x: Sequence[Tensor]) -> Tensor:
    """The sum of N tensors of one shape."""
    if len(x) != a.int("N") or len({tensor.shape for tensor in x}) != 1:
        raise ValueError(f"{a.where}: not N={a.int('N')} tensors of one shape")
    demand(a, NUMBERS, *x)
    total = wide(x[0])
    for tensor in x[1:]:
        total = total + tensor
    return total.to(x[0].dtype, copy=True)


@OPS.op("Axpy", equal=("x1", "x2"))
def axpy(a: Attributes, x1: Tensor, x2: Tensor) -> Tensor:
    """`x1 + alpha * x2`."""
    demand(a, NUMBERS, x1)
    return (wide(x1) + wide(x2) * a.float("alpha")).to(x1.dtype)


@OPS.op("AxpyV2", equal=("x1", "x2", "alpha"))
def axpy_v2(a: Attributes, x1: Tensor, x2: Tensor, alpha: Tensor) -> Tensor:
    """`x1 + alpha * x2`."""
    demand(a, NUMBERS, x1)
    return (wide(x1) + wide(x2) * wide(alpha)).to(x1.dtype)


@OPS.op("Sxpy", equal=("x1", "x2", "alpha"))
def sxpy(a: Attributes, x1: Tensor, x2: Tensor, alpha: Tensor | None = None) -> Tensor:
    """`x1 - alpha * x2`; alpha is 1 if unfed."""
    demand(a, NUMBERS, x1)
    return (wide(x1) - (wide(x2) if alpha is None else wide(x2) * wide(alpha))).to(x1.dtype)


@OPS.op("Addcmul", equal=("input_data", "x1", "x2", "value"))
def addcmul(a: Attributes, input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Tensor:
    """`input_data + value * x1 * x2`."""
    demand(a, NUMBERS, input_data)
    return (wide(input_data) + wide(value) * wide(x1) * wide(x2)).to(input_data.dtype)


@OPS.op("Addcdiv", equal=("input_data", "x1", "x2", "value"))
def addcdiv(a: Attributes, input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Tensor:
    """`input_data + value * x1 / x2`."""
    demand(a, FLOATS, input_data)
    return (wide(input_data) + wide(value) * wide(x1) / wide(x2)).to(input_data.dtype)


@OPS.op("Lerp", equal=("start", "end", "weight"))
def lerp(a: Attributes, start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """`start + weight * (end - start)`."""
    demand(a, FLOATS, start)
    return torch.lerp(start, end, weight)


@OPS.op("ClipByValue", "ClipByValueV2", equal=("x", "clip_value_min", "clip_value_max"))
def clip_by_value(
    a: Attributes, x: Tensor, clip_value_min: Tensor, clip_value_max: Tensor
) -> Tensor:
    """The upper bound wins where the bounds cross."""
    demand(a, FLOATS | INTEGERS, x)
    return torch.minimum(torch.maximum(x, clip_value_min), clip_value_max)


@OPS.op("NanToNum")
def nan_to_num(a: Attributes, x: Tensor) -> Tensor:
    demand(a, FLOATS, x)
    return torch.nan_to_num(x, a.float("nan"), a.float("posinf"), a.float("neginf"))


@OPS.op("MaskedFill", equal=("x", "value"))
def masked_fill(a: Attributes, x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """One value where the mask, which broadcasts with x, is set."""
    demand(a, BOOL, mask)
    if value.numel() != 1:
        raise ValueError(f"{a.where}: the value has {value.numel()} elements")
    return torch.where(mask, value.reshape(()), x)


@OPS.op("Select", equal=("x1", "x2"))
def select(a: Attributes, condition: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """x1 where the condition holds, else x2; both have one shape.

    A condition with one dim picks along dim 0.
    """
    demand(a, BOOL, condition)
    if x1.shape != x2.shape:
        raise ValueError(f"{a.where}: shapes {list(x1.shape)} and {list(x2.shape)} differ")
    if condition.dim() == 1:
        condition = condition.reshape(-1, *[1] * (x1.dim() - 1))
    elif condition.dim() and condition.shape != x1.shape:
        raise ValueError(f"{a.where}: a condition of shape {list(condition.shape)}")
    return torch.where(condition, x1, x2)


def _select_v2(a: Attributes, condition: Tensor, then: Tensor, otherwise: Tensor) -> Tensor:
    """`then` where the condition holds, else `else`; all three broadcast."""
    demand(a, BOOL, condition)
    return torch.where(condition, then, otherwise)


# The definition's third input is named by a keyword of Python, which only a signature can hold.
_select_v2.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        for name in ("a", "condition", "then", "else")
    ]
)
OPS.op("SelectV2", equal=("then", "else"))(_select_v2)
