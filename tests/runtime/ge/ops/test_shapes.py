"""Reshapes, transposes, repeats and joins against numpy."""

from __future__ import annotations

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

from rolemesh.runtime.ge.ops.shapes import OPS

X = reals(2, 3, 5)
Y = reals(2, 4, 5, seed=1)
ONES = reals(1, 3, 1, 5, 1)
EMPTY = torch.zeros(0, 4)
SOME = (F32, BF16)


def _shaped(*shape: int):
    return lambda x, *_: x.reshape(shape)


CASES = [
    Case("Reshape", {"x": X, "shape": ints(6, 5)}, _shaped(6, 5), dtypes=SOME),
    Case("Reshape", {"x": X, "shape": ints(0, -1)}, _shaped(2, 15)),
    Case("Reshape", {"x": X, "shape": ints(-1, 0, 1, dtype=I32)}, _shaped(10, 3, 1)),
    Case("Reshape", {"x": EMPTY, "shape": ints(4, 0)}, _shaped(4, 0)),
    Case("Reshape", {"x": X[:1, :1, :1], "shape": torch.zeros(0, dtype=I64)}, _shaped()),
    Case("Flatten", {"x": X}, _shaped(2, 15)),
    Case("Flatten", {"x": X}, _shaped(6, 5), {"axis": -1}),
    Case("Flatten", {"x": X}, _shaped(1, 30), {"axis": 0}),
    Case("FlattenV2", {"x": X}, _shaped(2, 15)),
    Case("FlattenV2", {"x": X}, _shaped(6, 5), {"axis": 0, "end_axis": 1}),
    Case("Squeeze", {"x": ONES}, _shaped(3, 5)),
    Case("Squeeze", {"x": ONES}, _shaped(3, 1, 5), {"axis": [0, -1]}),
    Case("Unsqueeze", {"x": X}, _shaped(1, 2, 3, 5, 1), {"axes": [0, -1]}),
    Case("Unsqueeze", {"x": X}, _shaped(2, 1, 1, 3, 5), {"axes": [2, 1]}),
    Case("ExpandDims", {"x": X, "axis": ints(1)}, _shaped(2, 1, 3, 5)),
    Case("ExpandDims", {"x": X, "axis": ints([-1], dtype=I32)}, _shaped(2, 3, 5, 1)),
    Case("Transpose", {"x": X, "perm": ints(2, 0, 1)}, lambda x, _: np.transpose(x, (2, 0, 1))),
    Case("Transpose", {"x": X, "perm": ints(0, 1, 2)}, lambda x, _: x),
    Case("TransposeD", {"x": X}, lambda x: np.transpose(x, (1, 2, 0)), {"perm": [1, 2, 0]}),
    Case("Permute", {"x": X}, lambda x: np.transpose(x, (1, 0, 2)), {"order": [1, 0, 2]}),
    Case(
        "BroadcastTo",
        {"x": X[:, :1], "shape": ints(4, -1, 3, 5)},
        lambda x, _: np.broadcast_to(x, (4, 2, 3, 5)),
        dtypes=SOME,
    ),
    Case("BroadcastTo", {"x": X, "shape": ints(2, 3, 5)}, lambda x, _: x),
    Case(
        "BroadcastToD", {"x": X[:1]}, lambda x: np.broadcast_to(x, (7, 3, 5)), {"shape": [7, 3, -1]}
    ),
    Case(
        "Expand",
        {"x": X[:, :1], "shape": ints(4, 1, 3, 1)},
        lambda x, _: np.broadcast_to(x, (4, 2, 3, 5)),
    ),
    Case("Tile", {"x": X, "multiples": ints(2, 1, 3)}, lambda x, _: np.tile(x, (2, 1, 3))),
    Case("Tile", {"x": X, "multiples": ints(2, 1, 1, 1)}, lambda x, _: np.tile(x, (2, 1, 1, 1))),
    Case("TileD", {"x": X}, lambda x: np.tile(x, (1, 2, 1)), {"multiples": [1, 2, 1]}),
    Case("ReverseV2", {"x": X, "axis": ints(0, -1)}, lambda x, _: x[::-1, :, ::-1]),
    Case(
        "Roll",
        {"x": X},
        lambda x: np.roll(x, (1, -2), (0, 2)),
        {"shifts": [1, -2], "dims": [0, 2]},
    ),
    Case("Roll", {"x": X}, lambda x: np.roll(x, 4), {"shifts": [4]}),
    Case(
        "RollV2",
        {"input": X, "shift": ints([2]), "axes": ints([-1])},
        lambda x, *_: np.roll(x, 2, -1),
    ),
    Case(
        "ConcatV2",
        {"x": [X, Y, X], "concat_dim": ints(-2)},
        lambda x, _: np.concatenate(x, 1),
        {"N": 3},
        dtypes=SOME,
    ),
    Case("ConcatV2", {"x": [X], "concat_dim": ints([0])}, lambda x, _: x[0]),
    Case("Concat", {"concat_dim": ints(1), "x": [X, Y]}, lambda _, x: np.concatenate(x, 1)),
    Case("ConcatD", {"x": [X, Y]}, lambda x: np.concatenate(x, 1), {"concat_dim": 1, "N": 2}),
    Case("ConcatV2D", {"x": [X, Y]}, lambda x: np.concatenate(x, 1), {"concat_dim": -2}),
    Case("Pack", {"x": [X, X + 1]}, lambda x: np.stack(x, 3), {"axis": -1, "N": 2}),
    Case(
        "Pack",
        {"x": [ints(3, dtype=I32), ints(4), ints(5, dtype=I32)]},
        lambda x: np.array([3, 4, 5]),
        {"N": 3},
        dtypes=(F32,),
    ),
    Case("Unpack", {"x": X}, lambda x: (x[:, 0], x[:, 1], x[:, 2]), {"axis": -2, "num": 3}),
    Case("Unpack", {"x": X}, lambda x: (x[0], x[1]), {"num": 2}),
    Case(
        "Split",
        {"split_dim": ints(1), "x": Y},
        lambda _, x: (x[:, :2], x[:, 2:]),
        {"num_split": 2},
    ),
    Case("SplitD", {"x": Y}, lambda x: (x[:, :2], x[:, 2:]), {"split_dim": 1, "num_split": 2}),
    Case(
        "SplitV",
        {"x": X, "size_splits": ints(1, -1, 2), "split_dim": ints(2, dtype=I32)},
        lambda x, *_: (x[..., :1], x[..., 1:3], x[..., 3:]),
        {"num_split": 3},
        dtypes=SOME,
    ),
    Case(
        "SplitVD",
        {"x": X},
        lambda x: (x[:, :1], x[:, 1:]),
        {"size_splits": [1, 2], "split_dim": -2, "num_split": 2},
    ),
    Case("Shape", {"x": X}, lambda x: np.array([2, 3, 5], np.int32)),
    Case("Shape", {"x": X}, lambda x: np.array([2, 3, 5]), {"dtype": 9}),
    Case("Shape", {"x": torch.tensor(1.0)}, lambda x: np.array([], np.int32)),
    Case(
        "ShapeN",
        {"x": [X, Y]},
        lambda x: (np.array([2, 3, 5]), np.array([2, 4, 5])),
        {"dtype": 9},
    ),
    Case("Rank", {"x": X}, lambda x: np.int32(3)),
    Case("Size", {"x": X}, lambda x: np.int32(30)),
    Case("Size", {"x": X}, lambda x: np.int64(30), {"dtype": 9}),
]

REFUSED: list[Refusal] = [
    ("Reshape", {"x": X, "shape": ints(6, 5)}, {"axis": 1}, "no semantics for axis=1"),
    ("Reshape", {"x": X, "shape": ints(6, 5, 1, 0)}, {}, "copies a dim that x lacks"),
    ("Flatten", {"x": X}, {"axis": 4}, "axis 4 of a tensor with 3 dims"),
    ("Squeeze", {"x": X}, {"axis": [1]}, "dim 1 has size 3, not 1"),
    ("Unsqueeze", {"x": X}, {"axes": [0, -5]}, "repeat"),
    ("ExpandDims", {"x": X, "axis": ints(4)}, {}, "axis 4 of a tensor with 4 dims"),
    ("BroadcastTo", {"x": X, "shape": ints(-1, 2, 3, 5)}, {}, "to"),
    ("BroadcastTo", {"x": X, "shape": ints(3, 5)}, {}, "to"),
    ("Tile", {"x": X, "multiples": ints(2, 2)}, {}, "2 multiples for 3 dims"),
    ("TileD", {"x": X}, {"multiples": [2]}, "1 multiples for 3 dims"),
    ("Roll", {"x": X}, {"shifts": [1, 2], "dims": [0]}, "2 shifts for 1 axes"),
    ("ConcatV2", {"x": [X, Y], "concat_dim": ints(1)}, {"N": 3}, "N is 3, but 2 tensors"),
    ("ConcatV2", {"x": [X, X[0]], "concat_dim": ints(0)}, {}, "ranks"),
    ("Pack", {"x": [X, X.bfloat16()]}, {}, "differ"),
    ("Unpack", {"x": X}, {"axis": 1, "num": 2}, "has 3 slices, not 2"),
    ("Split", {"split_dim": ints(1), "x": X}, {"num_split": 2}, "no 2 equal parts"),
    (
        "SplitV",
        {"x": X, "size_splits": ints(1, 1), "split_dim": ints(1)},
        {"num_split": 2},
        "of size 3 into",
    ),
    ("SplitVD", {"x": X}, {"size_splits": [3], "split_dim": 1, "num_split": 2}, "1 sizes for 2"),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)


def test_only_ops_that_rename_dims_are_views() -> None:
    assert {kind for kind, op in OPS.ops.items() if op.view} == {
        "ExpandDims",
        "Flatten",
        "FlattenV2",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
    }


def test_a_size_of_zero_copies_the_dim_and_broadcasting_keeps_it() -> None:
    (reshaped,) = call(OPS, "Reshape", {"x": X, "shape": ints(2, 0, 5)}, {})
    (broadcast,) = call(OPS, "BroadcastTo", {"x": X, "shape": ints(-1, 3, -1)}, {})
    assert reshaped.shape == broadcast.shape == X.shape
