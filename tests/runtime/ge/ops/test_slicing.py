"""Slices, paddings and triangles against numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F32,
    I32,
    I64,
    Case,
    Given,
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

from rolemesh.runtime.ge.ops.slicing import OPS

X = reals(4, 5, 7)
SQUARE = reals(2, 4, 6)
SOME = (F32, BF16)
END = 2**31 - 1


def _bounds(begin: list[int], end: list[int], strides: list[int]) -> dict[str, Given]:
    return {"x": X, "begin": ints(*begin), "end": ints(*end), "strides": ints(*strides)}


def _sliced(*index: object):
    return lambda x, *_: x[index]


def _along(
    axes: list[int], begin: list[int], end: list[int], strides: list[int]
) -> dict[str, Given]:
    return {
        "x": X,
        "begin": ints(begin),
        "end": ints(end),
        "axes": ints(axes),
        "strides": ints(strides),
    }


def _assigned(var: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    result = var.copy()
    result[1:4:2, 0:5:3] = rest[-1]
    return result


ASSIGNED = {
    "var": X,
    "begin": ints(1, 0),
    "end": ints(4, 5),
    "strides": ints(2, 3),
    "input_value": reals(2, 2, 7),
}

MASKED = [
    # begin_mask and end_mask leave a bound open.
    (_bounds([2, 1], [3, 3], [1, 1]), {"begin_mask": 1}, np.s_[:3, 1:3]),
    (_bounds([2, 1], [3, 3], [1, 1]), {"end_mask": 2}, np.s_[2:3, 1:]),
    # shrink_axis_mask takes one element.
    (_bounds([1, -2, 0], [9, 9, 2], [1, 1, 1]), {"shrink_axis_mask": 3}, np.s_[1, -2, 0:2]),
    # new_axis_mask adds a dim.
    (_bounds([0, 0, 1], [2, 0, 3], [1, 1, 1]), {"new_axis_mask": 2}, np.s_[0:2, None, 1:3]),
    # ellipsis_mask stands for all dims in between.
    (_bounds([1, 0, 2], [3, 0, 6], [1, 1, 2]), {"ellipsis_mask": 2}, np.s_[1:3, ..., 2:6:2]),
    (
        _bounds([1, 0, 0, 3], [0, 0, 0, 0], [1, 1, 1, 1]),
        {"shrink_axis_mask": 9, "ellipsis_mask": 2, "new_axis_mask": 4},
        np.s_[1, ..., None, 3],
    ),
    (_bounds([0, 0, 0, 0], [4, 0, 5, 7], [2, 1, 2, 3]), {"ellipsis_mask": 2}, np.s_[::2, ::2, ::3]),
    # Strides below 0 run back.
    (_bounds([3, -1], [0, -9], [-2, -1]), {}, np.s_[3:0:-2, ::-1]),
    (_bounds([-1], [0], [-3]), {"end_mask": 1, "begin_mask": 1}, np.s_[::-3]),
]

CASES = [
    Case(
        "Slice",
        {"x": X, "offsets": ints(1, 0, 2), "size": ints(2, -1, 3)},
        _sliced(slice(1, 3), slice(None), slice(2, 5)),
        dtypes=SOME,
    ),
    *(Case("StridedSlice", inputs, _sliced(*index), masks) for inputs, masks, index in MASKED[:-1]),
    Case("StridedSlice", MASKED[-1][0], lambda x, *_: x[::-3], MASKED[-1][1]),
    *(
        Case("StridedSliceV2", inputs, _sliced(*index), masks)
        for inputs, masks, index in MASKED[:-1]
    ),
    Case("StridedSliceV2", {"x": X, "begin": ints([1]), "end": ints([3])}, lambda x, *_: x[1:3]),
    Case(
        "StridedSliceV2",
        {"x": X, "begin": ints(2), "end": ints(END), "axes": ints(1), "strides": ints(1)},
        lambda x, *_: x[:, 2:],
        dtypes=SOME,
    ),
    Case(
        "StridedSliceV2",
        _along([-1, 0], [-4, 1], [-1, 99], [2, 1]),
        lambda x, *_: x[1:, :, -4:-1:2],
    ),
    Case("StridedSliceV2", _along([1], [4], [0], [-2]), lambda x, *_: x[:, 4:0:-2]),
    Case("StridedSliceV2", _along([1], [3], [3], [1]), lambda x, *_: x[:, 3:3]),
    Case("StridedSliceV2", _along([1], [0], [9], [3]), lambda x, *_: x[:, ::3]),
    Case(
        "StridedSliceD",
        {"x": X},
        lambda x: x[1:4:2, 0:3],
        {"begin": [1, 0], "end": [4, 3], "strides": [2, 1]},
    ),
    Case("StridedSliceAssign", ASSIGNED, _assigned),
    Case(
        "PadV3",
        {"x": X, "paddings": ints(0, 1, 2, 0, 3, 3), "constant_values": torch.tensor(2.5)},
        lambda x, *_: np.pad(x, ((0, 1), (2, 0), (3, 3)), constant_values=2.5),
        dtypes=SOME,
    ),
    Case(
        "PadV3",
        {"x": X, "paddings": ints(0, 2, 3, 1, 0, 3, dtype=I32)},
        lambda x, *_: np.pad(x, ((0, 1), (2, 0), (3, 3))),
        {"paddings_contiguous": False},
    ),
    Case(
        "PadV3",
        {"x": X, "paddings": ints(0, 3, 3, 4, 6, 1)},
        lambda x, *_: np.pad(x, ((0, 3), (3, 4), (6, 1)), "reflect"),
        {"mode": "reflect"},
    ),
    Case(
        "PadV3",
        {"x": X, "paddings": ints(9, 0, 0, 0, 0, 8)},
        lambda x, *_: np.pad(x, ((9, 0), (0, 0), (0, 8)), "edge"),
        {"mode": "edge"},
    ),
    Case(
        "PadV3",
        {"x": ints([1, 2], [3, 4]), "paddings": ints(0, 0, 1, 0), "constant_values": ints(9)},
        lambda x, *_: np.array([[9, 1, 2], [9, 3, 4]]),
        dtypes=(F32,),
    ),
    Case(
        "Pad",
        {"x": X[0], "paddings": ints([1, 0], [0, 2])},
        lambda x, _: np.pad(x, ((1, 0), (0, 2))),
    ),
    Case(
        "PadV2",
        {"x": X[0], "paddings": ints([1, 0], [0, 2]), "constant_values": torch.tensor(-1.0)},
        lambda x, *_: np.pad(x, ((1, 0), (0, 2)), constant_values=-1),
    ),
    Case(
        "MirrorPad",
        {"x": X[0], "paddings": ints([4, 0], [2, 6])},
        lambda x, _: np.pad(x, ((4, 0), (2, 6)), "reflect"),
        {"mode": "REFLECT"},
    ),
    Case(
        "MirrorPad",
        {"x": X[0], "paddings": ints([5, 0], [2, 7])},
        lambda x, _: np.pad(x, ((5, 0), (2, 7)), "symmetric"),
        {"mode": "SYMMETRIC"},
    ),
    *(
        Case("Triu", {"x": SQUARE}, lambda x, k=k: np.triu(x, k), {"diagonal": k})
        for k in (-2, 0, 3)
    ),
    *(
        Case("Tril", {"x": SQUARE}, lambda x, k=k: np.tril(x, k), {"diagonal": k})
        for k in (-2, 0, 3)
    ),
    Case("Triu", {"x": SQUARE > 0}, lambda x: np.triu(x, 1), {"diagonal": 1}, dtypes=(F32,)),
    Case(
        "MatrixBandPart",
        {"x": SQUARE, "num_lower": ints(1), "num_upper": ints(2)},
        lambda x, *_: np.tril(np.triu(x, -1), 2),
    ),
    Case(
        "MatrixBandPart",
        {"x": SQUARE, "num_lower": ints(-1), "num_upper": ints(0)},
        lambda x, *_: np.tril(x),
    ),
]

REFUSED: list[Refusal] = [
    ("Slice", {"x": X, "offsets": ints(1), "size": ints(1)}, {}, "1 offsets, 1 sizes, 3 dims"),
    (
        "StridedSliceV2",
        _along([0], [0], [1], [1]),
        {"begin_mask": 1},
        "no semantics for begin_mask=1",
    ),
    ("StridedSliceV2", _along([0], [0], [1], [0]), {}, "a stride of 0"),
    ("StridedSliceV2", _along([0, 0], [0, 0], [1, 1], [1, 1]), {}, "along axes"),
    ("StridedSlice", _bounds([0] * 4, [1] * 4, [1] * 4), {}, "4 slices of a tensor with 3 dims"),
    (
        "StridedSlice",
        _bounds([0, 0], [1, 1], [1, 1]),
        {"ellipsis_mask": 3},
        "more than one ellipsis",
    ),
    ("PadV3", {"x": X, "paddings": ints(0, -1, 0, 0, 0, 0)}, {}, "a negative padding"),
    ("PadV3", {"x": X, "paddings": ints(0, 1)}, {}, "2 paddings for 3 dims"),
    ("PadV3", {"x": X, "paddings": ints(*[1] * 6)}, {"mode": "circular"}, "mode='circular'"),
    (
        "PadV3",
        {"x": X, "paddings": ints(4, *[0] * 5)},
        {"mode": "reflect"},
        "4 mirrored elements of 4",
    ),
    ("MirrorPad", {"x": X, "paddings": ints(*[0] * 6)}, {"mode": "EDGE"}, "mode='EDGE'"),
    (
        "StridedSliceAssign",
        {**ASSIGNED, "input_value": X},
        {},
        r"shape \[4, 5, 7\] into \[2, 2, 7\]",
    ),
    ("StridedSliceAssign", {**ASSIGNED, "strides": ints(2, -3)}, {}, "a stride of -3"),
    ("StridedSliceAssign", ASSIGNED, {"end_mask": 1}, "no semantics for end_mask=1"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)


@pytest.mark.parametrize("step", [-3, -2, -1, 1, 2, 3])
def test_bounds_are_those_of_python(step: int) -> None:
    x = torch.arange(7, dtype=I64)
    for begin, end in itertools.product([-8, -7, -3, 0, 2, 6, 7, 9], repeat=2):
        inputs = {
            "x": x,
            "begin": ints([begin]),
            "end": ints([end]),
            "axes": ints([0]),
            "strides": ints([step]),
        }
        (result,) = call(OPS, "StridedSliceV2", inputs, {})
        assert result.tolist() == list(range(7))[begin:end:step], (begin, end)
