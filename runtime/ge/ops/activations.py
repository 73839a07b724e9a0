"""Activation functions: elementwise ops of one tensor with a formula of their own.

Formulas are computed in float32 where the operand has 16 bits, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rolemesh.runtime.ge.ops.checks import FLOATS, INTEGERS, demand, normal_axis, wide
from rolemesh.runtime.ge.ops.table import Attributes, Function, OpTable

__all__ = ["OPS"]

OPS = OpTable()


def _softsign(x: Tensor) -> Tensor:
    return (wide(x) / (1 + wide(x).abs())).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gelu_fast(x: Tensor) -> Tensor:
    return (wide(x) * torch.sigmoid(1.702 * wide(x))).to(x.dtype)


def _mish(x: Tensor) -> Tensor:
    return functional.mish(wide(x)).to(x.dtype)


FORMULAS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "FastGelu": _gelu_fast,
    "Gelu": _gelu_tanh,
    "HardSwish": functional.hardswish,
    "LogSigmoid": functional.logsigmoid,
    "Mish": _mish,
    "Relu6": functional.relu6,
    "Selu": functional.selu,
    "Sigmoid": torch.sigmoid,
    "Softplus": functional.softplus,
    "Softsign": _softsign,
}
"""Ops of a floating-point input x and no attributes. Gelu is the tanh approximation; only GeluV2
has the exact form."""


def _apply(formula: Callable[[Tensor], Tensor]) -> Function:
    def function(a: Attributes, x: Tensor) -> Tensor:
        demand(a, FLOATS, x)
        return formula(x)

    return function


for _type, _formula in FORMULAS.items():
    OPS.op(_type)(_apply(_formula))


@OPS.op("Relu")
def relu(a: Attributes, x: Tensor) -> Tensor:
    demand(a, FLOATS | INTEGERS, x)
    return torch.relu(x)


@OPS.op("GeluV2")
def gelu_v2(a: Attributes, x: Tensor) -> Tensor:
    """Exact for approximate=none, else the tanh approximation."""
    demand(a, FLOATS, x)
    approximate = a.str("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{a.where}: no semantics for approximate={approximate!r}")
    return functional.gelu(wide(x), approximate=approximate).to(x.dtype)


@OPS.op("Swish")
def swish(a: Attributes, x: Tensor) -> Tensor:
    """`x * sigmoid(scale * x)`."""
    demand(a, FLOATS, x)
    scale = a.float("scale", 1.0)
    if scale == 1:
        return functional.silu(x)
    return (wide(x) * torch.sigmoid(scale * wide(x))).to(x.dtype)


@OPS.op("Elu")
def elu(a: Attributes, x: Tensor) -> Tensor:
    """`scale * x` above 0, `scale * alpha * (exp(input_scale * x) - 1)` below."""
    demand(a, FLOATS, x)
    alpha, scale, input_scale = (a.float(key, 1.0) for key in ("alpha", "scale", "input_scale"))
    inner = wide(x)
    below = alpha * torch.expm1(input_scale * inner)
    return (scale * torch.where(inner > 0, inner, below)).to(x.dtype)


@OPS.op("CeluV2")
def celu_v2(a: Attributes, x: Tensor) -> Tensor:
    """`x` above 0, `alpha * (exp(x / alpha) - 1)` below."""
    demand(a, FLOATS, x)
    return functional.celu(wide(x), alpha=a.float("alpha", 1.0)).to(x.dtype)


@OPS.op("SoftplusV2")
def softplus_v2(a: Attributes, x: Tensor) -> Tensor:
    """log(1 + exp(beta * x)) / beta, and x itself where beta * x exceeds the threshold."""
    demand(a, FLOATS, x)
    beta, threshold = a.float("beta", 1.0), a.float("threshold", 20.0)
    return functional.softplus(wide(x), beta=beta, threshold=threshold).to(x.dtype)


@OPS.op("HardSigmoid")
def hard_sigmoid(a: Attributes, input_x: Tensor) -> Tensor:
    """`alpha * x + beta`, held within 0 and 1."""
    demand(a, FLOATS, input_x)
    line = a.float("alpha", 0.16666666) * wide(input_x) + a.float("beta", 0.5)
    return line.clamp(0, 1).to(input_x.dtype)


@OPS.op("LeakyRelu")
def leaky_relu(a: Attributes, x: Tensor) -> Tensor:
    demand(a, FLOATS, x)
    return functional.leaky_relu(x, a.float("negative_slope", 0.0))


@OPS.op("PRelu", equal=("x", "weight"))
def p_relu(a: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    """`x` above 0, `weight * x` below; a weight of one dim has one element or one per channel."""
    demand(a, FLOATS, x)
    if weight.dim() == 1 and weight.numel() > 1 and x.dim() > 1:
        weight = weight.reshape(-1, *[1] * (x.dim() - 2))
    return torch.where(x > 0, x, weight * x)


@OPS.op("HardShrink")
def hard_shrink(a: Attributes, input_x: Tensor) -> Tensor:
    """0 within lambd of 0."""
    demand(a, FLOATS, input_x)
    return functional.hardshrink(input_x, a.float("lambd", 0.5))


@OPS.op("SoftShrink")
def soft_shrink(a: Attributes, input_x: Tensor) -> Tensor:
    """Closer to 0 by lambd, and 0 within lambd of it."""
    demand(a, FLOATS, input_x)
    return functional.softshrink(input_x, a.float("lambd", 0.5))


@OPS.op("ThresholdV2", equal=("x", "threshold", "value"))
def threshold_v2(
    a: Attributes, x: Tensor, threshold: Tensor, value: Tensor | None = None
) -> Tensor:
    """`x` above the threshold, elsewhere the value, which is 0 if unfed."""
    demand(a, FLOATS | INTEGERS, x)
    return torch.where(x > threshold, x, torch.zeros_like(threshold) if value is None else value)


@OPS.op("GLU")
def glu(a: Attributes, x: Tensor) -> Tensor:
    """The first half along a dim times the sigmoid of the second."""
    demand(a, FLOATS, x)
    axis = normal_axis(a, a.int("dim", -1), x.dim())
    left, right = wide(x).chunk(2, axis)
    if left.shape != right.shape:
        raise ValueError(f"{a.where}: dim {axis} of {x.shape[axis]} elements has no halves")
    return (left * torch.sigmoid(right)).to(x.dtype)
