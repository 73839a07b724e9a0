"""Activation functions against their formulas in numpy, in float64."""

from __future__ import annotations

import math

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    I32,
    Case,
    Refusal,
    check,
    check_refused,
    each_dtype,
    each_refusal,
    reals,
    types_of,
)

from rolemesh.runtime.ge.ops.activations import OPS

X = reals(3, 5, low=-4, high=4)
CHANNELS = torch.tensor([0.25, 0.5, -0.75])
N = torch.tensor([[-7, 3, 0], [6, -1, 5]], dtype=I32)

erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softplus(x: np.ndarray, beta: float = 1.0) -> np.ndarray:
    return np.log1p(np.exp(beta * x)) / beta


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + erf(x / math.sqrt(2))) / 2


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def elu(x: np.ndarray, alpha: float = 1.0, scale: float = 1.0, inner: float = 1.0) -> np.ndarray:
    return scale * np.where(x > 0, x, alpha * np.expm1(inner * x))


CASES = [
    Case("FastGelu", {"x": X}, lambda x: x * sigmoid(1.702 * x)),
    Case("Gelu", {"x": X}, gelu_tanh),
    Case("GeluV2", {"x": X}, gelu, loose=3),
    Case("GeluV2", {"x": X}, gelu_tanh, {"approximate": "tanh"}),
    Case("HardSwish", {"x": X}, lambda x: x * np.clip(x + 3, 0, 6) / 6),
    Case("HardSigmoid", {"input_x": X}, lambda x: np.clip(x / 6 + 0.5, 0, 1)),
    Case(
        "HardSigmoid",
        {"input_x": X},
        lambda x: np.clip(0.2 * x + 0.25, 0, 1),
        {"alpha": 0.2, "beta": 0.25},
    ),
    Case("LogSigmoid", {"x": X}, lambda x: -softplus(-x)),
    Case("Mish", {"x": X}, lambda x: x * np.tanh(softplus(x))),
    Case("Relu", {"x": X}, lambda x: np.maximum(x, 0)),
    Case("Relu", {"x": N}, lambda x: np.maximum(x, 0), dtypes=(I32,)),
    Case("Relu6", {"x": 3 * X}, lambda x: np.clip(x, 0, 6)),
    Case("Selu", {"x": X}, lambda x: elu(x, 1.6732632423543772, 1.0507009873554805)),
    Case("Sigmoid", {"x": X}, sigmoid),
    Case("Softplus", {"x": X}, softplus),
    Case("SoftplusV2", {"x": X}, lambda x: softplus(x, 2.0), {"beta": 2.0}),
    Case(
        "SoftplusV2",
        {"x": X},
        lambda x: np.where(x > 1, x, softplus(x)),
        {"beta": 1.0, "threshold": 1.0},
    ),
    Case("Softsign", {"x": X}, lambda x: x / (1 + np.abs(x))),
    Case("Swish", {"x": X}, lambda x: x * sigmoid(x)),
    Case("Swish", {"x": X}, lambda x: x * sigmoid(1.5 * x), {"scale": 1.5}),
    Case("Elu", {"x": X}, elu),
    Case(
        "Elu",
        {"x": X},
        lambda x: elu(x, 0.5, 2.0, 0.25),
        {"alpha": 0.5, "scale": 2.0, "input_scale": 0.25},
    ),
    Case("CeluV2", {"x": X}, lambda x: np.where(x > 0, x, 2 * np.expm1(x / 2)), {"alpha": 2.0}),
    Case("LeakyRelu", {"x": X}, lambda x: np.where(x > 0, x, 0.25 * x), {"negative_slope": 0.25}),
    Case("LeakyRelu", {"x": X}, lambda x: np.maximum(x, 0)),
    Case(
        "PRelu",
        {"x": reals(2, 3, 5), "weight": CHANNELS},
        lambda x, w: np.where(x > 0, x, x * w[None, :, None]),
    ),
    Case("PRelu", {"x": X, "weight": CHANNELS[:1]}, lambda x, w: np.where(x > 0, x, x * w)),
    Case(
        "PRelu",
        {"x": reals(2, 3, 5), "weight": CHANNELS.reshape(1, 3, 1)},
        lambda x, w: np.where(x > 0, x, x * w),
    ),
    Case("HardShrink", {"input_x": X}, lambda x: np.where(np.abs(x) > 0.5, x, 0)),
    Case(
        "SoftShrink",
        {"input_x": X},
        lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.75, 0),
        {"lambd": 0.75},
    ),
    Case(
        "ThresholdV2",
        {"x": X, "threshold": torch.tensor(0.5), "value": torch.tensor(20.0)},
        lambda x, threshold, value: np.where(x > threshold, x, value),
    ),
    Case(
        "ThresholdV2", {"x": X, "threshold": torch.tensor(0.5)}, lambda x, t: np.where(x > t, x, 0)
    ),
    Case("GLU", {"x": reals(3, 6)}, lambda x: x[:, :3] * sigmoid(x[:, 3:])),
    Case("GLU", {"x": reals(4, 3)}, lambda x: x[:2] * sigmoid(x[2:]), {"dim": 0}),
]

REFUSED: list[Refusal] = [
    ("Sigmoid", {"x": N}, {}, "no semantics for operands of torch.int32"),
    ("GeluV2", {"x": X}, {"approximate": "erf"}, "no semantics for approximate='erf'"),
    ("GLU", {"x": X}, {}, "dim 1 of 5 elements has no halves"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)
