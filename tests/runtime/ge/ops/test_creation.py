"""Ops that make tensors from sizes and values."""

from __future__ import annotations

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F32,
    F64,
    I32,
    I64,
    Case,
    Refusal,
    check,
    check_refused,
    each_dtype,
    each_refusal,
    ints,
    reals,
    types_of,
)

from rolemesh.runtime.ge.ops.creation import OPS

X = reals(2, 3)
N = ints([5, 6], [7, 8], [9, 0], dtype=I32)
SEVEN = torch.tensor(7.0)


def _range(start: object, limit: object, delta: object) -> dict[str, torch.Tensor]:
    return {
        "start": torch.tensor(start),
        "limit": torch.tensor(limit),
        "delta": torch.tensor(delta),
    }


CASES = [
    Case("Fill", {"dims": ints(2, 3), "value": SEVEN}, lambda *_: np.full((2, 3), 7.0)),
    Case("Fill", {"dims": ints(3), "value": torch.tensor([True])}, lambda *_: np.full(3, True)),
    Case("Fill", {"dims": torch.zeros(0, dtype=I64), "value": ints(4)}, lambda *_: np.array(4)),
    Case("FillD", {"value": SEVEN}, lambda _: np.full((3, 1), 7.0), {"dims": [3, 1]}),
    Case("Fills", {"x": X}, lambda _: np.full((2, 3), 2.5), {"value": 2.5}),
    Case("ZerosLike", {"x": X}, np.zeros_like),
    Case("ZerosLike", {"x": N}, np.zeros_like, dtypes=(I32,)),
    Case("OnesLike", {"x": X}, np.ones_like),
    Case("OnesLike", {"x": N}, np.ones_like, dtypes=(I32,)),
    Case("Empty", {"shape": ints(2, 3)}, lambda _: np.full((2, 3), -(2**31), np.int32)),
    Case("Empty", {"shape": ints(2, 3)}, lambda _: np.full((2, 3), np.nan), {"dtype": 0}, (F32,)),
    Case("Empty", {"shape": ints(2, 3)}, lambda _: np.zeros((2, 3), bool), {"dtype": 12}),
    Case(
        "Empty",
        {"shape": ints([3])},
        lambda _: np.zeros(3),
        {"dtype": 27, "init": True},
        result=BF16,
    ),
    Case("Range", _range(0, 5, 1), lambda *_: np.arange(5), dtypes=(F32,)),
    Case("Range", _range(5, -2, -3), lambda *_: np.array([5, 2, -1]), dtypes=(F32,)),
    Case("Range", _range(3, 3, 1), lambda *_: np.array([], int), dtypes=(F32,)),
    Case("Range", _range(0.0, 2.0, 0.5), lambda *_: np.array([0, 0.5, 1, 1.5])),
    Case(
        "Range",
        {"start": ints(1, dtype=I32), "limit": ints(4), "delta": ints(1, dtype=I32)},
        lambda *_: np.array([1, 2, 3]),
        dtypes=(F32,),
    ),
    Case(
        "Range",
        {"start": ints(1, dtype=I32), "limit": ints([3], dtype=I32), "delta": ints(1, dtype=I32)},
        lambda *_: np.array([1, 2], np.int32),
        dtypes=(F32,),
    ),
    Case(
        "Range",
        {"start": ints(0, dtype=I32), "limit": torch.tensor(2.5), "delta": ints(1, dtype=I32)},
        lambda *_: np.array([0.0, 1.0, 2.0]),
    ),
    Case(
        "LinSpace",
        {"start": torch.tensor(-1.0), "stop": torch.tensor(2.0), "num": ints(7)},
        lambda *_: np.linspace(-1, 2, 7),
        dtypes=(F32, F64),
    ),
    Case(
        "LinSpace",
        {"start": torch.tensor(3.0), "stop": torch.tensor(9.0), "num": ints([1], dtype=I32)},
        lambda *_: np.array([3.0]),
        dtypes=(F32,),
    ),
    Case("Eye", {}, lambda: np.eye(3), {"num_rows": 3}, dtypes=(F32,)),
    Case(
        "Eye",
        {},
        lambda: np.broadcast_to(np.eye(2, 4, dtype=np.int64), (3, 5, 2, 4)),
        {"num_rows": 2, "num_columns": 4, "batch_shape": [3, 5], "dtype": 9},
        dtypes=(F32,),
    ),
    Case("Diag", {"x": X[0]}, np.diag),
    Case("Diag", {"x": X}, lambda x: np.diag(x.reshape(-1)).reshape(2, 3, 2, 3)),
    Case("DiagPart", {"x": reals(4, 4)}, np.diag),
    Case(
        "DiagPart",
        {"x": reals(2, 3, 2, 3)},
        lambda x: np.array([[x[i, j, i, j] for j in range(3)] for i in range(2)]),
    ),
]

REFUSED: list[Refusal] = [
    ("Fill", {"dims": ints(2), "value": X}, {}, "the value has 6 elements"),
    ("FillD", {"value": X}, {"dims": [2]}, "the value has 6 elements"),
    ("Range", _range(0, 5, 0), {}, "steps of 0 from 0 do not lead to 5"),
    ("Range", _range(0, 5, -1), {}, "steps of -1 from 0 do not lead to 5"),
    ("LinSpace", {"start": ints(0), "stop": ints(1), "num": ints(7)}, {}, "torch.int64"),
    ("Eye", {}, {}, "attribute num_rows is missing"),
    ("DiagPart", {"x": X}, {}, "has no diagonal"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)
