"""Copies, casts, assignments and views by strides."""

from __future__ import annotations

import cmath
import math

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F32,
    I32,
    I64,
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

from rolemesh.runtime.ge.ops.copies import OPS

X = reals(3, 5, low=-9, high=9)
N = torch.tensor([[-7, 3, 0], [6, -1, 5]], dtype=I32)
Z = torch.complex(reals(3, 4, seed=1), reals(3, 4, seed=2))
FLOAT, HALF, INT8, INT32, UINT8, INT64, BOOL, COMPLEX = 0, 1, 2, 3, 4, 9, 12, 16
"""`torchair.ge.DataType` numbers."""


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _fourier(x: np.ndarray) -> np.ndarray:
    """The discrete transform of the last dim, by its definition."""
    n = x.shape[-1]
    turns = [[cmath.exp(-2j * math.pi * j * k / n) for k in range(n)] for j in range(n)]
    return (x @ np.array(turns)).astype(np.complex64)


def _write(dst: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    src = rest[3]
    result = dst.copy()
    result[:, 1:5:2] = src.T
    return result


CASES = [
    Case("Identity", {"x": X}, _same),
    Case("IdentityN", {"x": [X, N]}, tuple),
    Case("TensorMove", {"x": X}, _same),
    Case("TensorMove", {"x": N}, _same, dtypes=(I32,)),
    Case("Cast", {"x": X}, _same, {"dst_type": FLOAT}, result=F32),
    Case("Cast", {"x": X}, _same, {"dst_type": HALF}, result=torch.float16),
    Case("Cast", {"x": X}, lambda x: np.trunc(x).astype(np.int32), {"dst_type": INT32}),
    Case("Cast", {"x": X}, lambda x: np.trunc(x).astype(np.int8), {"dst_type": INT8}),
    Case("Cast", {"x": X.round()}, lambda x: x != 0, {"dst_type": BOOL}),
    Case("Cast", {"x": X > 0}, lambda x: x.astype(np.int64), {"dst_type": INT64}),
    Case("Cast", {"x": N}, lambda x: x.astype(np.int64), {"dst_type": INT64}, dtypes=(I32,)),
    Case("Cast", {"x": N.abs()}, lambda x: x.astype(np.uint8), {"dst_type": UINT8}, dtypes=(I32,)),
    Case("Cast", {"x": X}, lambda x: x.astype(np.complex64), {"dst_type": COMPLEX}),
    Case(
        "Bitcast",
        {"x": torch.tensor([1.0, -2.0])},
        lambda x: np.array([0x3F800000, 0xC0000000 - 2**32], np.int32),
        {"type": INT32},
        dtypes=(F32,),
    ),
    Case(
        "Bitcast",
        {"x": ints(0x04030201, 0x40302010, dtype=I32)},
        lambda x: np.array([[1, 2, 3, 4], [16, 32, 48, 64]], np.uint8),
        {"type": UINT8},
        dtypes=(I32,),
    ),
    Case(
        "Bitcast",
        {"x": ints([1, 0], [0, 1], dtype=I32)},
        lambda x: np.array([1, 2**32]),
        {"type": INT64},
        dtypes=(I32,),
    ),
    Case("Assign", {"ref": X, "value": X * 2}, lambda ref, value: value),
    Case(
        "AsStrided",
        {"x": X, "size": ints(2, 3), "stride": ints(1, 4), "storage_offset": ints(2)},
        lambda x, *_: np.array([[x.flat[2 + i + 4 * j] for j in range(3)] for i in range(2)]),
    ),
    Case(
        "ViewCopy",
        {
            "dst": X,
            "dst_size": ints(3, 2),
            "dst_stride": ints(5, 2),
            "dst_storage_offset": ints(1),
            "src": reals(2, 3, seed=3),
            "src_size": ints(3, 2),
            "src_stride": ints(1, 3),
            "src_storage_offset": ints(0),
        },
        _write,
    ),
    Case(
        "Complex",
        {"real": X, "imag": X + 1},
        lambda re, im: (re + 1j * im).astype(np.complex64),
        dtypes=(F32,),
    ),
    Case("Real", {"input": Z}, lambda z: z.real, dtypes=(F32,)),
    Case("Imag", {"input": Z}, lambda z: z.imag, dtypes=(F32,)),
    Case("FFT", {"x": Z}, _fourier, dtypes=(F32,), loose=10),
    Case(
        "FFT2D",
        {"x": Z},
        lambda z: np.swapaxes(_fourier(np.swapaxes(_fourier(z), 0, 1)), 0, 1),
        dtypes=(F32,),
        loose=10,
    ),
]

REFUSED: list[Refusal] = [
    ("Cast", {"x": Z}, {"dst_type": FLOAT}, "a cast of torch.complex64 to torch.float32"),
    ("Cast", {"x": X}, {"dst_type": 99}, "no torch dtype has GE number 99"),
    ("Bitcast", {"x": X}, {"type": INT32, "keep_dim": True}, "no semantics for keep_dim=True"),
    ("Bitcast", {"x": N}, {"type": INT64}, "torch.int32 of shape"),
    ("Assign", {"ref": X, "value": X[0]}, {}, r"shape \[5\] into \[3, 5\]"),
    ("Assign", {"ref": X, "value": X}, {"validate_shape": False}, "validate_shape=False"),
    ("Complex", {"real": X, "imag": X}, {"Tout": 17}, "not the type of Tout"),
    ("Real", {"input": X}, {}, "no semantics for operands of torch.float32"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)


def test_an_assignment_writes_to_the_tensor_itself() -> None:
    ref, value = torch.zeros(3, 5, dtype=BF16), X.bfloat16()
    call(OPS, "Assign", {"ref": ref, "value": value}, {})
    assert torch.equal(ref, value)


def test_a_cast_to_the_same_type_is_a_copy() -> None:
    x = ints(1, 2)
    (result,) = call(OPS, "Cast", {"x": x}, {"dst_type": INT64})
    result += 1
    assert x.tolist() == [1, 2]
    assert x.dtype == I64
