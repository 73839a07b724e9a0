"""Reads and writes at indices: every form equals eager, for sizes and values at the edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from tests.lowering.ge.numerics import (
    FLOATS,
    HALF,
    INTS,
    ONE,
    Case,
    check_dynamic,
    check_static,
    final_ops,
    parametrize,
    parametrize_dynamic,
    tensor,
)
from torch import Tensor
from torch.nn import functional

from rolemesh.compiler.ir.errors import RolemeshError

aten = torch.ops.aten

ALL = (*HALF, torch.int64, torch.bool)

ROWS = torch.tensor([2, -1, 0])
TWICE = torch.tensor([2, 0, 2])
PAIRS = torch.tensor([[1], [-2], [3]])
COLUMNS = torch.tensor([0, 2])
EMPTY = torch.zeros(0, dtype=torch.int64)
ZERO = torch.tensor([0])
MASK = torch.tensor([True, False, True, False])
MASK_2D = torch.tensor([[True, False, True], [False] * 3, [True] * 3, [False, True, False]])


def put(
    form: str,
    indices: tuple[Tensor, ...],
    shapes: str,
    dtypes: Sequence[torch.dtype] = ONE,
    dynamic: bool = False,
    add: bool = False,
) -> Case:
    """`index_put` whose `form` has an i for each index and a dot for each dim without one."""

    def function(x: Tensor, values: Tensor, *given: Tensor) -> Tensor:
        rest = iter(given)
        places = [next(rest) if letter == "i" else None for letter in form]
        return aten.index_put.default(x, places, values, add)

    return Case(function, shapes, dtypes, dynamic, indices)


PUTS = {
    "rows": put("i", (ROWS,), "4 n; 3 n", ALL, dynamic=True),
    "one_value": put("i", (ROWS,), "4 n; 1", dynamic=True),
    "scalar_index": put("i", (torch.tensor(-2),), "4 n; n"),
    "second_dim": put(".i", (ROWS,), "n 4 2; n 3 2", dynamic=True),
    "last_dim": put("..i", (ROWS,), "2 n 4; 3", dynamic=True),
    "pairs": put("ii", (PAIRS, COLUMNS), "4 3 n; 3 2 n", ALL, dynamic=True),
    "pairs_behind": put(".ii", (PAIRS, COLUMNS), "n 4 3; 3 2", dynamic=True),
    "apart": put("i.i", (PAIRS, COLUMNS), "4 n 3; 3 2 n", dynamic=True),
    "apart_behind": put(".i.i", (PAIRS, COLUMNS), "2 4 n 3; 3 2 2 n"),
    "int32_index": put("i", (ROWS.int(),), "4 n; 3 n"),
    "no_rows": put("i", (EMPTY,), "4 n; 0 n"),
    "empty_tensor": put("i", (EMPTY,), "0 n; 0 n"),
    "size_one": put(".i", (ZERO,), "n 1; n 1"),
    "many_rows": Case(
        lambda x, v: aten.index_put.default(x, [torch.arange(v.shape[0], device=x.device)], v),
        "19 2; n 2",
        ONE,
        dynamic=True,
    ),
    "adds": put("i", (TWICE,), "4 n; 3 n", ALL, dynamic=True, add=True),
    "adds_pairs": put("ii", (PAIRS, ZERO.repeat(2)), "4 3 n; 3 2 1", dynamic=True, add=True),
    "mask": put("i", (MASK,), "4 n; n", ALL, dynamic=True),
    "mask_scalar": put(".i", (MASK,), "n 4 2; ", dynamic=True),
    "mask_one_row": put(".i", (MASK,), "3 4 n; 3 1 n", dynamic=True),
    "mask_each": put("i", (MASK,), "4 n; 2 n", dynamic=True),
    "mask_2d": put("i", (MASK_2D,), "4 3 n; 6 n", dynamic=True),
    "mask_2d_behind": put(".i", (MASK_2D,), "n 4 3; n 6"),
    "mask_none": put("i", (MASK & ~MASK,), "4 n; 0 n"),
    "mask_adds": put("i", (MASK,), "4 n; 2 n", ALL, add=True),
    "unsafe": Case(
        lambda x, v, i: aten._unsafe_index_put.default(x, [i], v), "4 n; 3 n", ONE, False, (ROWS,)
    ),
    "index_copy": Case(
        lambda x, v, i: x.index_copy(-2, i, v), "2 4 n; 2 3 n", FLOATS, True, (ROWS.remainder(4),)
    ),
    "index_fill": Case(lambda x, i: x.index_fill(1, i, 3), "n 4", FLOATS, True, (ROWS,)),
}


@parametrize(PUTS)
def test_put(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(PUTS)
def test_put_dynamic(case: Case) -> None:
    check_dynamic(case)


INDEX = torch.tensor([[0, 2, 0], [3, 3, 3]])


def reduce_into(
    how: str,
    own: bool = True,
    dim: int = 1,
    index: Tensor = INDEX,
    shapes: str = "3 n; 2 4",  # the index covers a part of the other dims of both
    dtypes: Sequence[torch.dtype] = ONE,
) -> Case:
    def function(x: Tensor, src: Tensor, places: Tensor) -> Tensor:
        return aten.scatter_reduce.two(x, dim, places, src, how, include_self=own)

    return Case(function, shapes, dtypes, False, (index,))


def index_reduce(how: str) -> Case:
    def function(x: Tensor, src: Tensor, places: Tensor) -> Tensor:
        return x.index_reduce(1, places, src, how, include_self=False)

    return Case(function, "2 n; 2 3", ONE, False, (TWICE,))


SCATTERS = {
    **{
        f"{how}_{'with' if own else 'without'}_self": reduce_into(how, own)
        for how in ("sum", "prod", "mean", "amax", "amin")
        for own in (True, False)
    },
    "every_dtype": reduce_into("amin", True, 0, INDEX.T, "n 3; 4 2", ALL[1:]),
    "int_mean": reduce_into("mean", dtypes=INTS),
    "int32_index": reduce_into("prod", index=INDEX.int()),
    "no_index": reduce_into("amax", True, 0, EMPTY, "n; 0"),
    "scalar": reduce_into("prod", True, 0, torch.tensor(0), " ; "),
    "nan": Case(
        lambda x, s, i: x.scatter_reduce(1, i, s.log(), "amax"), "2 n; 2 3", ONE, False, (INDEX,)
    ),
    "add": Case(
        lambda x, s, i: aten.scatter.reduce(x, 1, i, s, reduce="add"),
        "2 n; 2 3",
        ONE,
        False,
        (INDEX,),
    ),
    "multiply_value": Case(
        lambda x, i: aten.scatter.value_reduce(x, 1, i, 3, reduce="multiply"),
        "2 n",
        ONE,
        False,
        (INDEX,),
    ),
    **{f"index_reduce_{how}": index_reduce(how) for how in ("prod", "mean", "amax", "amin")},
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@parametrize(SCATTERS)
def test_scatter_reduce(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


def diagonal(offset: int) -> Case:
    return Case(lambda x: x.diagonal(offset, 2, 0) * 1, "3 n 4", ONE, dynamic=True)


def diagonal_scatter(offset: int, length: int) -> Case:
    return Case(
        lambda x, s: x.diagonal_scatter(s, offset, 2, 0), f"3 n 4; n {length}", ONE, dynamic=True
    )


def histc(*arguments: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.histc(x, *arguments)


REPEATS = torch.tensor([0, 3, 1, 0, 2])
EDGES = torch.tensor([0.0, 1.0, 3.0, 3.1, -0.1, 2.0, float("nan")])

OTHERS = {
    "masked_scatter": Case(
        lambda x, m, s: x.masked_scatter(m, s), "3 n; b: 3 n; 4 n", ALL, dynamic=True
    ),
    "masked_scatter_spread": Case(lambda x, m, s: x.masked_scatter(m, s), "3 n; b: n; 40", ONE),
    "masked_scatter_nothing": Case(
        lambda x, s, m: x.masked_scatter(m, s), "4; 0", ONE, False, (MASK & ~MASK,)
    ),
    "index": Case(lambda x, i: x[i], "4 n", ALL, True, (ROWS,)),
    "index_holes": Case(lambda x, i, j: x[:, i, :, j], "2 4 n 3", ONE, True, (PAIRS, COLUMNS)),
    "unsafe_index": Case(
        lambda x, i: aten._unsafe_index.Tensor(x, [i]),
        "4 n",
        (torch.bool, torch.uint8),
        False,
        (ROWS,),
    ),
    "index_select_scalar": Case(lambda x, i: x.index_select(0, i), "", ONE, False, (ZERO,)),
    "index_add_scalar": Case(
        lambda x, s, i: x.index_add(0, i, s, alpha=3), " ; ", ONE, False, (ZERO,)
    ),
    "embedding_padding": Case(
        lambda w, i: functional.embedding(i, w, padding_idx=0), "6 3; 6: 2 n", FLOATS, dynamic=True
    ),
    "embedding_flags": Case(
        lambda w, i: aten.embedding.default(w, i, -1, True, True), "6 3; 6: 2 n", ONE
    ),
    "repeat_interleave": Case(
        lambda _, r: torch.repeat_interleave(r, output_size=6) * 1, "", INTS, False, (REPEATS,)
    ),
    "repeat_interleave_rows": Case(
        lambda x, r: x.repeat_interleave(r, 0, output_size=6), "5 n", FLOATS, True, (REPEATS,)
    ),
    "repeat_interleave_number": Case(lambda x: x.repeat_interleave(3, 1), "2 n", dynamic=True),
    "bincount": Case(lambda x: x.bincount(minlength=6), "6: n", INTS, dynamic=True),
    "bincount_weights": Case(
        lambda x, w: x.bincount(w, 6), "6: n; n", (torch.float32, torch.int64)
    ),
    "histc": Case(histc(4, -1, 2), "3 n", FLOATS, dynamic=True),
    "histc_edges": Case(lambda _, x: torch.histc(x, 3, 0, 3), "", ONE, False, (EDGES,)),
    "histc_own_range": Case(histc(4), "n", FLOATS, dynamic=True),
    "histc_one_value": Case(lambda x: torch.histc(x * 0 + 2, 4), "n", ONE),
    "histc_point": Case(histc(4, 2, 2), "n", ONE),
    "histc_of_nothing": Case(histc(4), "0", ONE),
    **{f"diagonal_{offset}": diagonal(offset) for offset in (0, 1, -2, 9)},
    "diagonal_scatter_0": diagonal_scatter(0, 3),
    "diagonal_scatter_1": diagonal_scatter(1, 2),
    "diagonal_scatter_-2": diagonal_scatter(-2, 2),
    "select_scatter": Case(
        lambda x, s: x.select_scatter(s, 1, -2), "2 4 n; 2 n", FLOATS, dynamic=True
    ),
    "slice_scatter": Case(
        lambda x, s: x.slice_scatter(s, 1, 1, 6, 2), "n 6; n 3", FLOATS, dynamic=True
    ),
    "unfold": Case(lambda x: x.unfold(1, 3, 2) * 1, "2 8 n", FLOATS, dynamic=True),
    "unfold_dynamic": Case(lambda x: x.unfold(0, 3, 1) * 1, "n 2", ONE, dynamic=True),
    "unfold_scalar": Case(lambda x: x.unfold(0, 1, 1) * 1, "", ONE),
    "tril_indices": Case(lambda x: torch.tril_indices(3, 4, -1) + x, "", INTS),
    "triu_indices": Case(lambda x: torch.triu_indices(3, 4, 1) + x, "", INTS),
}


@parametrize(OTHERS)
def test_other_indexing(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(OTHERS)
def test_other_indexing_dynamic(case: Case) -> None:
    check_dynamic(case)


REFUSED: Mapping[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "mask_with_index": (
        lambda x, v, m, i: aten.index_put.default(x, [m, i], v),
        (tensor(torch.float32, 4, 3), tensor(torch.float32, 2), MASK, COLUMNS),
    ),
    "bincount": (lambda x: x.bincount(), (COLUMNS,)),
    "repeat_interleave": (torch.repeat_interleave, (REPEATS,)),
}


@pytest.mark.parametrize(("function", "inputs"), REFUSED.values(), ids=REFUSED.keys())
def test_what_depends_on_values_is_refused(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    with pytest.raises(RolemeshError, match="RM026") as caught:
        final_ops(function, *inputs)
    assert "model.py:12" in caught.value.where
