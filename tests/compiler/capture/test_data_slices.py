"""Slices of a known length whose bounds depend on data become reads; others are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.compiler.capture.backends import capturing
from torch import Tensor

from rolemesh.compiler.capture.entry import Captured, reference_executor
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.errors import RolemeshError

TABLE = torch.arange(22).view(2, 11)
X = torch.zeros(2, 3)


def at_a_tensor(x: Tensor, table: Tensor, n: Tensor) -> Tensor:
    return x + table[:, n : n + 3]


def at_a_sum(x: Tensor, table: Tensor, n: Tensor) -> Tensor:
    start = n.item() + 2
    return x + table[:, start : start + 3]


def up_to_a_tensor(x: Tensor, table: Tensor, n: Tensor) -> Tensor:
    return x + table[:, 4 : n + 7]


def of_rows(x: Tensor, table: Tensor, n: Tensor) -> Tensor:
    return x + table.t()[n : n + 3, 0]


def as_long_as_x(x: Tensor, table: Tensor, n: Tensor) -> Tensor:
    return x + table[:, n : n + x.shape[1]]


def to_the_end(x: Tensor, table: Tensor, n: Tensor) -> Tensor:
    return x + table[:, n:].sum()


@pytest.mark.parametrize(
    ("function", "starts"),
    [(at_a_tensor, (0, 1, 8)), (at_a_sum, (0, 6)), (up_to_a_tensor, (0,)), (of_rows, (0, 7))],
)
def test_values_are_those_of_the_slice(
    function: Callable[..., Tensor], starts: tuple[int, ...]
) -> None:
    traced = trace(function, X, TABLE, torch.tensor(starts[0]))
    ops = {str(node.target) for node in traced.program.ops}
    assert "aten.index.Tensor" in ops
    assert not ops & {"aten.slice.Tensor", "aten._local_scalar_dense.default"}
    for start in starts:
        n = torch.tensor(start)
        found = traced.entry.call(reference_executor, X, TABLE, n)
        assert torch.equal(found, function(X, TABLE, n))  # type: ignore[arg-type]


def test_a_position_behind_the_end_fails() -> None:
    traced = trace(at_a_tensor, X, TABLE, torch.tensor(0))
    with pytest.raises(IndexError, match=r"out of (range|bounds)"):
        traced.entry.call(reference_executor, X, TABLE, torch.tensor(9))


def test_a_symbolic_length_stays_symbolic() -> None:
    found: list[Captured] = []
    compiled = torch.compile(as_long_as_x, backend=capturing(found), fullgraph=True, dynamic=True)
    for length in (3, 5):
        x, n = torch.zeros(2, length), torch.tensor(4)
        assert torch.equal(compiled(x, TABLE, n), as_long_as_x(x, TABLE, n))
    assert len(found) == 1


def test_a_length_that_depends_on_data_is_refused() -> None:
    with pytest.raises(RolemeshError, match=r"^\[RM011\]"):
        trace(to_the_end, X, TABLE, torch.tensor(0))
