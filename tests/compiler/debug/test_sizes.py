"""Sizes of recorded stages as numbers."""

from __future__ import annotations

import pytest
from tests.compiler.debug.small_stages import stage

from rolemesh.compiler.debug.sizes import sizes_of

SIZE = sizes_of(stage([], {"tp": 4}, symbols=[{"name": "T", "hint": 13}, {"name": "B", "hint": 3}]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (7, 7),
        ("T", 13),
        ("2*T - B", 23),
        ("-T + 20", 7),
        ("((T + 3)//4)", 4),
        ("FloorDiv(T, 4)", 3),
        ("Mod(T, 5) + PythonMod(T, 7)", 9),
        ("Max(B, 5, T % 8)", 5),
        ("Min(T, B)**2", 9),
    ],
)
def test_a_formula_has_its_value(text: int | str, value: int) -> None:
    assert SIZE(text) == value


@pytest.mark.parametrize("text", ["S", "T / 2", "open(T)", "Max()", "'T'"])
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no formula over the sizes of this program"):
        SIZE(text)
