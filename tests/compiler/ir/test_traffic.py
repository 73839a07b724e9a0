"""The convention for bytes received per rank, for numbers and for symbols."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import sympy

from rolemesh.compiler.ir.traffic import expected_share, received_bytes


@pytest.mark.parametrize(
    ("op", "size", "parts", "expected"),
    [
        ("all_gather", 10, 4, 30),
        ("reduce_scatter", 40, 4, 30),
        ("all_to_all", 40, 4, 30),
        ("all_reduce", 40, 4, 60),
        ("all_reduce", 6, 4, 9),
        ("all_reduce", 5, 4, 7.5),
        ("broadcast", 10, 4, 10),
        ("broadcast", 10, 1, 0),
        ("all_reduce", 10, 1, 0),
    ],
)
def test_bytes(op: str, size: int, parts: int, expected: float) -> None:
    found = received_bytes(op, size, parts)
    assert found == expected
    assert isinstance(found, int) == isinstance(expected, int)


def test_symbols() -> None:
    n = sympy.Symbol("n", integer=True, positive=True)
    assert received_bytes("all_reduce", 4 * n, 8) == 7 * n
    assert received_bytes("reduce_scatter", n, 4) == sympy.Rational(3, 4) * n


def test_two_steps_of_a_joint_gather_cost_as_much_as_one() -> None:
    minor = received_bytes("all_gather", 10, 3)
    major = received_bytes("all_gather", 3 * 10, 2)
    assert minor + major == received_bytes("all_gather", 10, 6)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'shard' is not a collective"):
        received_bytes("shard", 1, 2)


@pytest.mark.parametrize("experts", [6, 8])
@pytest.mark.parametrize("choices", [1, 2, 5])
def test_the_expected_share_is_that_of_all_ways_to_choose_experts(
    experts: int, choices: int
) -> None:
    ranks, units = 4, 2
    ways = list(itertools.combinations(range(experts), choices))
    needed = sum(len({expert // units for expert in way}) for way in ways)
    share = expected_share(choices, experts, ranks)
    assert abs(share - Fraction(needed, len(ways) * ranks)) <= Fraction(1, 2000)
