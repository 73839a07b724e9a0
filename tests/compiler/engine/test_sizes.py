"""Buckets and prefill sizes that are chosen when the user gives none, and how prompts are cut."""

from __future__ import annotations

import pytest

from rolemesh import RolemeshError
from rolemesh.compiler.engine.sizes import Sizes, decode_buckets, prefill_lengths


@pytest.mark.parametrize(
    ("slots", "unit", "expected"),
    [(8, 1, (1, 2, 4, 8)), (8, 2, (2, 4, 8)), (9, 4, (4, 8, 12)), (1, 4, (4,)), (3, 2, (2, 4))],
)
def test_buckets_reach_all_slots(slots: int, unit: int, expected: tuple[int, ...]) -> None:
    assert decode_buckets(None, slots, unit) == expected


def test_buckets_of_the_user_are_sorted() -> None:
    assert decode_buckets([6, 2], 9, 2) == (2, 6)


def test_powers_of_two_end_at_the_capacity_unless_chunks_are_exact() -> None:
    assert prefill_lengths(None, 40, exact=False) == (16, 32, 40)
    assert prefill_lengths(None, 7, exact=False) == (7,)
    assert prefill_lengths(None, 40, exact=True) == (1, 2, 4, 8, 16, 32)
    assert prefill_lengths([8, 4, 8], 40, exact=False) == (4, 8)


def test_exact_chunks_need_single_tokens() -> None:
    with pytest.raises(RolemeshError, match="1 is missing, and layers with states take no pads"):
        prefill_lengths([4], 40, exact=True)


def _chunks(sizes: Sizes, tokens: int) -> list[int]:
    found: list[int] = []
    while tokens:
        found.append(sizes.chunk(tokens, fresh=not found))
        tokens -= found[-1]
    return found


def test_prompts_are_cut_into_chunks() -> None:
    assert _chunks(Sizes((1,), (), 40, exact=False), 13) == [13]
    assert _chunks(Sizes((1,), (), 5, exact=False), 13) == [5, 5, 3]
    assert _chunks(Sizes((1,), (4, 8), 8, exact=False), 13) == [8, 5]
    exact = Sizes((1,), (1, 2, 4, 8), 8, exact=True)
    assert _chunks(exact, 13) == [8, 4, 1]
    assert _chunks(Sizes((1,), (1, 2, 4, 8), 2, exact=True), 5) == [2, 2, 1]
    assert _chunks(Sizes((1,), (1, 4), 4, exact=True, continues=False), 7) == [4, 1, 1, 1]


def test_calls_are_padded_to_the_next_size() -> None:
    sizes = Sizes((2, 6), (4, 8), 8, exact=False)
    assert [sizes.bucket(rows) for rows in (1, 2, 3, 6)] == [2, 2, 6, 6]
    assert [sizes.padded(tokens) for tokens in (1, 4, 5, 8)] == [4, 4, 8, 8]
    # torch makes a program of its own for one token, so that a symbolic size starts at two.
    assert [Sizes((1,), (), 9, exact=False).padded(tokens) for tokens in (1, 2, 9)] == [2, 2, 9]
