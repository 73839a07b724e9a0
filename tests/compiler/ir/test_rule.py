"""Rules: how choices and placements translate into each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.layouts import factors

from rolemesh.compiler.ir.dims import Scope
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Routed,
    Segment,
    Segmented,
    Shard,
)
from rolemesh.compiler.ir.rule import (
    Choice,
    Kind,
    Linear,
    Lookup,
    Route,
    Rule,
    RuleBuilder,
    Select,
    Split,
    Whole,
)

WHOLE = Whole()


def matmul() -> Rule:
    """`m k, k n -> m n` with m = 12, k = 8, n = 10."""
    builder = RuleBuilder()
    m, k, n = builder.factor(12), builder.factor(8, Kind.REDUCE), builder.factor(10)
    return builder.build([[m, k], [k, n]], [[m, n]], linear=[(True, False), (False, True)])


def merge() -> Rule:
    """A reshape `[3, 4, 6] -> [72]`."""
    builder = RuleBuilder()
    dims = builder.dims((3, 4, 6))
    return builder.build([dims], [[dims[0] + dims[1] + dims[2]]], linear=[(True,)])


def lookup(dim: int) -> Rule:
    """`v d, r -> r d`: rows of a table."""
    builder = RuleBuilder()
    v, d, r = builder.factor(8, Kind.REDUCE), builder.factor(4), builder.factor(6)
    return builder.build([[v, d], [r]], [[r, d]], select=Select(v[0], 1, "ids", dim))


def test_a_builder_numbers_factors() -> None:
    rule = matmul()
    assert rule.sizes == (12, 8, 10)
    assert rule.kinds == (Kind.PASS, Kind.REDUCE, Kind.PASS)
    assert rule.operands == (((0,), (1,)), ((1,), (2,)))
    assert rule.results == (((0,), (2,)),)
    assert rule.reduction == "sum"
    assert rule.unread == frozenset()


@pytest.mark.parametrize(
    ("choice", "operands", "result"),
    [
        (WHOLE, (REPLICATE, REPLICATE), REPLICATE),
        (Split(0, 1, 12), (Shard(0, 1, 12), REPLICATE), Shard(0, 1, 12)),
        (Split(0, 3, 2), (Shard(0, 3, 2), REPLICATE), Shard(0, 3, 2)),
        (Split(1, 1, 8), (Shard(1, 1, 8), Shard(0, 1, 8)), Partial()),
        (Split(2, 1, 5), (REPLICATE, Shard(1, 1, 5)), Shard(1, 1, 5)),
        (Linear(0, "sum"), (Partial(), REPLICATE), Partial()),
        (Linear(1, "avg"), (REPLICATE, Partial("avg")), Partial("avg")),
        (Route("k", 0, 1, 12), (Routed("k", 0, 1, 12), REPLICATE), Routed("k", 0, 1, 12)),
    ],
)
def test_placements_of_a_product(
    choice: Choice, operands: tuple[Placement, ...], result: Placement
) -> None:
    rule = matmul()
    assert tuple(rule.operand_placement(i, choice) for i in range(2)) == operands
    assert rule.result_placement(0, choice) == result


def test_the_factors_before_one_are_its_outer_part() -> None:
    rule = merge()
    assert rule.result_placement(0, Split(1, 1, 4)) == Shard(0, 3, 4)
    assert rule.result_placement(0, Split(2, 2, 3)) == Shard(0, 24, 3)
    assert rule.operand_placement(0, Split(2, 2, 3)) == Shard(2, 2, 3)


@pytest.mark.parametrize(
    ("operand", "placement", "ranks", "choice"),
    [
        (0, Shard(0, 1, 12), 5, Split(0, 1, 12)),
        (0, Shard(0, 1, 6), 4, Split(0, 1, 6)),  # units of two rows
        (0, Shard(0, 2, 3), 3, Split(0, 2, 3)),
        (0, Shard(1, 1, 8), 4, Split(1, 1, 8)),
        (0, REPLICATE, 4, None),
        (0, Partial(), 4, None),
        (0, Owner(0), 4, None),
        (0, Routed("k", 0, 1, 12), 4, Route("k", 0, 1, 12)),
    ],
)
def test_match(operand: int, placement: Placement, ranks: int, choice: Choice | None) -> None:
    rule = matmul()
    assert rule.match(rule.operands[operand], placement, ranks) == choice


@pytest.mark.parametrize(
    ("placement", "ranks", "choice"),
    [
        (Shard(0, 1, 3), 3, Split(0, 1, 3)),
        (Shard(0, 1, 3), 2, Split(0, 1, 3)),  # uneven, but whole units of the first factor
        (Shard(0, 3, 4), 3, Split(1, 1, 4)),
        (Shard(0, 1, 72), 3, Split(0, 1, 3)),  # even: the digit of radix 3 lies in the first one
        (Shard(0, 1, 72), 2, None),  # even, but radix 2 is not a digit of the first factor
        (Shard(0, 1, 72), 5, None),  # uneven: chunks of 15 cut across factors
        (Shard(0, 12, 6), 4, Split(2, 1, 6)),
        (Shard(0, 6, 2), 2, Split(1, 2, 2)),
        (Routed("k", 0, 1, 3), 4, Route("k", 0, 1, 3)),
        (Routed("k", 0, 1, 72), 3, None),  # rows are not digits
    ],
)
def test_match_within_a_merged_dim(placement: Placement, ranks: int, choice: Choice | None) -> None:
    rule = merge()
    assert rule.match(rule.results[0], placement, ranks) == choice


@given(st.sampled_from((2, 3, 4, 5)), st.data())
def test_a_matched_choice_gives_the_placement_back(ranks: int, data: st.DataObject) -> None:
    """Or one with the same chunks, where it is an even digit."""
    rule = merge()
    outer, size = data.draw(st.sampled_from(factors(72)))
    placement = Shard(0, outer, size)
    choice = rule.match(rule.results[0], placement, ranks)
    if choice is None:
        return
    found = rule.result_placement(0, choice)
    assert isinstance(found, Shard)
    if found != placement:
        assert found.outer == outer
        assert found.size % ranks == size % ranks == 0


@pytest.mark.parametrize("kind", [Kind.REPLICATE, Kind.PERMUTE])
def test_factors_that_do_not_shard(kind: Kind) -> None:
    builder = RuleBuilder()
    rule = builder.build([[builder.factor(8, kind)]], [[]])
    assert rule.match(rule.operands[0], Shard(0, 1, 8), 4) is None
    assert rule.match(rule.operands[0], Routed("k", 0, 1, 8), 4) is None


@pytest.mark.parametrize(("ranks", "matches"), [(2, True), (4, True), (3, False)])
def test_a_mean_shards_evenly_only(ranks: int, *, matches: bool) -> None:
    builder = RuleBuilder()
    rule = builder.build([[builder.factor(8, Kind.REDUCE)]], [[]], reduction="avg")
    choice = rule.match(rule.operands[0], Shard(0, 1, 8), ranks)
    assert (choice is not None) == matches
    if choice is not None:
        assert rule.result_placement(0, choice) == Partial("avg")


def test_dims_of_extent_one_are_factors() -> None:
    builder = RuleBuilder()
    one, rest = builder.factor(1), builder.factor(6)
    rule = builder.build([[one, rest]], [[one + rest]])
    assert rule.match(rule.operands[0], Shard(0, 1, 1), 4) == Split(0, 1, 1)
    assert rule.result_placement(0, Split(0, 1, 1)) == Shard(0, 1, 1)
    assert rule.match(rule.results[0], Shard(0, 1, 1), 4) == Split(0, 1, 1)


def test_an_operand_that_is_not_read_needs_no_placement() -> None:
    builder = RuleBuilder()
    rule = builder.build([[()]], [builder.dims((4,))], unread=[0])
    assert rule.operand_placement(0, Split(0, 1, 4)) is None
    assert rule.result_placement(0, Split(0, 1, 4)) == Shard(0, 1, 4)


def test_a_broadcast_dim_holds_no_part() -> None:
    builder = RuleBuilder()
    dims = builder.dims((4, 8))
    rule = builder.build([dims, [(), dims[1]]], [dims])
    assert rule.operand_placement(1, Split(0, 1, 4)) == REPLICATE
    assert rule.operand_placement(1, Split(1, 1, 8)) == Shard(1, 1, 8)


def test_a_lookup_routes_the_rows_that_make_up_a_dim() -> None:
    choice = Lookup(0, 1, 8, "ids:i:8")
    rule = lookup(dim=0)
    assert rule.operand_placement(0, choice) == Shard(0, 1, 8)
    assert rule.operand_placement(1, choice) == REPLICATE
    assert rule.result_placement(0, choice) == Routed("ids:i:8", 0, 1, 6)
    assert lookup(dim=-1).result_placement(0, choice) == Partial()


def test_rules_compare_by_value() -> None:
    assert matmul() == matmul()
    assert hash(matmul()) == hash(matmul())
    assert matmul() != merge()


def test_what_does_not_divide_a_symbolic_factor_is_not_assumed_to_lie_in_it() -> None:
    scope = Scope()
    size = scope.symbol("T", 6)
    builder = RuleBuilder()
    dims = builder.dims((size,))
    rule = builder.build([dims], [dims])
    assert rule.match(rule.operands[0], Shard(0, 2, 1), 2) is None
    assert rule.match(rule.operands[0], Shard(0, 1, size), 2) == Split(0, 1, size)
    assert not scope.assumptions


def test_segments_do_not_pass_where_an_op_needs_its_position() -> None:
    builder = RuleBuilder()
    dims = builder.dims((4, 6))
    rule = builder.build([dims], [dims], joint=dims[1])
    copies = (Segment(2, 1, 2, 2),)
    for segments in (copies, (*copies, Segment(4, 1, 2))):
        assert rule.match(rule.operands[0], Segmented(1, segments), 4) is None
    assert rule.match(rule.operands[0], Segmented(0, (Segment(4, 1, 2, 2),)), 4) is not None
