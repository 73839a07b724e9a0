"""Matrix products against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F16,
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

from rolemesh.runtime.ge.ops.matmul import OPS

A, B = reals(3, 5), reals(5, 4)
LEFT, RIGHT = reals(7, 2, 3, 5), reals(2, 5, 4)
BIAS = reals(4)
PLAIN = ("MatMul", "MatMulV2", "MatMulV3")
BATCHED = ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
LOOSE = 5
"""Terms of a sum cancel, so that its error is relative to them and not to it."""

CASES = [
    *(
        Case(kind, {"x1": A, "x2": B}, lambda x, y: np.einsum("ij,jk->ik", x, y), loose=LOOSE)
        for kind in PLAIN
    ),
    *(
        Case(
            kind,
            {"x1": A.t().contiguous(), "x2": B.t().contiguous(), "bias": BIAS},
            lambda x, y, b: np.einsum("ji,kj->ik", x, y) + b,
            {"transpose_x1": True, "transpose_x2": True},
            loose=LOOSE,
        )
        for kind in PLAIN
    ),
    Case(
        "MatMulV2",
        {"x1": A, "x2": B, "bias": BIAS.reshape(1, 4)},
        lambda x, y, b: np.einsum("ij,jk->ik", x, y) + b,
        dtypes=(F32,),
        loose=LOOSE,
    ),
    Case(
        "MatMul",
        {"x1": ints([1, 2], [3, 4], dtype=I32), "x2": ints([5], [6], dtype=I32)},
        lambda x, y: np.array([[17], [39]], np.int32),
        dtypes=(I32,),
    ),
    *(
        Case(
            kind,
            {"x1": LEFT, "x2": RIGHT},
            lambda x, y: np.einsum("nbij,bjk->nbik", x, y),
            loose=LOOSE,
        )
        for kind in BATCHED
    ),
    *(
        Case(
            kind,
            {"x1": LEFT.mT.contiguous(), "x2": RIGHT.mT.contiguous()},
            lambda x, y: np.einsum("nbji,bkj->nbik", x, y),
            {"adj_x1": True, "adj_x2": True},
            loose=LOOSE,
        )
        for kind in BATCHED
    ),
    Case(
        "BatchMatMulV2",
        {"x1": LEFT, "x2": RIGHT, "bias": BIAS},
        lambda x, y, b: np.einsum("nbij,bjk->nbik", x, y) + b,
        dtypes=(F32,),
        loose=LOOSE,
    ),
]

REFUSED: list[Refusal] = [
    ("MatMul", {"x1": A, "x2": RIGHT}, {}, "2 and 3 dims are no matrices"),
    ("BatchMatMul", {"x1": LEFT, "x2": BIAS}, {}, "4 and 1 dims are no matrices"),
    ("MatMul", {"x1": A.char(), "x2": B.char()}, {}, "no semantics for operands of torch.int8"),
    ("MatMul", {"x1": A, "x2": B, "bias": BIAS[:3]}, {}, r"a bias \[3\] for 4 columns"),
    ("MatMulV2", {"x1": A, "x2": B, "offset_w": B.char()}, {}, "no semantics for offset_w"),
    ("MatMulV2", {"x1": A, "x2": B}, {"offset_x": 1}, "no semantics for offset_x=1"),
    ("BatchMatMulV3", {"x1": A, "x2": B}, {"enable_hf32": True}, "enable_hf32=True"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", [*PLAIN, *BATCHED])
def test_sixteen_bit_products_are_accumulated_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Accumulated in the dtype itself, a sum of ones would stay at 256 or 2048."""
    row, column = torch.ones(1, 5000, dtype=dtype), torch.ones(5000, 1, dtype=dtype)
    (result,) = call(OPS, kind, {"x1": row, "x2": column}, {})
    assert result.dtype == dtype
    assert abs(result.item() - 5000) < 10
