"""Delta debugging finds what a failure needs, and keeps its order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rolemesh.compiler.debug.bisect.shrink import shrink


@pytest.mark.parametrize("needed", [[], [0], [99], [13, 14], [3, 50, 97], [1, 2, 3, 5, 8, 13, 21]])
def test_only_what_is_needed_is_left(needed: list[int]) -> None:
    assert shrink(range(100), lambda some: set(needed) <= set(some)) == needed


def test_no_item_can_be_left_out_where_failures_have_several_causes() -> None:
    def fails(some: Sequence[int]) -> bool:
        return {2, 7} <= set(some) or {4, 5, 6} <= set(some)

    assert shrink(range(10), fails) in ([2, 7], [4, 5, 6])


def test_few_subsets_are_tried_where_few_items_matter() -> None:
    tried = 0

    def fails(some: Sequence[int]) -> bool:
        nonlocal tried
        tried += 1
        return 700 in some

    assert shrink(range(1000), fails) == [700]
    assert tried < 60
