"""Ops that write elements, against loops over numpy arrays."""

from __future__ import annotations

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

from rolemesh.runtime.ge.ops.scatter import OPS

X = reals(4, 5, 3)
PAIRS = ints([0, 4], [3, 1])
TWICE = ints([2, 1], [0, 0], [2, 1])
ROWS = ints([0, 2, 1], [3, 1, 0])
CACHE = reals(3, 2, 8, 4)
NEW = reals(3, 2, 2, 4, seed=1)
WHOLE = torch.arange(20, dtype=I32).reshape(4, 5)


def _put(x: np.ndarray, at: np.ndarray, updates: np.ndarray, add: bool = False) -> np.ndarray:
    result = x.copy()
    for place, update in zip(
        at.reshape(-1, at.shape[-1]), updates.reshape(-1, *x.shape[at.shape[-1] :]), strict=True
    ):
        result[tuple(place)] = result[tuple(place)] * add + update
    return result


def _added(x: np.ndarray, at: np.ndarray, updates: np.ndarray) -> np.ndarray:
    return _put(x, at, updates, add=True)


def _elements(reduction: str, axis: int):
    def expect(data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
        result = data.copy()
        for place in np.ndindex(indices.shape):
            target = list(place)
            target[axis] = indices[place]
            old, new = result[tuple(target)], updates[place]
            result[tuple(target)] = {"none": new, "add": old + new, "mul": old * new}[reduction]
        return result

    return expect


def _blocks(entries: list[int], starts: list[int], axis: int):
    def expect(var: np.ndarray, _: np.ndarray, updates: np.ndarray) -> np.ndarray:
        result = var.copy()
        for block, entry, start in zip(updates, entries, starts, strict=True):
            for offset in range(updates.shape[axis]):
                at = [slice(None)] * 3
                at[axis - 1] = start + offset
                source = [slice(None)] * 3
                source[axis - 1] = offset
                result[entry][tuple(at)] = block[tuple(source)]
        return result

    return expect


def _listed(var: list[np.ndarray], _: np.ndarray, updates: np.ndarray, mask: np.ndarray) -> tuple:
    results = [x.copy() for x in var]
    results[0][:, 5:7] = updates[0]
    results[2][:, 1:3] = updates[2]
    assert mask.tolist() == [1, 0, 1]
    return tuple(results)


def _index_add(axis: int, factor: float):
    def expect(var: np.ndarray, indices: np.ndarray, updates: np.ndarray, *_: object) -> np.ndarray:
        result = np.moveaxis(var.copy(), axis, 0)
        for index, update in zip(indices, np.moveaxis(updates, axis, 0), strict=True):
            result[index] += factor * update
        return np.moveaxis(result, 0, axis)

    return expect


def _placed(x: np.ndarray, value: np.ndarray, *rest: object) -> np.ndarray:
    result = x.copy()
    rows, columns = rest[2]
    for i, place in enumerate(np.ndindex(rows.shape)):
        result[rows[place], :, columns[place]] = value.reshape(6, 5)[i]
    return result


def _summed(x: np.ndarray, value: np.ndarray, *rest: object) -> np.ndarray:
    result = x.copy()
    for row, new in zip(rest[2][0], value, strict=True):
        result[row] += new
    return result


CASES = [
    Case(
        "ScatterElements",
        {"data": X[0], "indices": ROWS, "updates": reals(2, 3)},
        _elements("none", 0),
    ),
    Case(
        "ScatterElements",
        {"data": X[:, :, 0], "indices": ROWS.int(), "updates": reals(2, 3)},
        _elements("none", 1),
        {"axis": -1},
    ),
    Case(
        "ScatterElements",
        {"data": X[0], "indices": ints([1, 1, 0], [1, 2, 0]), "updates": reals(2, 3)},
        _elements("add", 0),
        {"reduction": "add"},
        dtypes=(F32,),
    ),
    Case(
        "ScatterElements",
        {"data": X[0], "indices": ints([1, 1, 0], [1, 2, 0]), "updates": reals(2, 3)},
        _elements("mul", 0),
        {"reduction": "mul"},
        dtypes=(F32,),
    ),
    Case(
        "ScatterElements",
        {"data": WHOLE, "indices": ints([[4, 0]]), "updates": ints([[-1, -2]], dtype=I32)},
        _elements("none", 1),
        {"axis": 1},
        dtypes=(I32,),
    ),
    Case("ScatterNdUpdate", {"var": X, "indices": PAIRS, "updates": reals(2, 3)}, _put),
    Case(
        "ScatterNdUpdate",
        {"var": X, "indices": ints([[3], [1]], dtype=I32), "updates": reals(2, 5, 3)},
        _put,
    ),
    Case(
        "ScatterNdUpdate",
        {"var": WHOLE, "indices": ints([[0, 4], [1, 1]]), "updates": ints(-5, -6, dtype=I32)},
        _put,
        dtypes=(I32,),
    ),
    Case(
        "ScatterNdAdd",
        {"var": X, "indices": TWICE, "updates": reals(3, 3)},
        _added,
        dtypes=(F32,),
    ),
    Case("TensorScatterUpdate", {"x": X, "indices": PAIRS, "updates": reals(2, 3)}, _put),
    Case(
        "TensorScatterAdd",
        {"x": X, "indices": TWICE, "updates": reals(3, 3)},
        _added,
        dtypes=(F32,),
    ),
    Case(
        "ScatterNd",
        {"indices": TWICE, "x": reals(3, 3), "shape": ints(4, 5, 3)},
        lambda at, x, shape: _added(np.zeros(shape), at, x),
        dtypes=(F32,),
    ),
    Case(
        "ScatterUpdate",
        {"var": X, "indices": ints(3, 1), "updates": reals(2, 5, 3)},
        lambda x, i, new: _put(x, i[:, None], new),
    ),
    Case(
        "ScatterAdd",
        {"var": X, "indices": ints(1, 3, 1), "updates": reals(3, 5, 3)},
        lambda x, i, new: _added(x, i[:, None], new),
        dtypes=(F32,),
    ),
    Case(
        "IndexPutV2",
        {
            "x": X,
            "value": reals(2, 3, 5),
            "indexed_sizes": ints(1, 0, 1),
            "indexed_strides": ints(4, 5, 3),
            "indices": [ROWS, ints([0, 1, 2], [1, 2, 0])],
        },
        _placed,
        dtypes=(F32, BF16),
    ),
    Case(
        "IndexPutV2",
        {
            "x": X,
            "value": reals(3, 5, 3),
            "indexed_sizes": ints([1]),
            "indexed_strides": ints(4, 5, 3),
            "indices": [ints(2, 0, 2)],
        },
        _summed,
        {"accumulate": True},
        dtypes=(F32,),
    ),
    Case(
        "InplaceIndexAdd",
        {"var": X, "indices": ints(1, 1, 3), "updates": reals(3, 5, 3)},
        _index_add(0, 1),
        {"axis": 0},
        dtypes=(F32,),
    ),
    Case(
        "InplaceIndexAdd",
        {
            "var": X,
            "indices": ints(4, 0, dtype=I32),
            "updates": reals(4, 2, 3),
            "alpha": torch.tensor([2.0]),
        },
        _index_add(1, 2),
        {"axis": 1},
        loose=2,
    ),
    Case(
        "Scatter",
        {"var": CACHE, "indices": ints(6, 0, 3), "updates": NEW},
        _blocks([0, 1, 2], [6, 0, 3], 2),
        {"reduce": "update", "axis": -2},
    ),
    Case(
        "Scatter",
        {"var": CACHE, "indices": ints([2, 5], [0, 1]), "updates": NEW[:2]},
        _blocks([2, 0], [5, 1], 2),
        {"reduce": "update", "axis": 2},
    ),
    Case(
        "Scatter",
        {"var": CACHE, "indices": ints(1, 0, 2, dtype=I32), "updates": reals(3, 2, 8, 2)},
        _blocks([0, 1, 2], [1, 0, 2], 3),
        {"reduce": "update", "axis": -1},
    ),
    Case(
        "ScatterList",
        {
            "var": list(CACHE),
            "indice": ints(5, 0, 1),
            "updates": NEW,
            "mask": ints(1, 0, 1, dtype=torch.uint8),
        },
        _listed,
    ),
    Case(
        "MaskedScatter",
        {"x": X[0], "mask": torch.tensor([True, False, True]), "updates": reals(4, 3)},
        lambda x, m, new: np.stack([new.reshape(-1)[0:10:2], x[:, 1], new.reshape(-1)[1:10:2]], 1),
    ),
]

REFUSED: list[Refusal] = [
    (
        "ScatterElements",
        {"data": X[0], "indices": ROWS, "updates": reals(4, 3)},
        {},
        r"\[4, 3\] updates at \[2, 3\] indices",
    ),
    (
        "ScatterElements",
        {"data": X[0], "indices": ROWS, "updates": reals(2, 3)},
        {"reduction": "max"},
        "no semantics for reduction='max'",
    ),
    (
        "ScatterNdUpdate",
        {"var": X, "indices": -PAIRS, "updates": reals(2, 3)},
        {},
        "without negative_index_support",
    ),
    (
        "ScatterNdUpdate",
        {"var": X, "indices": PAIRS + 1, "updates": reals(2, 3)},
        {},
        "of a dim of size",
    ),
    ("ScatterNdUpdate", {"var": X, "indices": PAIRS, "updates": reals(3)}, {}, r"not \[2, 3\]"),
    (
        "InplaceIndexAdd",
        {"var": X, "indices": ints([0]), "updates": X[:1]},
        {"axis": -1},
        "a negative axis",
    ),
    (
        "Scatter",
        {"var": CACHE, "indices": ints(0, 0, 0), "updates": NEW},
        {"reduce": "add", "axis": 2},
        "reduce='add'",
    ),
    (
        "Scatter",
        {"var": CACHE, "indices": ints(0, 0), "updates": NEW},
        {"reduce": "update"},
        "along",
    ),
    (
        "Scatter",
        {"var": CACHE, "indices": ints(0, -1, 0), "updates": NEW},
        {"reduce": "update", "axis": 2},
        "a negative index -1",
    ),
    (
        "Scatter",
        {"var": CACHE, "indices": ints([0, 1], [-1, 1], [2, 1]), "updates": NEW},
        {"reduce": "update", "axis": 2},
        "a negative entry -1",
    ),
    (
        "ScatterList",
        {"var": list(CACHE), "indice": ints([0, 2], [0, 2], [0, 2]), "updates": NEW},
        {},
        "3 tensors, indices",
    ),
    (
        "MaskedScatter",
        {"x": X[0], "mask": torch.ones(5, 3, dtype=torch.bool), "updates": reals(2)},
        {},
        "2 updates for more places",
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


def test_ref_ops_write_to_their_input() -> None:
    written = {kind: dict(op.writes) for kind, op in OPS.ops.items() if op.writes}
    assert written == {
        "IndexPutV2": {0: "x"},
        "InplaceIndexAdd": {0: "var"},
        "Scatter": {0: "var"},
        "ScatterAdd": {0: "var"},
        "ScatterList": {0: "var"},
        "ScatterNdAdd": {0: "var"},
        "ScatterNdUpdate": {0: "var"},
        "ScatterUpdate": {0: "var"},
    }
    var = torch.zeros(4, 5, 3, dtype=BF16)
    updates = reals(2, 3).bfloat16()
    call(OPS, "ScatterNdUpdate", {"var": var, "indices": PAIRS, "updates": updates}, {})
    assert torch.equal(var[0, 4], updates[0])
    assert torch.equal(var[3, 1], updates[1])
