"""Elementwise ops against numpy in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np
import pytest
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

from rolemesh.runtime.ge.ops.elementwise import OPS

X = reals(3, 5)
SMALL = reals(3, 5, low=-0.9, high=0.9)
POSITIVE = reals(3, 5, low=0.2, high=4)
LARGE = reals(3, 5, low=1.1, high=6)
HALVES = torch.tensor([-2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 3.7])
SPECIAL = torch.tensor([1.5, math.nan, math.inf, -math.inf, 0.0])
COLUMN = reals(3, 1, low=0.5, high=3, seed=7)
ROW = reals(5, low=0.5, high=3, seed=8)
N = torch.tensor([[-7, 3, 0], [6, -1, 5]], dtype=I32)
M = torch.tensor([2, -3, 4], dtype=I32)
TRUTH = torch.tensor([[True], [False]])
OTHER = torch.tensor([True, False, False])

erf = np.vectorize(math.erf, otypes=[float])
erfc = np.vectorize(math.erfc, otypes=[float])


def _truncated(x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    return np.trunc(x1 / x2)


def _sign_of_dividend(x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    return x1 - np.trunc(x1 / x2) * x2


def _whole(compute: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A reference for int32 operands."""
    return lambda *x: compute(*x).astype(np.int32)


UNARY: Mapping[str, tuple[Callable[..., np.ndarray], torch.Tensor]] = {
    "Abs": (lambda x: np.where(x < 0, -x, x), X),
    "Acos": (np.arccos, SMALL),
    "Acosh": (np.arccosh, LARGE),
    "Asin": (np.arcsin, SMALL),
    "Asinh": (np.arcsinh, X),
    "Atan": (np.arctan, X),
    "Atanh": (np.arctanh, SMALL),
    "Ceil": (np.ceil, HALVES),
    "Cos": (np.cos, X),
    "Cosh": (np.cosh, X),
    "Erf": (erf, X),
    "Erfc": (erfc, SMALL),
    "Exp": (np.exp, X),
    "Expm1": (np.expm1, X),
    "Floor": (np.floor, HALVES),
    "IsFinite": (np.isfinite, SPECIAL),
    "IsInf": (np.isinf, SPECIAL),
    "IsNan": (np.isnan, SPECIAL),
    "Log": (np.log, POSITIVE),
    "Log1p": (np.log1p, POSITIVE),
    "Neg": (np.negative, X),
    "Reciprocal": (lambda x: 1 / x, POSITIVE),
    "Rint": (np.rint, HALVES),
    "Round": (np.rint, HALVES),
    "Rsqrt": (lambda x: x**-0.5, POSITIVE),
    "Sign": (np.sign, torch.tensor([-2.0, 0.0, 3.0])),
    "Sin": (np.sin, X),
    "Sinh": (np.sinh, X),
    "Sqrt": (np.sqrt, POSITIVE),
    "Square": (lambda x: x * x, X),
    "Tan": (np.tan, SMALL),
    "Tanh": (np.tanh, X),
}

BINARY: Mapping[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "AddV2": np.add,
    "Atan2": np.arctan2,
    "Div": np.divide,
    "Equal": np.equal,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Greater": np.greater,
    "GreaterEqual": np.greater_equal,
    "Less": np.less,
    "LessEqual": np.less_equal,
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "Mod": _sign_of_dividend,
    "Mul": np.multiply,
    "NotEqual": np.not_equal,
    "RealDiv": np.divide,
    "SquaredDifference": lambda x1, x2: (x1 - x2) ** 2,
    "Sub": np.subtract,
    "TruncateDiv": _truncated,
    "TruncateMod": _sign_of_dividend,
}

INTEGER: Mapping[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "BitwiseAnd": np.bitwise_and,
    "BitwiseOr": np.bitwise_or,
    "BitwiseXor": np.bitwise_xor,
    "Div": _truncated,
    "DivNoNan": _truncated,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "Mod": _sign_of_dividend,
    "Mul": np.multiply,
    "SquaredDifference": lambda x1, x2: (x1 - x2) ** 2,
    "Sub": np.subtract,
    "TruncateDiv": _truncated,
    "TruncateMod": _sign_of_dividend,
}

CASES = [
    # torch rounds the root before it divides.
    *(
        Case(kind, {"x": x}, expect, loose=2 if kind == "Rsqrt" else 1)
        for kind, (expect, x) in UNARY.items()
    ),
    *(Case(kind, {"x1": X, "x2": COLUMN}, expect) for kind, expect in BINARY.items()),
    *(
        Case(kind, {"x1": N, "x2": M}, _whole(expect), dtypes=(I32,))
        for kind, expect in INTEGER.items()
    ),
    *(
        Case(kind, {"x1": N, "x2": M}, BINARY[kind], dtypes=(I32,))
        for kind in ("Equal", "NotEqual", "Less", "LessEqual", "Greater", "GreaterEqual")
    ),
    *(
        Case(kind, {"x": N}, _whole(expect), dtypes=(I32,))
        for kind, expect in {
            "Abs": np.abs,
            "Invert": lambda x: -x - 1,
            "Neg": np.negative,
            "Round": np.positive,
            "Sign": np.sign,
            "Square": np.square,
        }.items()
    ),
    Case("Equal", {"x1": TRUTH, "x2": OTHER}, np.equal, dtypes=(F32,)),
    Case("LogicalAnd", {"x1": TRUTH, "x2": OTHER}, lambda x, y: x & y, dtypes=(F32,)),
    Case("LogicalOr", {"x1": TRUTH, "x2": OTHER}, lambda x, y: x | y, dtypes=(F32,)),
    Case("LogicalNot", {"x": TRUTH}, lambda x: ~x, dtypes=(F32,)),
    Case("Mul", {"x1": TRUTH, "x2": OTHER}, lambda x, y: x & y, dtypes=(F32,)),
    Case("Pow", {"x1": POSITIVE, "x2": ROW}, np.power),
    Case("Pow", {"x1": N, "x2": ints(2, 3, 0, dtype=I32)}, _whole(np.power), dtypes=(I32,)),
    Case(
        "DivNoNan",
        {"x1": X, "x2": torch.tensor([0.0, 2.0, -1.5, 0.0, 3.0])},
        lambda x, y: np.where(y == 0, 0, x / np.where(y == 0, 1, y)),
    ),
    Case(
        "Xlogy",
        {"x1": torch.tensor([0.0, 0.0, 2.0]), "x2": torch.tensor([0.0, 3.0, 4.0])},
        lambda x, y: np.array([0.0, 0.0, 2 * math.log(4)]),
    ),
    Case("Trunc", {"input_x": HALVES}, np.trunc),
    Case(
        "Erfinv",
        {"input_x": SMALL},
        np.vectorize(lambda p: NormalDist().inv_cdf((p + 1) / 2) / math.sqrt(2), otypes=[float]),
        loose=3,
    ),
    Case(
        "Exp", {"x": SMALL}, lambda x: 2 ** (3 * x + 0.5), {"base": 2.0, "scale": 3.0, "shift": 0.5}
    ),
    Case("Exp", {"x": SMALL}, lambda x: np.exp(x - 1), {"shift": -1.0}),
    Case("Log", {"x": POSITIVE}, np.log2, {"base": 2.0}),
    Case("Log", {"x": POSITIVE}, np.log10, {"base": 10.0}),
    Case(
        "Log",
        {"x": POSITIVE},
        lambda x: np.log(2 * x + 1) / math.log(3),
        {"base": 3.0, "scale": 2.0, "shift": 1.0},
    ),
    Case(
        "LeftShift",
        {"x": N, "y": ints(1, 0, 2, dtype=I32)},
        lambda x, y: x * 2**y,
        dtypes=(I32,),
    ),
    Case(
        "RightShift",
        {"x": N, "y": ints(1, 0, 2, dtype=I32)},
        lambda x, y: np.floor(x / 2.0**y).astype(np.int32),
        dtypes=(I32,),
    ),
    Case("Muls", {"x": X}, lambda x: x * 2.5, {"value": 2.5}),
    Case("Muls", {"x": N}, lambda x: x * np.int32(3), {"value": 3.0}, dtypes=(I32,)),
    Case("Adds", {"x": X}, lambda x: x + 2.5, {"value": 2.5}),
    Case("AddN", {"x": [X, SMALL, POSITIVE]}, lambda x: x[0] + x[1] + x[2], {"N": 3}),
    Case("AddN", {"x": [X]}, lambda x: x[0], {"N": 1}),
    Case("Axpy", {"x1": X, "x2": ROW}, lambda x, y: x - 1.5 * y, {"alpha": -1.5}),
    Case(
        "AxpyV2",
        {"x1": X, "x2": ROW, "alpha": torch.tensor(2.5)},
        lambda x, y, alpha: x + alpha * y,
    ),
    Case(
        "AxpyV2",
        {"x1": N, "x2": M, "alpha": ints(3, dtype=I32)},
        lambda x, y, alpha: x + alpha * y,
        dtypes=(I32,),
    ),
    Case("Sxpy", {"x1": X, "x2": ROW, "alpha": torch.tensor(2.5)}, lambda x, y, a: x - a * y),
    Case("Sxpy", {"x1": X, "x2": ROW}, np.subtract),
    Case(
        "Addcmul",
        {"input_data": X, "x1": ROW, "x2": COLUMN, "value": torch.tensor(0.5)},
        lambda x, y, z, value: x + value * y * z,
    ),
    Case(
        "Addcdiv",
        {"input_data": X, "x1": ROW, "x2": COLUMN, "value": torch.tensor(0.5)},
        lambda x, y, z, value: x + value * y / z,
    ),
    Case(
        "Lerp",
        {"start": X, "end": SMALL, "weight": torch.tensor(0.25)},
        lambda x, y, w: x + w * (y - x),
    ),
    *(
        Case(
            kind,
            {"x": X, "clip_value_min": low, "clip_value_max": torch.tensor(1.0)},
            lambda x, low, high: np.minimum(np.maximum(x, low), high),
        )
        for kind in ("ClipByValue", "ClipByValueV2")
        for low in (torch.tensor(-0.5), -ROW, torch.tensor(2.0))
    ),
    Case(
        "NanToNum",
        {"x": SPECIAL},
        lambda x: np.array([1.5, 0.25, 8.0, -4.0, 0.0]),
        {"nan": 0.25, "posinf": 8.0, "neginf": -4.0},
    ),
    Case(
        "MaskedFill",
        {"x": X, "mask": reals(3, 1) > 0, "value": torch.tensor(-math.inf)},
        lambda x, mask, value: np.where(mask, value, x),
    ),
    Case(
        "MaskedFill",
        {"x": N, "mask": OTHER, "value": ints(9, dtype=I32)},
        lambda x, mask, value: np.where(mask, value, x),
        dtypes=(I32,),
    ),
    Case(
        "SelectV2",
        {"condition": reals(3, 1) > 0, "then": X, "else": ROW},
        np.where,
    ),
    Case(
        "Select",
        {"condition": torch.tensor([True, False, True]), "x1": X, "x2": SMALL},
        lambda c, x, y: np.stack([x[0], y[1], x[2]]),
    ),
    Case(
        "Select",
        {"condition": reals(3, 5) > 0, "x1": X, "x2": SMALL},
        np.where,
    ),
]

REFUSED: list[Refusal] = [
    ("Exp", {"x": N}, {}, "no semantics for operands of torch.int32"),
    ("Add", {"x1": TRUTH, "x2": OTHER}, {}, "no semantics for operands of torch.bool"),
    ("Less", {"x1": TRUTH, "x2": OTHER}, {}, "no semantics for operands of torch.bool"),
    ("LogicalAnd", {"x1": N, "x2": M}, {}, "no semantics for operands of torch.int32"),
    ("LogicalNot", {"x": X}, {}, "no semantics for operands of torch.float32"),
    ("BitwiseAnd", {"x1": TRUTH, "x2": OTHER}, {}, "no semantics for operands of torch.bool"),
    ("RealDiv", {"x1": N, "x2": M}, {}, "no semantics for operands of torch.int32"),
    (
        "MaskedFill",
        {"x": X, "mask": X, "value": torch.tensor(1.0)},
        {},
        "operands of torch.float32",
    ),
    ("MaskedFill", {"x": X, "mask": X > 0, "value": ROW}, {}, "the value has 5 elements"),
    ("AddN", {"x": [X, ROW]}, {"N": 2}, "not N=2 tensors of one shape"),
    ("AddN", {"x": [X, X]}, {"N": 3}, "not N=3 tensors of one shape"),
    ("Select", {"condition": X > 0, "x1": X, "x2": ROW}, {}, "differ"),
    ("Select", {"condition": reals(3, 1) > 0, "x1": X, "x2": X}, {}, "a condition of shape"),
    ("Muls", {"x": X}, {}, "attribute value is missing"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)


@pytest.mark.parametrize("kind", sorted({*BINARY, *INTEGER, "Pow", "LogicalAnd", "LogicalOr"}))
def test_dtypes_of_operands_must_be_equal(kind: str) -> None:
    assert set(OPS.ops[kind].equal) == {"x1", "x2"}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_floor_and_truncation_differ_below_zero(dtype: torch.dtype) -> None:
    x1, x2 = torch.tensor([-7.0, 7.0], dtype=dtype), torch.tensor([2.0, -2.0], dtype=dtype)
    found = {
        kind: call(OPS, kind, {"x1": x1, "x2": x2}, {})[0].tolist()
        for kind in ("FloorDiv", "TruncateDiv", "FloorMod", "Mod")
    }
    assert found == {
        "FloorDiv": [-4.0, -4.0],
        "TruncateDiv": [-3.0, -3.0],
        "FloorMod": [1.0, -1.0],
        "Mod": [-1.0, 1.0],
    }


def test_the_third_input_of_select_has_the_name_of_the_definition() -> None:
    assert OPS.ops["SelectV2"].inputs == ("condition", "then", "else")


def test_sums_of_sixteen_bit_numbers_are_rounded_once() -> None:
    tensors = [torch.full((1,), value, dtype=BF16) for value in (256.0, 1.0, 1.0)]
    assert call(OPS, "AddN", {"x": tensors}, {"N": 3})[0].item() == 258.0
