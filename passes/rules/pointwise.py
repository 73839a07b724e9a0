"""Rules of elementwise ops: every dim passes, a broadcast dim of an operand has no factor.

The table says which partial operands each op is linear in. A pattern has one entry for each tensor
operand, so `add(x, 2.0)`, which is not linear, never meets the pattern of `add(x, y)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.registry import LocalCall, LocalForm, LocalFunction, RuleFunction

__all__ = ["LOCAL", "RULES", "broadcast_rule"]

_INDEX = (torch.int64, torch.int32)

Patterns = tuple[tuple[bool, ...], ...]

# An op of a partial and a whole value may use the partial one once. Never (True, False) for sums:
# every rank would add the whole value.
_SCALED: Patterns = ((True,),)
_SUM: Patterns = ((True, True),)
_PRODUCT: Patterns = ((True,), (True, False), (False, True))
_QUOTIENT: Patterns = ((True,), (True, False))
_GRADIENT: Patterns = ((True, False),)

LINEAR: Mapping[str, Patterns] = {
    "aten::neg": _SCALED,
    "aten::positive": _SCALED,
    "aten::add.Tensor": _SUM,
    "aten::sub.Tensor": _SUM,
    "aten::rsub.Tensor": _SUM,
    "aten::mul": _PRODUCT,
    "aten::div.Tensor": _QUOTIENT,
    "aten::div.Scalar": _SCALED,
    "aten::addcmul": ((True, True, False), (True, False, True)),
    "aten::addcdiv": ((True, True, False),),
    "aten::lerp.Scalar": _SUM,
    "aten::lerp.Tensor": ((True, True, False),),
    # The gradient comes first; the others are what the forward pass saved.
    "aten::elu_backward": _GRADIENT,
    "aten::gelu_backward": _GRADIENT,
    "aten::hardshrink_backward": _GRADIENT,
    "aten::hardsigmoid_backward": _GRADIENT,
    "aten::hardswish_backward": _GRADIENT,
    "aten::hardtanh_backward": _GRADIENT,
    "aten::leaky_relu_backward": _GRADIENT,
    "aten::log_sigmoid_backward": ((True, False, False),),
    "aten::logit_backward": _GRADIENT,
    "aten::mish_backward": _GRADIENT,
    "aten::native_dropout_backward": _GRADIENT,
    "aten::sigmoid_backward": _GRADIENT,
    "aten::silu_backward": _GRADIENT,
    "aten::softplus_backward": _GRADIENT,
    "aten::softshrink_backward": _GRADIENT,
    "aten::tanh_backward": _GRADIENT,
    "aten::threshold_backward": _GRADIENT,
}

# fmt: off
NONLINEAR = (
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "ceil", "celu", "cos",
    "cosh", "elu", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "frac", "gelu",
    "hardsigmoid", "hardswish", "hardtanh", "isinf", "isnan", "isneginf", "isposinf",
    "leaky_relu", "lgamma", "log", "log10", "log1p", "log2", "log_sigmoid_forward", "logit",
    "mish", "nan_to_num", "reciprocal", "relu", "relu6", "round", "rsqrt", "selu", "sigmoid",
    "sign", "silu", "sin", "sinh", "softplus", "sqrt", "square", "tan", "tanh", "threshold",
    "trunc", "add.Scalar", "clamp", "clamp_max", "clamp_min", "div.Scalar_mode",
    "div.Tensor_mode", "floor_divide", "fmax", "fmin", "fmod", "heaviside", "hypot", "logaddexp",
    "logaddexp2", "maximum", "minimum", "max.other", "min.other", "polar", "pow", "remainder",
    "rsub.Scalar", "sub.Scalar", "xlogy", "bitwise_and", "bitwise_left_shift", "bitwise_not",
    "bitwise_or", "bitwise_right_shift", "bitwise_xor", "eq", "ge", "gt", "le", "lt", "ne",
    "logical_and", "logical_not", "logical_or", "logical_xor", "fill.Tensor", "masked_fill",
    "where.self", "where.Scalar", "where.ScalarOther", "where.ScalarSelf",
)
# fmt: on


def broadcast_rule(call: OpCall, linear: Patterns = ()) -> Rule:
    """Dims aligned at the right; results have the shape of all operands broadcast together."""
    builder = RuleBuilder()
    shape = call.results[0].shape
    result = builder.dims(shape)
    ndim = len(shape)
    operands = []
    for value in call.operands:
        own = value.shape
        if own == shape:
            operands.append(result)
        else:
            offset = ndim - len(own)
            operands.append(
                [result[dim] if size == shape[dim] else () for dim, size in enumerate(own, offset)]
            )
    count = len(operands)
    return builder.build(
        operands,
        [result] * len(call.results),
        linear=[pattern for pattern in linear if len(pattern) == count],
    )


def _linear_in(patterns: Patterns) -> RuleFunction:
    return lambda call: broadcast_rule(call, patterns)


def to_copy(call: OpCall) -> Rule:
    """`_to_copy(x)`: rounding to another float type is taken as linear, to integers it is not.

    A float cast to an index type stays whole: pads of floats are arbitrary, those of indices not.
    """
    source, target = call.operands[0].dtype, call.results[0].dtype
    if not source.is_floating_point:
        return broadcast_rule(call)
    if target in _INDEX:
        builder = RuleBuilder()
        dims = builder.dims(call.results[0].shape, Kind.REPLICATE)
        return builder.build([dims], [dims])
    return broadcast_rule(call, _SCALED if target.is_floating_point else ())


def copy(call: OpCall) -> Rule:
    """`copy(dst, src)`: the result is `src` with the shape and type of `dst`.

    `dst` is not read, unless `src` must be both broadcast and cast, which no single op does.
    """
    dst, src = call.operands
    if dst.shape != src.shape and dst.dtype != src.dtype:
        return broadcast_rule(call)
    builder = RuleBuilder()
    result = builder.dims(dst.shape)
    aligned = result[dst.ndim - src.ndim :]
    extents = dst.shape[dst.ndim - src.ndim :]
    source = [
        factors if size == extent else ()
        for factors, size, extent in zip(aligned, src.shape, extents, strict=True)
    ]
    floats = dst.dtype.is_floating_point and src.dtype.is_floating_point
    linear = ((False, True),) if floats or dst.dtype == src.dtype else ()
    return builder.build([[()] * dst.ndim, source], [result], linear=linear, unread=(0,))


def copy_local(local: LocalCall) -> LocalForm:
    """The source alone makes the result."""
    if not local.rule.unread:
        return local.call.target, local.args, local.kwargs
    dst, src = local.call.operands
    if dst.dtype != src.dtype:
        return torch.ops.aten._to_copy.default, (local.args[1],), {"dtype": dst.dtype}
    if dst.shape != src.shape:
        return torch.ops.aten.expand.default, (local.args[1], list(local.result_shape())), {}
    return torch.ops.aten.clone.default, (local.args[1],), {}


RULES: dict[str, RuleFunction] = {
    **{f"aten::{name}": broadcast_rule for name in NONLINEAR},
    **{name: _linear_in(patterns) for name, patterns in LINEAR.items()},
    "aten::_to_copy": to_copy,
    "aten::copy": copy,
}

LOCAL: dict[str, LocalFunction] = {"aten::copy": copy_local}
