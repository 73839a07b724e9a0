"""Operands of every dtype and shape that ATen takes give what eager gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from tests.lowering.ge.numerics import (
    BOOL,
    FLOATS,
    HALF,
    INTS,
    ONE,
    Case,
    check_dynamic,
    check_static,
    parametrize,
    parametrize_dynamic,
)
from torch import Tensor
from torch.nn import functional

from rolemesh.lowering.ge.decompositions import decomposition_table
from rolemesh.lowering.ge.loader import load_torchair

aten = torch.ops.aten

WHOLE = (*INTS, *BOOL)


def both(function: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """Truth values with truth values."""
    return Case(function, "3 n; n", BOOL)


CASES = {
    "floats_of_integers": Case(
        lambda x: [x.cos(), x.exp(), x.sigmoid(), x.erf(), x.tanh(), (x.abs() + 1).log()],
        "3 4",
        WHOLE[:1],
    ),
    "floats_of_truth_values": Case(lambda x: [x.sin(), x.expm1(), x.atan()], "3 4", BOOL),
    "rounding_of_integers": Case(lambda x: [x.ceil(), x.floor(), x.round()], "3 4", INTS),
    "isinf_of_integers": Case(lambda x: x.isinf(), "3 4", INTS),
    "sign_of_truth_values": Case(lambda x: x.sign(), "3 4", BOOL),
    "add": both(torch.add),
    "maximum": both(torch.maximum),
    "minimum": both(torch.minimum),
    "less": both(torch.lt),
    "greater_or_equal": both(torch.ge),
    "less_than_number": Case(lambda x: (x < 1) | (x <= 0.5), "3 4", BOOL),
    "add_mixed": Case(lambda x, y: x + y, "3 n; b: n", (*FLOATS, *INTS), dynamic=True),
    "compare_mixed": Case(lambda x, y: x > y, "3 n; b: n", (*ONE, *INTS)),
    "max": Case(lambda x: [x.max(), *x.max(1)], "3 4", (*FLOATS, *WHOLE)),
    "min": Case(lambda x: [x.min(), *x.min(0, True)], "3 4", (*FLOATS, *WHOLE)),
    "min_dynamic": Case(lambda x: x.min(1), "3 n", ONE, dynamic=True),
    "aminmax": Case(lambda x: torch.aminmax(x, dim=1), "3 n", (*FLOATS, *WHOLE), dynamic=True),
    "amax": Case(lambda x: x.amax((0, -1), True), "3 n 2", (*FLOATS, *WHOLE), dynamic=True),
    "amin_all": Case(lambda x: x.amin(), "3 n 2", (*ONE, *BOOL), dynamic=True),
    "amax_scalar": Case(lambda x: x.amax() * 1, "", (*ONE, *INTS)),
    "amax_nan": Case(lambda x: x.log().amax(1), "3 4", FLOATS),
    "sort": Case(lambda x: x.sort(0, descending=True), "n 3", ONE, dynamic=True),
    "sort_truth_values": Case(lambda x: x.sort(dim=0, stable=True), "7 3", BOOL),
    "sort_scalar": Case(lambda x: [*x.sort(), x.argsort()], "", ONE),
    "sort_stable": Case(
        lambda x: [*x.sort(dim=1, stable=True), *x.sort(dim=0, descending=True, stable=True)],
        "5: 9 n 2",
        INTS,
        dynamic=True,
    ),
    "sort_stable_floats": Case(lambda x: x.round().sort(stable=True), "3 40", FLOATS),
    "argsort_stable": Case(
        lambda x: torch.argsort(x.round(), stable=True, descending=True), "3 40", FLOATS
    ),
    "mm_of_integers": Case(lambda x, y: x @ y, "3 n; n 4", INTS, dynamic=True),
    "bmm_of_integers": Case(lambda x, y: x @ y, "2 3 n; 2 n 4", (torch.int32, torch.int64)),
    "addmm": Case(lambda b, x, y: torch.addmm(b, x, y, beta=2, alpha=3), "4; 3 n; n 4", FLOATS),
    "addmm_one": Case(torch.addmm, "1; 3 n; n 4", (torch.bfloat16,)),
    "addmm_of_integers": Case(
        lambda b, x, y: torch.addmm(b, x, y, beta=2, alpha=3), "3 4; 3 n; n 4", INTS
    ),
    "baddbmm": Case(
        lambda b, x, y: [torch.baddbmm(b, x, y), torch.baddbmm(b, x, y, beta=0.5, alpha=3)],
        "2 3 4; 2 3 n; 2 n 4",
        FLOATS,
        dynamic=True,
    ),
    "addbmm": Case(
        lambda b, x, y: torch.addbmm(b, x, y, beta=0.5, alpha=3), "3 4; 2 3 n; 2 n 4", ONE
    ),
    "addbmm_of_integers": Case(
        lambda b, x, y: torch.addbmm(b, x, y, beta=2), "3 4; 2 3 n; 2 n 4", INTS
    ),
    "pad": Case(lambda x: functional.pad(x, (1, 0, 0, 2)), "3 n", (*FLOATS, *WHOLE)),
    "pad_value": Case(lambda x: functional.pad(x, (1, 2), value=1), "3 n", (*FLOATS, *WHOLE)),
    "pad_cuts": Case(lambda x: functional.pad(x, (-1, 2, 1, -1)), "3 n", FLOATS),
    "replication_pad": Case(lambda x: functional.pad(x, (2, 1), mode="replicate"), "3 n", FLOATS),
    "average_pool": Case(
        lambda x: functional.avg_pool2d(x, 3, 2, 1), "1 2 8 9", (torch.float32, torch.float16)
    ),
    "cat_leaves_out": Case(lambda x, y, z: torch.cat([x, y, z], 1), "3 n; 0; 3 2", FLOATS),
    "memory_formats": Case(
        lambda x: [
            x.clone(memory_format=torch.channels_last) * 2,
            x.to(torch.float16, memory_format=torch.channels_last) * 2,
        ],
        "2 3 4 n",
        ONE,
    ),
    "empty_strided": Case(
        lambda x: torch.full_like(x.new_empty_strided((3, 4), (9, 2)), 2) * x, "3 4", ONE
    ),
    "gelu": Case(
        lambda x: [functional.gelu(x), functional.gelu(x, approximate="tanh")],
        "3 n",
        HALF,
        dynamic=True,
    ),
}


@parametrize(CASES)
def test_operands(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(CASES)
def test_operands_dynamic(case: Case) -> None:
    check_dynamic(case)


def permuted(x: Tensor) -> Tensor:
    """The product has the memory order of `x`, in which the result is a view of it."""
    return (x * 2).permute(0, 3, 1, 2).reshape(32, 5, 6) + 0


def test_a_view_of_permuted_memory_keeps_the_permute() -> None:
    """Torchair takes permutes of contiguous memory for granted."""
    x = torch.randn(2, 16, 5, 6).permute(0, 2, 3, 1)
    check_static(Case(lambda _, given: permuted(given), "", ONE, False, (x,)), torch.float32)


def test_softmax_of_16_bits_in_32() -> None:
    """Eager has this form on other devices only."""
    table = decomposition_table(load_torchair())
    x = torch.tensor([[0.5, -math.inf, 3.0]], dtype=torch.bfloat16)
    for op in (aten._softmax.default, aten._log_softmax.default):
        assert table[op](x, 1, False) is NotImplemented
        assert torch.equal(table[op](x, 1, True), op(x.float(), 1, False))
