"""Specs as text, and what is no spec."""

from __future__ import annotations

import pytest

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.constraints import parse_spec, spec_text


@pytest.mark.parametrize(
    "spec",
    [
        P(),
        P("tp"),
        P(None, "tp"),
        P(("dp", "tp"), None),
        P(None, "tp", units={1: 16}),
        P("tp", "dp", units={0: 2, 1: 3}),
        P("it's"),
    ],
)
def test_a_spec_survives_its_text(spec: P) -> None:
    assert parse_spec(spec_text(spec)) == spec


def test_the_text_is_what_a_user_writes() -> None:
    assert spec_text(P(None, "tp", units={1: 16})) == "P(None, 'tp', units={1: 16})"
    assert parse_spec(' P( "tp" ) ') == P("tp")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tp", "not a call of P"),
        ("Q('tp')", "calls Q"),
        ("P(tp)", "malformed node"),
        ("P('tp'", "never closed"),
        ("P(3)", "3 is no axis name"),
        ("P(('tp', 3))", "is no axis name"),
        ("P('tp', unit={0: 1})", "no option 'unit'"),
        ("P('tp', units=[1])", "units maps dims"),
        ("P('tp', units={'a': 1})", "units maps dims"),
        ("P('tp', parts={0: 'a'})", "parts maps dims to numbers of parts"),
        ("P(*['tp'])", "malformed node"),
    ],
)
def test_other_texts_are_refused(text: str, why: str) -> None:
    with pytest.raises(RolemeshError, match=r"^\[RM014\]") as caught:
        parse_spec(text, "constraint in model.layers.0")
    assert why in caught.value.why
    assert caught.value.where == "constraint in model.layers.0"
