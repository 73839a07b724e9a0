"""Sharding rules and choices as text, in Shardy's form."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Golden
from tests.passes.rules.harness import make_call

from rolemesh.compiler.ir.placement import Segment, Segmented
from rolemesh.compiler.ir.rule import (
    Choice,
    JoinSegments,
    Kind,
    Linear,
    Lookup,
    Route,
    Rule,
    Split,
    SplitSegments,
    TakeSegments,
    Whole,
)
from rolemesh.compiler.ir.rule_text import choice_text, factor_name, rule_text
from rolemesh.passes.rules.defaults import default_rules

aten = torch.ops.aten


def f(*shape: int) -> torch.Tensor:
    return torch.empty(shape)


IDS = torch.zeros(3, 4, dtype=torch.int64)
CALLS = (
    (aten.mm.default, (f(26, 72), f(72, 64))),
    (aten.bmm.default, (f(6, 5, 8), f(6, 8, 7))),
    (aten.add.Tensor, (f(3, 5, 8), f(5, 1))),
    (aten.view.default, (f(3, 5, 24), [15, 4, 6])),
    (aten.transpose.int, (f(3, 5, 8), 0, 2)),
    (aten._softmax.default, (f(3, 5, 8), -1, False)),
    (aten.sum.dim_IntList, (f(3, 5, 8), [1])),
    (aten.sort.default, (f(3, 5), 1)),
    (aten.embedding.default, (f(11, 6), IDS)),
    (aten.split_with_sizes.default, (f(3, 12), [6, 2, 4], 1)),
    (aten.full.default, ([3, 5], 1.0)),
)


def test_rules(golden: Golden) -> None:
    rules = [(target, default_rules().rule(make_call(target, args)[0])) for target, args in CALLS]
    golden("rules", "\n".join(f"{target}  {rule_text(rule)}" for target, rule in rules))


SEGMENTS = (Segment(6, 1, 6), Segment(2, 1, 2, 2), Segment(4, 1, 0))
WEIGHT = Rule(
    (12, 8),
    (Kind.PASS, Kind.REDUCE),
    (((0,), (1,)),),
    (((0,),),),
    linear=((True, False, False), (True, False, True)),
)


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Whole(), "whole"),
        (Split(0, 1, 12), "split i"),
        (Split(1, 1, 8), "split j"),
        (Split(0, 1, 4), "split i seen as [1, 4, 3]"),
        (Split(0, 3, 2), "split i seen as [3, 2, 2]"),
        (SplitSegments(0, SEGMENTS), "split 3 segments of i"),
        (
            TakeSegments(Segmented(0, SEGMENTS)),
            "take segments apart: segments(0: 6 in 6, 2 in 2 x 2 copies, 4 whole)",
        ),
        (
            JoinSegments(Segmented(1, SEGMENTS[:2])),
            "join segments: segments(1: 6 in 6, 2 in 2 x 2 copies)",
        ),
        (Route("mine_3", 0, 1, 12), "route rows of i by %mine_3"),
        (Lookup(0, 1, 12, "ids"), "look up rows of i by %ids"),
        (Linear(0, "sum"), "pass a pending sum of operand 0"),
        (Linear(1, "max"), "pass a pending max of operand 0 and 2"),
    ],
)
def test_choices(choice: Choice, text: str) -> None:
    assert choice_text(WEIGHT, choice) == text


def test_every_kind_of_factor_that_is_not_freely_split_is_listed() -> None:
    kinds = (Kind.PASS, Kind.REPLICATE, Kind.PERMUTE, Kind.REDUCE, Kind.REPLICATE)
    rule = Rule((2, 3, 5, 7, 11), kinds, (((0, 1), (2,), (3,), (4,)),), (((0, 1), ()),))
    assert rule_text(rule) == (
        "([ij, k, l, m])->([ij, 1]) {i=2, j=3, k=5, l=7, m=11} "
        "reduce={l} replicate={j, m} permute={k}"
    )


def test_factors_have_letters_then_numbers() -> None:
    assert [factor_name(n) for n in (0, 1, 17, 18, 25)] == ["i", "j", "z", "a", "h"]
    assert [factor_name(n) for n in (26, 51, 52)] == ["i1", "h1", "i2"]
    assert len({factor_name(n) for n in range(200)}) == 200
