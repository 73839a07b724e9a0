"""Colours of mesh axes: which text has one, and that a name keeps its own."""

from __future__ import annotations

import pytest

from rolemesh.compiler.debug.paint import Painter

TP, DP = "\x1b[36m", "\x1b[33m"
END = "\x1b[0m"


@pytest.mark.parametrize(
    ("text", "painted"),
    [
        ("f32[2, 13@tp, 64]", f"f32[2, {TP}13@tp{END}, 64]"),
        ("f32[112, (16@tp x 16)]", f"f32[112, ({TP}16@tp{END} x 16)]"),
        ("f32[(3 x 16@dp/tp)]", f"f32[(3 x {DP}16@dp{END}/{TP}tp{END})]"),
        ("f32[(2*T)@dp, 5]", f"f32[{DP}(2*T)@dp{END}, 5]"),
        ("f32[2*T@dp, 5]", f"f32[{DP}2*T@dp{END}, 5]"),
        ("f32[2@tp/2, 5]", f"f32[{TP}2@tp{END}/2, 5]"),
        ("f32[2, 5] +sum(tp)", f"f32[2, 5] {TP}+sum(tp){END}"),
        ("f32[2, 5] owner(2)@tp", f"f32[2, 5] {TP}owner(2)@tp{END}"),
        ("f32[2@tpu, 5] +sum(tpu)", "f32[2@tpu, 5] +sum(tpu)"),
        ("f32[2, 5]", "f32[2, 5]"),
    ],
)
def test_kind(text: str, painted: str) -> None:
    assert Painter(["dp", "tp"], on=True).kind(text) == painted
    assert Painter(["dp", "tp"], on=False).kind(text) == text


def test_a_name_has_one_colour_in_every_mesh() -> None:
    alone, among = Painter(["tp"], on=True), Painter(["dp", "x", "tp"], on=True)
    assert alone.axis("tp") == among.axis("tp") == f"{TP}tp{END}"


def test_axes_of_a_mesh_have_different_colours() -> None:
    names = ["tp", "dp", "ep", "pp", "cp", "sp", "a", "b", "c", "d"]
    painter = Painter(names, on=True)
    assert len({painter.axis(name, "x") for name in names}) == len(names)
