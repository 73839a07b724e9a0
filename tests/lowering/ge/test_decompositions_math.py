"""Element-wise functions, reductions, scans and solves equal eager, at their edges too."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
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
    final_ops,
    parametrize,
    parametrize_dynamic,
    tensor,
)
from torch import Tensor
from torch.nn import functional

from rolemesh.compiler.ir.errors import RolemeshError

aten = torch.ops.aten

INF, NAN = math.inf, math.nan
EDGES = torch.tensor([0.0, -0.0, 1.5, -1.5, INF, -INF, NAN, 1e-3])


def edges(function: Callable[[Tensor], Tensor]) -> Case:
    """One operand of special values."""
    return Case(lambda _, x: function(x), "", ONE, False, (EDGES,))


def pairs(function: Callable[[Tensor, Tensor], Tensor]) -> Case:
    """Each special value with each."""
    every = (EDGES.repeat(8), EDGES.repeat_interleave(8))
    return Case(lambda _, x, y: function(x, y), "", ONE, False, every)


ELEMENTWISE = {
    "exp2": Case(torch.exp2, "3 n", HALF, dynamic=True),
    "fmod": Case(torch.fmod, "3 n; n", (*HALF, torch.int64), dynamic=True),
    "fmod_number": Case(lambda x: torch.fmod(x, 0.75), "3 n"),
    "softplus": Case(functional.softplus, "3 n", HALF, dynamic=True),
    "softplus_steep": Case(lambda x: functional.softplus(x, 3, 1), "3 n"),
    "atan2": Case(torch.atan2, "3 n; n", FLOATS, dynamic=True),
    "atan2_integers": Case(torch.atan2, "3 n; n", INTS),
    "copysign": Case(torch.copysign, "3 n; n", FLOATS, dynamic=True),
    "erfc": Case(torch.erfc, "3 n", FLOATS, dynamic=True),
    "trunc": Case(lambda x: (x * 3).trunc(), "3 n", FLOATS, dynamic=True),
    "frac": Case(lambda x: (x * 3).frac(), "3 n", ONE),
    "round_decimals": Case(lambda x: x.round(decimals=2), "3 n", ONE),
    "logical_xor": Case(torch.logical_xor, "3 n; n", (*ONE, *BOOL), dynamic=True),
    "bitwise_xor": Case(torch.bitwise_xor, "3 n; n", (*INTS, *BOOL), dynamic=True),
    "shift_left": Case(lambda x: x << 3, "3 n", INTS),
    "shift_right": Case(lambda x: x >> 1, "3 n", INTS),
    "fmax": Case(torch.fmax, "3 n; n", FLOATS),
    "isnan": Case(lambda x: x.log().isnan(), "3 n", FLOATS, dynamic=True),
    "logaddexp": Case(torch.logaddexp, "3 n; n", FLOATS, dynamic=True),
    "polar": Case(torch.polar, "3 n; 3 n", ONE),
    "complex_product": Case(
        lambda x, y: torch.view_as_real(torch.complex(x, y) * torch.polar(x, y)), "3 n; 3 n", ONE
    ),
    "nan_to_num": Case(lambda x: x.log().nan_to_num(), "3 n", FLOATS, dynamic=True),
    "nan_to_num_given": Case(lambda x: x.log().nan_to_num(2, 3, -4), "3 n", ONE),
    "edges_isnan": edges(torch.isnan),
    "edges_isinf": edges(torch.isinf),
    "edges_isfinite": edges(torch.isfinite),
    "edges_signbit": edges(lambda x: x[:6].signbit()),
    "edges_trunc": edges(torch.trunc),
    "edges_exp2": edges(torch.exp2),
    "edges_softplus": edges(functional.softplus),
    "edges_nan_to_num": edges(torch.nan_to_num),
    "edges_atan2": pairs(torch.atan2),
    "edges_fmod": pairs(torch.fmod),
    "edges_fmax": pairs(torch.fmax),
    "edges_fmin": pairs(torch.fmin),
    "edges_copysign": pairs(lambda x, y: torch.copysign(x, torch.where(y.isnan(), 1, y))),
    "edges_logaddexp": pairs(torch.logaddexp),
}


@parametrize(ELEMENTWISE)
def test_elementwise(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(ELEMENTWISE)
def test_elementwise_dynamic(case: Case) -> None:
    check_dynamic(case)


REDUCTIONS = {
    "var_mean": Case(lambda x: torch.var_mean(x, 1), "3 n 2", HALF, dynamic=True),
    "var": Case(lambda x: x.var((0, -1), correction=0, keepdim=True), "3 n 2", HALF),
    "var_all": Case(torch.var, "3 n", ONE),
    "var_of_one": Case(lambda x: x.var(1), "3 1", ONE),
    "var_fraction": Case(lambda x: x.var(1, correction=0.5), "3 n", ONE),
    "std": Case(lambda x: x.std(1), "3 n 2", HALF, dynamic=True),
    "std_fraction": Case(lambda x: x.std(1, correction=0.5), "3 n", ONE),
    "std_mean": Case(lambda x: torch.std_mean(x, (0, 2)), "3 n 2", ONE),
    "prod": Case(lambda x: x.prod(1), "3 n", (*FLOATS, *INTS), dynamic=True),
    "prod_bool": Case(lambda x: x.prod(1, True), "3 4", BOOL),
    "prod_all": Case(torch.prod, "3 4", (*ONE, *INTS)),
    "prod_dtype": Case(lambda x: x.prod(0, dtype=torch.float32), "3 n", INTS),
    "prod_scalar": Case(torch.prod, "", (*ONE, *INTS)),
    "prod_empty": Case(lambda x: x.prod(1), "3 0", ONE),
    "count_nonzero": Case(lambda x: torch.count_nonzero(x, 1), "3 n", (*FLOATS, *INTS)),
    "any_dims": Case(lambda x: (x > 1).any((0, 2)), "3 n 2", ONE, dynamic=True),
    "logsumexp": Case(lambda x: x.logsumexp(1), "3 n", HALF, dynamic=True),
    "logsumexp_edges": Case(lambda x: (x - INF).logsumexp((0, 1), keepdim=True), "3 n", FLOATS),
    "safe_softmax": Case(
        lambda x: aten._safe_softmax.default(torch.where(x[:, :1] > 0, x, -INF), 1), "5 n", FLOATS
    ),
    "squeeze_dims": Case(lambda x: x.squeeze((0, 2, 3)) * 1, "1 n 1 2", FLOATS, dynamic=True),
    "squeeze_scalar": Case(lambda x: x.squeeze(0) * 1, "", ONE),
    "roll": Case(lambda x: x.roll((2, -1), (1, 0)), "3 n", (*FLOATS, *INTS), dynamic=True),
    "roll_flat": Case(lambda x: x.roll(-5), "3 n", ONE),
    "one_hot": Case(lambda x: functional.one_hot(x, 6), "6: 3 n", ONE),
    "layer_norm": Case(
        lambda x, w, b: functional.layer_norm(x, (8,), w, b), "3 n 8; 8; 8", HALF, dynamic=True
    ),
    "group_norm": Case(lambda x, w: functional.group_norm(x, 2, w), "3 4 n; 4", ONE),
    "batch_norm": Case(
        lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training.default(
            x, w, b, m, v.exp(), 0.1, 1e-5
        )[0],
        "3 4 n; 4; 4; 4; 4",
        ONE,
    ),
    "depthwise_convolution": Case(
        lambda x, w, b: functional.conv1d(x, w, b, padding=3, groups=4), "2 4 n; 4 1 4; 4", FLOATS
    ),
}


@pytest.mark.filterwarnings("ignore:(var|std).*degrees of freedom")
@parametrize(REDUCTIONS)
def test_reductions(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(REDUCTIONS)
def test_reductions_dynamic(case: Case) -> None:
    check_dynamic(case)


def solve(upper: bool, left: bool = True, unit: bool = False) -> Case:
    def function(a: Tensor, b: Tensor) -> Tensor:
        a = a + 4 * torch.eye(5, device=a.device)
        return torch.linalg.solve_triangular(a, b, upper=upper, left=left, unitriangular=unit)

    return Case(function, "2 5 5; 2 5 3" if left else "2 5 5; 2 3 5", ONE)


SCANS = {
    "cummax": Case(lambda x: torch.cummax(x, 1), "3 n", (*FLOATS, *INTS)),
    "cummax_ties": Case(lambda x: torch.cummax(x.round(), 0), "9 2", ONE),
    "cummax_nan": Case(lambda x: torch.cummax(x.log(), 1), "3 n", ONE),
    "cummax_scalar": Case(lambda x: torch.cummax(x, 0), "", ONE),
    "cummin": Case(lambda x: torch.cummin(x, -1), "3 1 n", (*FLOATS, *INTS)),
    "logcumsumexp": Case(lambda x: torch.logcumsumexp(x * 9, 1), "3 n", HALF),
    "logcumsumexp_edges": edges(lambda x: x[:6].flip(0).logcumsumexp(0)),
    "cumsum_bool": Case(lambda x: x.cumsum(1), "3 n", BOOL, dynamic=True),
    "cumsum_int32": Case(lambda x: x.cumsum(0), "3 n", (torch.int32,)),
    "cumprod": Case(lambda x: x.cumprod(1), "3 5", (*ONE, *INTS)),
    "solve_lower": solve(upper=False),
    "solve_upper": solve(upper=True),
    "solve_unit": solve(upper=False, unit=True),
    "solve_right": solve(upper=True, left=False),
    "solve_spread": Case(
        lambda a, b: torch.linalg.solve_triangular(a.exp(), b, upper=False),
        "3 3; 2 3 1",
        ONE,
    ),
}


@parametrize(SCANS)
def test_scans_and_solves(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(SCANS)
def test_scans_dynamic(case: Case) -> None:
    check_dynamic(case)


def test_only_the_range_check_of_one_hot_is_left_out() -> None:
    def function(x: Tensor) -> Tensor:
        torch.ops.aten._assert_async.msg(x.min() >= 0, "Class values must be non-negative.")
        return x * 2

    def other(x: Tensor) -> Tensor:
        torch.ops.aten._assert_async.msg(x.min() >= 0, "prices are positive")
        return x * 2

    x = tensor(torch.float32, 3).abs()
    assert all("assert" not in str(node.target) for node in final_ops(function, x))
    with pytest.raises(RolemeshError, match="RM026") as caught:
        final_ops(other, x)
    assert "aten._assert_async.msg" in caught.value.where
