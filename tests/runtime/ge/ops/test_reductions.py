"""Reductions, cumulative ops, norms of vectors and losses against numpy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F32,
    I32,
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

from rolemesh.runtime.ge.ops.reductions import OPS

X = reals(3, 4, 5)
NEAR_ONE = reals(3, 4, 5, low=0.5, high=1.5)
N = ints([[3, -1], [4, 2], [0, 5]], dtype=I32)
TRUTH = torch.tensor([[[True, False]], [[True, True]], [[False, False]]])
PROBABLE = reals(4, 3, low=-4, high=0)
TARGET = ints(1, 0, 2, 2)
WEIGHT = torch.tensor([0.5, 2.0, 1.25])
NONE = torch.zeros(0, dtype=I32)


def _log_sum_exp(x: np.ndarray, axis: tuple[int, ...], keepdims: bool) -> np.ndarray:
    return np.log(np.exp(x).sum(axis, keepdims=keepdims))


REDUCTIONS: Mapping[str, tuple[Callable[..., np.ndarray], torch.Tensor]] = {
    "ReduceAll": (np.all, TRUTH),
    "ReduceAny": (np.any, TRUTH),
    "ReduceLogSumExp": (_log_sum_exp, X),
    "ReduceMax": (np.max, X),
    "ReduceMean": (np.mean, X),
    "ReduceMin": (np.min, X),
    "ReduceProd": (np.prod, NEAR_ONE),
    "ReduceSum": (np.sum, X),
}

INTEGER = {"ReduceMax": np.max, "ReduceMin": np.min, "ReduceProd": np.prod, "ReduceSum": np.sum}


def _over(compute: Callable[..., np.ndarray], axes: tuple[int, ...], keep: bool):
    return lambda x, *_: compute(x, axis=axes, keepdims=keep)


def _losses(x: np.ndarray, target: np.ndarray, *weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """The loss and the weight of each row."""
    each = weight[0][target] if weight else np.ones(len(target))
    return -each * x[np.arange(len(target)), target], each


def _ignoring(x: np.ndarray, target: np.ndarray, *weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """The mean loss of the rows whose target is not 0, and the sum of their weights."""
    loss, each = _losses(x, target, *weight)
    counts = target != 0
    return loss[counts].sum() / each[counts].sum(), each[counts].sum()


CASES = [
    *(
        Case(kind, {"x": x, "axes": ints(*axes)}, _over(compute, axes, keep), {"keep_dims": keep})
        for kind, (compute, x) in REDUCTIONS.items()
        for axes, keep in [((-1, 0), True), ((1,), False), ((0, 1, 2), False)]
    ),
    *(
        Case(f"{kind}D", {"x": x}, _over(compute, (2, 1), False), {"axes": [2, 1]})
        for kind, (compute, x) in REDUCTIONS.items()
        if kind != "ReduceLogSumExp"
    ),
    *(
        Case(
            kind,
            {"x": N, "axes": ints([1], dtype=I32)},
            lambda x, _, compute=compute: compute(x, axis=1).astype(np.int32),
            dtypes=(I32,),
        )
        for kind, compute in INTEGER.items()
    ),
    *(
        Case(kind, {"x": x, "axes": NONE}, lambda x, _: x, {"keep_dims": False})
        for kind, (_, x) in REDUCTIONS.items()
    ),
    Case("ReduceMeanD", {"x": X}, lambda x: x.mean(), {"axes": []}),
    Case(
        "ReduceMean",
        {"x": X, "axes": NONE},
        lambda x, _: x.mean(keepdims=True),
        {"noop_with_empty_axes": False, "keep_dims": True},
    ),
    Case("ReduceSum", {"x": torch.tensor(2.5), "axes": ints([0])}, lambda x, _: x),
    Case(
        "ReduceMeanWithCast",
        {"x": X, "axes": ints([1])},
        lambda x, _: x.mean(1, keepdims=True),
        {"dtype": 0, "keep_dims": True},
        result=F32,
    ),
    Case("ReduceMeanWithCast", {"x": X, "axes": ints([1])}, lambda x, _: x.mean(1), {"dtype": 28}),
    Case(
        "ReduceMeanWithCast",
        {"x": N, "axes": ints([0])},
        lambda x, _: x.mean(0),
        {"dtype": 1},
        dtypes=(torch.float16,),
    ),
    Case("SquareSumV1", {"x": X}, lambda x: (x * x).sum(1), {"axis": [1], "keep_dims": False}),
    Case(
        "ReduceStdV2",
        {"x": X},
        lambda x: (x.std((0, 2), ddof=1), x.mean((0, 2))),
        {"dim": [0, 2]},
        loose=2,
    ),
    Case(
        "ReduceStdV2",
        {"x": X},
        lambda x: (x.std(keepdims=True), np.zeros(0)),
        {"correction": 0, "keepdim": True, "is_mean_out": False},
    ),
    Case(
        "ReduceStdWithMean",
        {"x": X, "mean": X.mean(1, keepdim=True).expand(3, 4, 5)},
        lambda x, mean: np.sqrt(((x - mean) ** 2).sum(1, keepdims=True) / 3),
        {"dim": [1], "keepdim": True},
    ),
    Case(
        "ReduceStdWithMean",
        {"x": X, "mean": torch.full((3, 4, 5), 0.25)},
        lambda x, mean: np.sqrt(((x - mean) ** 2).mean()),
        {"correction": 0},
    ),
    *(
        Case(
            "LpNormV2",
            {"x": X},
            lambda x, order=order: np.linalg.norm(x, order, 1),
            {"p": p, "axes": [-2], "epsilon": 0.0},
        )
        for p, order in [(1.0, 1), (2.0, 2), (3.0, 3), (2.0**31, np.inf), (-(2.0**31), -np.inf)]
    ),
    Case(
        "LpNormV2",
        {"x": X},
        lambda x: np.sqrt((x * x).sum(keepdims=True)),
        {"keepdim": True, "epsilon": 0.0},
    ),
    Case("Cumsum", {"x": X, "axis": ints(1)}, lambda x, _: np.cumsum(x, 1), loose=2),
    Case(
        "Cumsum",
        {"x": X, "axis": ints([-1], dtype=I32)},
        lambda x, _: np.cumsum(x, 2) - x,
        {"exclusive": True},
        dtypes=(F32,),
    ),
    Case(
        "Cumsum",
        {"x": X, "axis": ints(0)},
        lambda x, _: np.cumsum(x[::-1], 0)[::-1],
        {"reverse": True},
        dtypes=(F32,),
    ),
    Case(
        "Cumsum",
        {"x": X, "axis": ints(0)},
        lambda x, _: np.cumsum(x[::-1], 0)[::-1] - x,
        {"reverse": True, "exclusive": True},
        dtypes=(F32,),
    ),
    Case(
        "Cumsum",
        {"x": N, "axis": ints(1)},
        lambda x, _: np.cumsum(x, 1, dtype=np.int32),
        dtypes=(I32,),
    ),
    Case("CumsumD", {"x": X}, lambda x: np.cumsum(x, 2), {"axis": 2}, dtypes=(F32, BF16)),
    Case("Cumprod", {"x": NEAR_ONE, "axis": ints(1)}, lambda x, _: np.cumprod(x, 1)),
    Case(
        "Cumprod",
        {"x": NEAR_ONE, "axis": ints(1)},
        lambda x, _: np.cumprod(x, 1) / x,
        {"exclusive": True},
    ),
    Case("CumprodD", {"x": NEAR_ONE}, lambda x: np.cumprod(x, 0), {"axis": -3}),
    Case("MseLoss", {"predict": X, "label": NEAR_ONE}, lambda x, y: ((x - y) ** 2).mean()),
    Case(
        "MseLoss",
        {"predict": X, "label": NEAR_ONE},
        lambda x, y: ((x - y) ** 2).sum(),
        {"reduction": "sum"},
    ),
    Case(
        "MseLoss",
        {"predict": X, "label": NEAR_ONE},
        lambda x, y: (x - y) ** 2,
        {"reduction": "none"},
    ),
    Case(
        "NLLLoss",
        {"x": PROBABLE, "target": TARGET.int()},
        lambda *x: (_losses(*x)[0], np.array(0.0)),
        {"reduction": "none"},
    ),
    Case(
        "NLLLoss",
        {"x": PROBABLE, "target": TARGET, "weight": WEIGHT},
        lambda *x: tuple(part.sum() for part in _losses(*x)),
        {"reduction": "sum"},
        dtypes=(F32,),
    ),
    Case(
        "NLLLoss",
        {"x": PROBABLE, "target": TARGET, "weight": WEIGHT},
        _ignoring,
        {"ignore_index": 0},
        dtypes=(F32,),
    ),
]

REFUSED: list[Refusal] = [
    ("ReduceAny", {"x": X, "axes": ints([0])}, {}, "no semantics for operands of torch.float32"),
    ("ReduceMean", {"x": N, "axes": ints([0])}, {}, "no semantics for operands of torch.int32"),
    ("ReduceSum", {"x": TRUTH, "axes": ints([0])}, {}, "no semantics for operands of torch.bool"),
    ("ReduceSum", {"x": X, "axes": ints([3])}, {}, "axis 3 of a tensor with 3 dims"),
    ("ReduceStdWithMean", {"x": X, "mean": X}, {"invert": True}, "no semantics for invert=True"),
    ("ReduceStdWithMean", {"x": X, "mean": X}, {"unbiased": False}, "unbiased=False"),
    ("ReduceStdWithMean", {"x": X, "mean": X[:1]}, {}, "mean"),
    ("LpNormV2", {"x": X}, {}, "no semantics for an epsilon but 0"),
    ("Cumsum", {"x": TRUTH, "axis": ints(0)}, {}, "no semantics for operands of torch.bool"),
    ("MseLoss", {"predict": X, "label": X}, {"reduction": "max"}, "reduction='max'"),
    ("NLLLoss", {"x": X, "target": TARGET}, {}, "of 3 dims"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)


def test_sixteen_bit_sums_do_not_stall() -> None:
    """Accumulated in bfloat16, a sum of ones would stay at 256."""
    ones = torch.ones(1000, dtype=BF16)
    for kind, axes in (("ReduceSum", {"axes": ints([0])}), ("Cumsum", {"axis": ints(0)})):
        (result,) = call(OPS, kind, {"x": ones, **axes}, {})
        assert math.isclose(result.reshape(-1)[-1].item(), 1000, rel_tol=1e-2)
