"""Ops that order elements, against numpy."""

from __future__ import annotations

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F32,
    I32,
    Case,
    Refusal,
    check,
    check_refused,
    each_dtype,
    each_refusal,
    ints,
    types_of,
)

from rolemesh.runtime.ge.ops.sorting import OPS

X = (torch.randperm(60, generator=torch.Generator().manual_seed(3)) - 30).float().reshape(3, 4, 5)
TIES = torch.tensor([[2.0, 3.0, 2.0, 3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0, 0.0, 5.0]])
N = X.int()
SEQUENCE = torch.tensor([1.0, 2.0, 2.0, 5.0])
VALUES = torch.tensor([[2.0, 0.5, 9.0], [5.0, 3.0, 1.0]])


def _best(axis: int, count: int, largest: bool):
    def expect(x: np.ndarray, *_: object) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(-x if largest else x, axis, kind="stable")
        places = np.take(order, range(count), axis)
        return np.take_along_axis(x, places, axis), places.astype(np.int32)

    return expect


def _extremum(find: object, axis: int, keep: bool):
    def expect(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = find(x, axis)
        values = np.take_along_axis(x, np.expand_dims(places, axis), axis)
        places = np.expand_dims(places, axis) if keep else places
        return places.astype(np.int32), values if keep else values.squeeze(axis)

    return expect


CASES = [
    *(
        Case(kind, {"x": X, "k": ints(2, dtype=I32)}, _best(-1, 2, True))
        for kind in ("TopK", "TopKV2")
    ),
    Case(
        "TopKV2",
        {"x": X, "k": ints([3], dtype=I32)},
        _best(1, 3, False),
        {"dim": 1, "largest": False, "sorted": True, "sort_policy": 1},
    ),
    Case("Sort", {"x": X}, _best(-1, 5, False)),
    Case("Sort", {"x": X}, _best(0, 3, True), {"axis": 0, "descending": True}),
    Case("Sort", {"x": TIES}, _best(1, 6, False), {"stable": True}),
    Case("Sort", {"x": TIES}, _best(1, 6, True), {"stable": True, "descending": True, "axis": 1}),
    Case("ArgMaxV2", {"x": X, "dimension": ints(1)}, lambda x, _: x.argmax(1)),
    Case("ArgMaxV2", {"x": TIES, "dimension": ints([-1])}, lambda x, _: np.array([1, 3])),
    Case(
        "ArgMaxV2",
        {"x": N, "dimension": ints(0)},
        lambda x, _: x.argmax(0).astype(np.int32),
        {"dtype": 3},
        dtypes=(I32,),
    ),
    Case("ArgMaxD", {"x": X}, lambda x: x.argmax(2), {"dimension": 2}),
    Case("ArgMin", {"x": X, "dimension": ints(2)}, lambda x, _: x.argmin(2)),
    Case("ArgMin", {"x": TIES, "dimension": ints(1)}, lambda x, _: np.array([4, 0])),
    Case("ArgMaxWithValue", {"x": X}, _extremum(np.argmax, 1, False), {"dimension": 1}),
    Case(
        "ArgMaxWithValue",
        {"x": X},
        _extremum(np.argmax, -1, True),
        {"dimension": -1, "keep_dims": True},
    ),
    Case("ArgMinWithValue", {"x": X}, _extremum(np.argmin, 0, False), {"dimension": 0}),
    Case(
        "ArgMinWithValue",
        {"x": TIES},
        _extremum(np.argmin, 1, True),
        {"dimension": 1, "keep_dims": True},
        dtypes=(F32, BF16),
    ),
    Case(
        "SearchSorted",
        {"sorted_sequence": SEQUENCE, "values": VALUES},
        lambda s, v: np.array([[1, 0, 4], [3, 3, 0]]),
    ),
    Case(
        "SearchSorted",
        {"sorted_sequence": SEQUENCE, "values": VALUES},
        lambda s, v: np.array([[3, 0, 4], [4, 3, 1]], np.int32),
        {"right": True, "dtype": 3},
    ),
    Case(
        "SearchSorted",
        {"sorted_sequence": SEQUENCE.flip(0), "values": VALUES, "sorter": ints(3, 2, 1, 0)},
        lambda s, v, _: np.array([[1, 0, 4], [3, 3, 0]]),
    ),
    Case(
        "SearchSorted",
        {"sorted_sequence": ints([1, 3], [2, 6]), "values": ints([2], [6])},
        lambda s, v: np.array([[1], [1]]),
        dtypes=(F32,),
    ),
]

REFUSED: list[Refusal] = [
    ("TopKV2", {"x": X, "k": ints(6)}, {}, "k=6 of dim 2"),
    ("TopKV2", {"x": X, "k": ints(2)}, {"sort_policy": 0}, "no semantics for sort_policy=0"),
    ("Sort", {"x": X > 0}, {}, "no semantics for operands of torch.bool"),
    ("ArgMaxV2", {"x": X, "dimension": ints(3)}, {}, "axis 3 of a tensor with 3 dims"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)
