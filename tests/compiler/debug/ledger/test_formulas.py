"""Formulas as sympy writes them, read without sympy."""

from __future__ import annotations

from fractions import Fraction

import pytest
import sympy

from rolemesh.compiler.debug.ledger.formulas import evaluate, total

SIZES = {"B": 3, "T": 13, "tp": 4}
FORMULAS = [
    "73728",
    "8*B*(tp - 1)*ceiling(T/tp)",
    "896*B*T*(2*tp - 2)/tp",
    "(tp - 1)*(-B + 16*ceiling(2*T/tp) + 5*floor(T/3))",
    "B**2*T",
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_value_is_sympys(formula: str) -> None:
    expected = sympy.sympify(formula).subs({sympy.Symbol(k): v for k, v in SIZES.items()})
    assert evaluate(formula, SIZES) == Fraction(int(expected.p), int(expected.q))


@pytest.mark.parametrize(
    "text",
    ["", "T +", "K*B", "T // 2", "__import__('os')", "ceiling(T, 2)", "T/(tp - 4)", "T.real"],
)
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no formula over B, T, tp|has no value"):
        evaluate(text, SIZES)


def test_the_total_joins_what_differs_in_a_factor() -> None:
    assert total(["8*B*T", "B*T", "4*B", "8*B*T"]) == "17*B*T + 4*B"
    assert total(["12", "30"]) == "42"
    assert total(["8*B + T", "8*B + T"]) == "2*(8*B + T)"
    assert total(["B + T/tp"]) == "B + T/tp"
    assert total([]) == "0"


@pytest.mark.parametrize("first", FORMULAS)
@pytest.mark.parametrize("second", FORMULAS)
def test_the_total_has_the_sum_of_the_values(first: str, second: str) -> None:
    formulas = [first, second, first, f"3*{first}" if "+" not in first else first]
    assert evaluate(total(formulas), SIZES) == sum(evaluate(f, SIZES) for f in formulas)
