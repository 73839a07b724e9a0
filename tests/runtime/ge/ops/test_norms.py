"""Normalisations against their formulas in numpy, in float64."""

from __future__ import annotations

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F16,
    F32,
    Case,
    Refusal,
    call,
    check,
    check_refused,
    each_dtype,
    each_refusal,
    ints,
    reals,
    types_of,
)

from rolemesh.runtime.ge.ops.norms import OPS

X = reals(3, 4, 5)
IMAGE = reals(2, 6, 3, 5)
GAMMA, BETA = reals(4, 5, seed=1), reals(4, 5, seed=2)
SCALE, SHIFT = reals(6, seed=3), reals(6, seed=4)
MEAN, VARIANCE = reals(6, seed=5), reals(6, low=0.5, high=4)
STATISTICS = {"running_mean": MEAN, "running_var": VARIANCE}
EPSILON = 0.125
"""Large, so that a test sees where it is added."""


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis, keepdims=True)


def _moments(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance, with dims of size 1 for the axes."""
    mean = x.sum(axes, keepdims=True) / np.prod([x.shape[axis] for axis in axes])
    return mean, ((x - mean) ** 2).mean(axes, keepdims=True)


def _layer(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> tuple[np.ndarray, ...]:
    mean, variance = _moments(x, axes)
    return (x - mean) / np.sqrt(variance + epsilon), mean, 1 / np.sqrt(variance + epsilon)


def _group(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> tuple[np.ndarray, ...]:
    """Three groups of two channels: y, mean and variance."""
    mean, variance = _moments(x.reshape(2, 3, 2, 3, 5), (2, 3, 4))
    y = ((x.reshape(2, 3, 2, 3, 5) - mean) / np.sqrt(variance + EPSILON)).reshape(x.shape)
    y = y * gamma[:, None, None] + beta[:, None, None]
    return y, mean.reshape(2, 3), variance.reshape(2, 3)


def _batch(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, *statistics: np.ndarray):
    mean, variance = (each.reshape(-1, 1, 1) for each in statistics)
    normal = (x - mean) / np.sqrt(variance + EPSILON)
    return normal * scale[:, None, None] + shift[:, None, None]


def _trained(x: np.ndarray, scale: np.ndarray, shift: np.ndarray, *running: np.ndarray):
    mean, variance = (each.reshape(-1) for each in _moments(x, (0, 2, 3)))
    count = x.size / x.shape[1]
    return (
        _batch(x, scale, shift, mean, variance),
        0.75 * running[0] + 0.25 * mean,
        0.75 * running[1] + 0.25 * variance * count / (count - 1),
        mean,
        1 / np.sqrt(variance + EPSILON),
    )


CASES = [
    # torch rounds sums of exponentials on the way if the operand has 16 bits.
    Case("SoftmaxV2", {"x": X}, lambda x: _softmax(x, 2), loose=2),
    Case("SoftmaxV2", {"x": X}, lambda x: _softmax(x, 1), {"axes": [-2]}, loose=2),
    Case(
        "SoftmaxV2",
        {"x": X},
        lambda x: _softmax(x, 0),
        {"axes": [0], "half_to_float": True},
        dtypes=(F16,),
        result=F32,
    ),
    Case("LogSoftmaxV2", {"logits": X}, lambda x: np.log(_softmax(x, 2)), loose=6),
    Case("LogSoftmaxV2", {"logits": X}, lambda x: np.log(_softmax(x, 0)), {"axes": [0]}, loose=6),
    Case(
        "LayerNormV4",
        {"x": X, "normalized_shape": ints(4, 5), "gamma": GAMMA, "beta": BETA},
        lambda x, _, gamma, beta: (
            (y := _layer(x, (1, 2), EPSILON))[0] * gamma + beta,
            y[1],
            y[2],
        ),
        {"epsilon": EPSILON},
        dtypes=(F32,),
        loose=3,
    ),
    Case(
        "LayerNormV4",
        {"x": X, "normalized_shape": ints([5])},
        lambda x, _: _layer(x, (2,), 1e-5),
        dtypes=(F32,),
        loose=3,
    ),
    Case(
        "LayerNormV4",
        {"x": X, "normalized_shape": ints([5]), "gamma": GAMMA[0]},
        lambda x, _, gamma: ((y := _layer(x, (2,), 1e-5))[0] * gamma, y[1], y[2]),
        dtypes=(F32,),
        loose=3,
    ),
    Case(
        "LayerNormV3",
        {"x": X, "gamma": GAMMA, "beta": BETA},
        lambda x, gamma, beta: ((y := _layer(x, (1, 2), EPSILON))[0] * gamma + beta, y[1], y[2]),
        {"begin_norm_axis": 1, "begin_params_axis": -2, "epsilon": EPSILON},
        dtypes=(F32,),
        loose=3,
    ),
    Case(
        "GroupNorm",
        {"x": IMAGE, "gamma": SCALE, "beta": SHIFT},
        _group,
        {"num_groups": 3, "eps": EPSILON},
        loose=3,
    ),
    Case(
        "GroupNormV2",
        {"x": IMAGE, "gamma": SCALE, "beta": SHIFT},
        lambda *x: (*(y := _group(*x))[:2], 1 / np.sqrt(y[2] + EPSILON)),
        {"num_groups": 3, "eps": EPSILON, "data_format": "NHWC"},
        loose=3,
    ),
    Case(
        "BNInfer",
        {"x": IMAGE, "scale": SCALE, "offset": SHIFT, "mean": MEAN, "variance": VARIANCE},
        _batch,
        {"epsilon": EPSILON},
        loose=3,
    ),
    Case(
        "BatchNormV3",
        {"x": IMAGE, "weight": SCALE, "bias": SHIFT, **STATISTICS},
        lambda *x: (_batch(*x), x[3], x[4], np.zeros(0), np.zeros(0)),
        {"epsilon": EPSILON, "is_training": False},
        loose=3,
    ),
    Case(
        "BatchNormV3",
        {"x": IMAGE, "weight": SCALE, "bias": SHIFT, **STATISTICS},
        _trained,
        {"epsilon": EPSILON, "momentum": 0.25},
        dtypes=(F32,),
        loose=3,
    ),
]

REFUSED: list[Refusal] = [
    ("SoftmaxV2", {"x": X}, {"axes": [0, 1]}, r"no semantics for axes=\[0, 1\]"),
    ("SoftmaxV2", {"x": X}, {"half_to_float": True}, "no semantics for operands of torch.float32"),
    ("LayerNormV4", {"x": X, "normalized_shape": ints([4])}, {}, "are not the last dims"),
    ("LayerNormV3", {"x": X, "gamma": X, "beta": X}, {"begin_params_axis": 1}, "of other dims"),
    ("GroupNorm", {"x": IMAGE, "gamma": SCALE, "beta": SHIFT}, {"num_groups": 4}, "no 4 groups"),
    (
        "GroupNorm",
        {"x": IMAGE, "gamma": SCALE, "beta": SHIFT},
        {"num_groups": 2, "is_training": False},
        "is_training=False",
    ),
    (
        "GroupNormV2",
        {"x": IMAGE, "gamma": SCALE, "beta": SHIFT},
        {"num_groups": 2, "data_format": "NDHWC"},
        "data_format='NDHWC'",
    ),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)


def test_layer_norm_of_sixteen_bits_keeps_its_statistics_in_float32() -> None:
    x, shape = X.bfloat16(), ints([5])
    y, mean, rstd = call(OPS, "LayerNormV4", {"x": x, "normalized_shape": shape}, {})
    expected = _layer(x.double().numpy(), (2,), 1e-5)
    assert (y.dtype, mean.dtype, rstd.dtype) == (BF16, F32, F32)
    for result, reference in zip((y, mean, rstd), expected, strict=True):
        torch.testing.assert_close(
            result.double(), torch.from_numpy(reference), rtol=4e-3, atol=1e-5
        )


def test_training_moves_the_statistics_in_place() -> None:
    mean, variance = MEAN.clone(), VARIANCE.clone()
    inputs = {"x": IMAGE, "weight": SCALE, "bias": SHIFT}
    call(OPS, "BatchNormV3", {**inputs, "running_mean": mean, "running_var": variance}, {})
    assert not torch.equal(mean, MEAN)
    assert not torch.equal(variance, VARIANCE)
