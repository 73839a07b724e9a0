"""What op functions demand of attributes, axes and dtypes."""

from __future__ import annotations

import pytest
import torch

from rolemesh.runtime.ge.ops.checks import FLOATS, copied, demand, normal_axis, only, wide
from rolemesh.runtime.ge.ops.table import Attributes

A = Attributes({"flag": True, "count": 3, "rate": 0.5, "mode": "edge"}, "Op 'name'")


def test_known_values_and_missing_attributes_pass() -> None:
    only(A, flag=True, count=3, rate=0.5, mode="edge", other=0)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"flag": False}, "flag=True, only for False"),
        ({"count": 2}, "count=3, only for 2"),
        ({"rate": 1.0}, "rate=0.5, only for 1.0"),
        ({"mode": "constant"}, "mode='edge', only for 'constant'"),
    ],
)
def test_other_values_are_refused(known: dict[str, bool | int | float | str], message: str) -> None:
    with pytest.raises(ValueError, match=f"Op 'name': no semantics for {message}"):
        only(A, **known)


def test_dtypes_are_refused() -> None:
    demand(A, FLOATS, torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="Op 'name': no semantics for operands of torch"):
        demand(A, FLOATS, torch.zeros(2), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(("axis", "rank", "found"), [(-1, 3, 2), (2, 3, 2), (0, 0, 0), (-1, 0, 0)])
def test_axes_are_counted_from_the_first_dim(axis: int, rank: int, found: int) -> None:
    assert normal_axis(A, axis, rank) == found


@pytest.mark.parametrize(("axis", "rank"), [(3, 3), (-4, 3), (1, 0)])
def test_axes_out_of_range_are_refused(axis: int, rank: int) -> None:
    with pytest.raises(ValueError, match=f"axis {axis} of a tensor with {rank} dims"):
        normal_axis(A, axis, rank)


def test_only_sixteen_bits_are_widened() -> None:
    for dtype, expected in [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.int32, torch.int32),
    ]:
        assert wide(torch.zeros(2, dtype=dtype)).dtype == expected


def test_a_copy_is_contiguous_and_new() -> None:
    x = torch.arange(6).reshape(2, 3).t()
    assert copied(x).is_contiguous()
    assert copied(x).data_ptr() != x.data_ptr()
    assert torch.equal(copied(x), x)
