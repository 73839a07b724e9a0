"""Placements: equality and text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Segment,
    Segmented,
    Shard,
    ceil_div,
    same_placement,
)

FOUR = Segment(4, 1, 0)


def test_texts_of_placements() -> None:
    placements = (REPLICATE, Partial("avg"), Owner(2), Shard(1, 1, 8), Shard(0, 2, 4))
    assert [str(p) for p in placements] == ["R", "+avg", "owner(2)", "S(1)", "S(0:2x)"]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (Shard(0, 1, 16), Shard(0, 1, 8), True),  # both are the first digit of radix 4
        (Shard(0, 1, 16), Shard(0, 2, 8), False),
        (Shard(0, 1, 16), Shard(1, 1, 16), False),
        (Shard(0, 1, 16), REPLICATE, False),
        (Partial(), Partial("max"), False),
        (Owner(1), Owner(2), False),
        (Owner(1), Owner(1), True),
        (Segmented(0, (Segment(12, 1, 12), FOUR)), Segmented(0, (Segment(12, 1, 4), FOUR)), True),
        (Segmented(0, (Segment(12, 1, 6), FOUR)), Segmented(0, (Segment(12, 1, 4), FOUR)), False),
        (Segmented(0, (Segment(16, 1, 8, 2),)), Segmented(0, (Segment(16, 1, 2, 2),)), True),
        (Segmented(0, (Segment(16, 1, 4, 2),)), Segmented(0, (Segment(16, 1, 4, 4),)), False),
    ],
)
def test_same_placement(first: Placement, second: Placement, same: bool) -> None:
    assert same_placement(first, second, (16, 16), 4) is same


@given(st.integers(0, 100), st.integers(1, 12))
def test_ceil_div(size: int, parts: int) -> None:
    assert (ceil_div(size, parts) - 1) * parts < size <= ceil_div(size, parts) * parts
