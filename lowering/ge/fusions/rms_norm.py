"""RMS norm, alone and after a residual addition.

    x / sqrt(mean(x^2) + eps) * weight    ->  npu_rms_norm
    the same of x = a + b                 ->  npu_add_rms_norm, which gives the sum as well

in fp32 between a cast of x and a cast back; the weight is multiplied before or after that cast. The
fused ops multiply in fp32 and round once.

Limits are those of `torch_npu.npu_rms_norm`'s documentation: fp16, bf16 or fp32, the weight of the
same dtype, 2 to 8 dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.lowering.ge.fusions.base import (
    Emitter,
    Found,
    Fusion,
    Setting,
    argument,
    cast_source,
    dtype_of,
    factors,
    is_call,
    number,
    same_shape,
    shape_of,
)
from rolemesh.lowering.npu.define import define_npu_ops

__all__ = ["add_rms_norm", "rms_norm"]

aten = torch.ops.aten

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ENDS = frozenset({aten.mul.Tensor, aten._to_copy.default})


def rms_norm() -> Fusion:
    """The fusion without an addition."""
    define_npu_ops()
    return Fusion(torch.ops.npu.npu_rms_norm.default, _ENDS, _find_norm)


def add_rms_norm() -> Fusion:
    """The fusion with an addition; it goes before the one without."""
    define_npu_ops()
    return Fusion(torch.ops.npu.npu_add_rms_norm.default, _ENDS, _find_add_norm)


class _Norm(NamedTuple):
    """A norm: `end` is `x` normalised by `epsilon`, times `gamma`."""

    end: fx.Node
    x: fx.Node
    gamma: fx.Node
    epsilon: float
    inner: tuple[fx.Node, ...]


def _find_norm(end: fx.Node, setting: Setting) -> Found | None:
    norm = _norm(end)
    if norm is None:
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        op = torch.ops.npu.npu_rms_norm.default
        return [new.part(new(op, norm.x, norm.gamma, norm.epsilon), 0)]

    return Found((end,), norm.inner, emit)


def _find_add_norm(end: fx.Node, setting: Setting) -> Found | None:
    norm = _norm(end)
    if norm is None or not is_call(norm.x, aten.add.Tensor) or argument(norm.x, "alpha") != 1:
        return None
    left, right = norm.x.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    alike = all(
        dtype_of(x) == dtype_of(norm.x) and same_shape(shape_of(x), shape_of(norm.x))
        for x in (left, right)
    )
    if not alike or not norm.gamma < norm.x:
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        op = torch.ops.npu.npu_add_rms_norm.default
        made = new(op, left, right, norm.gamma, norm.epsilon)
        return [new.part(made, 2), new.part(made, 0)]

    return Found((norm.x, end), norm.inner, emit)


def _norm(end: fx.Node) -> _Norm | None:
    product, cast_after = end, cast_source(end)
    if cast_after is not None:
        product = cast_after
    normed, gamma = next((pair for pair in factors(product) if _is_normed(pair[0])), (None, None))
    if normed is None or gamma is None:
        return None
    cast_before = cast_source(normed)
    if cast_before is not None and (cast_after is not None or dtype_of(normed) != dtype_of(end)):
        return None
    scaled = cast_before or normed
    found = next((found for pair in factors(scaled) if (found := _mean_square(*pair))), None)
    if found is None:
        return None
    wide, epsilon, steps = found
    x = wide
    if dtype_of(wide) != dtype_of(end):
        source = cast_source(wide)
        if source is None:
            return None
        x = source
    shape = shape_of(x)
    fits = (
        dtype_of(x) == dtype_of(gamma) == dtype_of(end)
        and dtype_of(wide) == torch.float32
        and dtype_of(end) in _DTYPES
        and 2 <= len(shape) <= 8
        and same_shape(shape_of(gamma), shape[-1:])
    )
    inner = {product, normed, scaled, *steps} - {end}
    return _Norm(end, x, gamma, epsilon, tuple(inner)) if fits else None


def _is_normed(value: fx.Node) -> bool:
    """Whether a value is a product with a reciprocal root, cast or not."""
    source = cast_source(value) or value
    return any(is_call(root, aten.rsqrt.default) for root, _ in factors(source))


def _mean_square(root: fx.Node, x: fx.Node) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """If `root` is `rsqrt(mean(x^2) + epsilon)`: x, epsilon, and the nodes on the way."""
    if not is_call(root, aten.rsqrt.default):
        return None
    shifted = root.args[0]
    if not is_call(shifted, aten.add.Tensor, aten.add.Scalar):
        return None
    assert isinstance(shifted, fx.Node)
    mean, epsilon = shifted.args[0], number(shifted.args[1])
    if epsilon is None or argument(shifted, "alpha") != 1 or not is_call(mean, aten.mean.dim):
        return None
    assert isinstance(mean, fx.Node)
    square, dims = mean.args[0], mean.args[1]
    keeps = argument(mean, "keepdim") is True and argument(mean, "dtype") is None
    last = len(shape_of(x)) - 1
    if not keeps or not isinstance(dims, list | tuple) or list(dims) not in ([-1], [last]):
        return None
    assert isinstance(square, fx.Node)
    powers = is_call(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)
    multiplies = is_call(square, aten.mul.Tensor) and square.args == (x, x)
    return (x, epsilon, [root, shifted, mean, square]) if powers or multiplies else None
