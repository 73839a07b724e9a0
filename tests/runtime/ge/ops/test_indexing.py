"""Ops that pick elements, against numpy's indexing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F32,
    I32,
    Case,
    Given,
    Refusal,
    check,
    check_refused,
    each_dtype,
    each_refusal,
    ints,
    reals,
    types_of,
)

from rolemesh.runtime.ge.ops.indexing import OPS

X = reals(4, 5, 7)
PAIRS = ints([0, 4], [3, 1], [0, 0])
ROWS, COLUMNS = ints([0, 2, 2], [3, 1, 0]), ints(6, 0, 5)
WEIGHT = reals(6, 3)
ORDERED = torch.tensor([[1.0, -1.0, 1.0]]) * torch.arange(6.0)[:, None]
BAGS: dict[str, Given] = {
    "weight": WEIGHT,
    "indices": ints(4, 1, 5, 1, 0, 2, dtype=I32),
    "offsets": ints(0, 2, 2, dtype=I32),
}
SOME = (F32, BF16)


def _bags(reduce: Callable[..., np.ndarray], maxima: object):
    """The results for BAGS: bags of the first two indices, of none, and of the last four."""

    def expect(weight: np.ndarray, indices: np.ndarray, *rest: np.ndarray) -> tuple[object, ...]:
        rows = weight[indices] * (rest[1][:, None] if len(rest) > 1 else 1)
        y = np.stack([reduce(rows[:2]), np.zeros(3), reduce(rows[2:])])
        bags, sizes = np.int32([0, 0, 2, 2, 2, 2]), np.int32([2, 0, 4])
        return y, bags, sizes, np.array(maxima, dtype=np.int32)

    return expect


def _sum(rows: np.ndarray) -> np.ndarray:
    return rows.sum(0)


CASES = [
    Case("Gather", {"x": X, "indices": ROWS}, lambda x, i: x[i], dtypes=SOME),
    Case("Gather", {"x": ints(3, 5, 7), "indices": ints(2)}, lambda x, i: x[2], dtypes=(F32,)),
    Case(
        "Gather",
        {"x": X, "indices": ints(-1, 0, dtype=I32)},
        lambda x, i: x[i],
        {"negative_index_support": True},
    ),
    Case("GatherV2", {"x": X, "indices": ROWS, "axis": ints([1])}, lambda x, i, _: x[:, i]),
    Case("GatherV2", {"x": X, "indices": ints(2), "axis": ints(-1)}, lambda x, *_: x[..., 2]),
    Case(
        "GatherV2",
        {"x": X, "indices": ints(-7, 6), "axis": ints(2)},
        lambda x, i, _: x[..., i],
        {"negative_index_support": True},
    ),
    Case(
        "GatherV2",
        {"x": X, "indices": torch.zeros(0, 2, dtype=I32), "axis": ints(0)},
        lambda x, i, _: np.zeros((0, 2, 5, 7)),
    ),
    Case(
        "GatherElements",
        {"x": X[0], "index": ROWS},
        lambda x, i: np.array([[x[i[r, c], c] for c in range(3)] for r in range(2)]),
    ),
    Case(
        "GatherElements",
        {"x": X[0], "index": ROWS.int()},
        lambda x, i: np.take_along_axis(x[:2], i, 1),
        {"dim": -1},
    ),
    Case("GatherNd", {"x": X, "indices": PAIRS}, lambda x, i: x[i[:, 0], i[:, 1]]),
    Case("GatherNd", {"x": X, "indices": PAIRS[:, :1]}, lambda x, i: x[i[:, 0]]),
    Case(
        "GatherNd",
        {"x": X, "indices": -PAIRS - 1},
        lambda x, i: x[i[:, 0], i[:, 1]],
        {"negative_index_support": True},
    ),
    Case(
        "IndexByTensor",
        {"x": X, "indices": [ROWS]},
        lambda x, i: x[:, i[0]],
        {"indices_mask": [0, 1]},
        dtypes=SOME,
    ),
    # Index tensors that are apart put their dims first, those side by side leave them in place.
    Case(
        "IndexByTensor",
        {"x": X, "indices": [ROWS, COLUMNS]},
        lambda x, i: x[i[0], :, i[1]],
        {"indices_mask": [1, 0, 1]},
    ),
    Case(
        "IndexByTensor",
        {"x": X, "indices": [ROWS, COLUMNS]},
        lambda x, i: x[:, i[0], i[1]],
        {"indices_mask": [0, 1, 1]},
    ),
    Case(
        "IndexByTensor", {"x": X, "indices": [-ROWS]}, lambda x, i: x[i[0]], {"indices_mask": [1]}
    ),
    Case(
        "Index",
        {
            "x": X,
            "indexed_sizes": ints(1, 0, 1),
            "indexed_strides": ints(2, 5, 3),
            "indices": [ROWS, COLUMNS],
        },
        lambda x, sizes, strides, i: x[i[0], :, i[1]],
    ),
    Case(
        "OneHot",
        {
            "x": ints([0, 3], [4, -1]),
            "depth": ints(4, dtype=I32),
            "on_value": torch.tensor(2.5),
            "off_value": torch.tensor(-1.0),
        },
        lambda x, *_: np.where(x[..., None] == np.arange(4), 2.5, -1),
    ),
    Case(
        "OneHot",
        {"x": ints([0, 3], [4, 1]), "depth": ints(5), "on_value": ints(1), "off_value": ints(0)},
        lambda x, *_: (x[:, None] == np.arange(5)[:, None]).astype(np.int64),
        {"axis": 1},
    ),
    Case(
        "MaskedSelect", {"x": X, "mask": X[:, :1] > 0}, lambda x, m: x[np.broadcast_to(m, x.shape)]
    ),
    Case("EmbeddingBag", BAGS, _bags(lambda rows: rows.mean(0), [])),
    Case("EmbeddingBag", BAGS, _bags(_sum, []), {"mode": "sum"}),
    Case(
        "EmbeddingBag",
        {**BAGS, "offsets": ints(0, 2, 2, 6, dtype=I32)},
        _bags(_sum, []),
        {"mode": "sum", "include_last_offset": True},
    ),
    Case(
        "EmbeddingBag",
        {**BAGS, "per_sample_weights": reals(6, seed=2)},
        _bags(_sum, []),
        {"mode": "sum"},
        dtypes=(F32,),
    ),
    Case(
        "EmbeddingBag",
        {**BAGS, "weight": ORDERED},
        _bags(lambda rows: rows.max(0), [[4, 1, 4], [0, 0, 0], [5, 0, 5]]),
        {"mode": "max"},
    ),
]

REFUSED: list[Refusal] = [
    ("Gather", {"x": X, "indices": ints(-1)}, {}, "without negative_index_support"),
    ("Gather", {"x": X, "indices": ints(4)}, {}, "from 4 to 4 of a dim of size 4"),
    ("Gather", {"x": X, "indices": reals(2)}, {}, "no semantics for operands of torch.float32"),
    ("GatherV2", {"x": X, "indices": ROWS, "axis": ints(0)}, {"batch_dims": 1}, "batch_dims=1"),
    ("GatherV2", {"x": X, "indices": ROWS, "axis": ints(3)}, {}, "axis 3 of a tensor with 3 dims"),
    (
        "GatherV2",
        {"x": X, "indices": ints(-5), "axis": ints(0)},
        {"negative_index_support": True},
        "from -5 to -5 of a dim of size 4",
    ),
    ("GatherNd", {"x": X, "indices": -PAIRS}, {}, "without negative_index_support"),
    ("GatherNd", {"x": X[0, 0], "indices": PAIRS}, {}, "of a shape"),
    ("IndexByTensor", {"x": X, "indices": [ROWS]}, {"indices_mask": [1, 1]}, "1 index tensors"),
    ("IndexByTensor", {"x": X, "indices": [ROWS.int()]}, {"indices_mask": [1]}, "torch.int32"),
    ("MaskedSelect", {"x": X, "mask": ROWS}, {}, "no semantics for operands of torch.int64"),
    ("EmbeddingBag", BAGS, {"mode": "min"}, "no semantics for mode='min'"),
    ("EmbeddingBag", BAGS, {"sparse": True}, "no semantics for sparse=True"),
    ("EmbeddingBag", {"weight": WEIGHT, "indices": ROWS}, {}, "bags without offsets"),
    ("EmbeddingBag", BAGS, {"padding_idx": 2}, "no semantics for padding_idx=2"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)
