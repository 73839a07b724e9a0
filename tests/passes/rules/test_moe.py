"""Grouped products of experts: rules checked on all choices, and the facts they rest on."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_choice, check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Partial, Routed, Shard
from rolemesh.compiler.ir.rule import Lookup, OpCall, Split
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules import moe
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((moe.RULES,), (moe.LOCAL,))
GROUPED = aten._grouped_mm.default
SELECT = "select d by offsets 2 to dim 0 with 0"


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def ends(*counts: int) -> torch.Tensor:
    """Offsets of experts that have so many rows each."""
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.fixture(scope="module")
def fallback() -> torch._ops.OpOverload:
    pytest.importorskip("transformers.integrations.moe")
    return torch.ops.transformers.grouped_mm_fallback.default


@pytest.mark.parametrize("counts", [(2, 0, 5, 4), (0, 6, 0, 5, 0), (0, 0, 0, 0, 0, 11), (11, 0, 0)])
def test_fallback(fallback: torch._ops.OpOverload, counts: tuple[int, ...]) -> None:
    check_op(
        RULES,
        fallback,
        (f(11, 6), f(len(counts), 6, 10), ends(*counts)),
        expect="a! b+, c+ b+ d, c+ -> a! d | linear 100 010"
        " | select c by offsets 2 to dim 0 with 0",
    )


def test_fallback_with_rows_of_no_expert(fallback: torch._ops.OpOverload) -> None:
    """Rows after the last offset are zero in the whole op, and no rank owns them."""
    check_op(RULES, fallback, (b(11, 6), b(4, 6, 10), ends(2, 0, 3, 1)))


def test_fallback_backward(fallback: torch._ops.OpOverload) -> None:
    check_op(
        RULES,
        torch.ops.transformers.grouped_mm_fallback_backward.default,
        (f(11, 6), f(4, 6, 10), ends(2, 0, 5, 4), f(11, 10)),
        expect="a! b, c+ b d+, e!, a! d+ -> a! b, c+ b d+"
        " | select c by offsets 2 to dim 0 with 0 3",
    )


@pytest.mark.parametrize("counts", [(2, 0, 5, 4), (0, 6, 0, 5, 0), (0, 0, 0, 0, 0, 11), (11, 0, 0)])
def test_rows(counts: tuple[int, ...]) -> None:
    """fp32: units of 4 elements; 3 of them do not divide by 2 or 4 ranks."""
    check_op(
        RULES,
        GROUPED,
        (f(11, 12), f(len(counts), 12, 20), ends(*counts)),
        expect=f"a! (b+ c!), d+ (b+ c!) (e f!), d+ -> a! (e f!) | linear 100 010 | {SELECT}",
    )


def test_rows_in_half_precision() -> None:
    check_op(
        RULES,
        GROUPED,
        (b(11, 24), b(4, 24, 16), ends(3, 0, 6, 2)),
        expect=f"a! (b+ c!), d+ (b+ c!) (e f!), d+ -> a! (e f!) | linear 100 010 | {SELECT}",
    )


def test_transposed_weights() -> None:
    """Stored `[E, N, K]`: N is not contiguous and may have any extent.

    The rule alone: cutting makes a part contiguous, and only a program transposes it after that.
    """
    check_op(
        RULES,
        GROUPED,
        (b(11, 24), b(4, 7, 24).transpose(1, 2), ends(3, 0, 6, 2)),
        expect=f"a! (b+ c!), d+ (b+ c!) e, d+ -> a! e | linear 100 010 | {SELECT}",
        ranks=(),
        axes2=False,
    )


def test_batch() -> None:
    check_op(
        RULES,
        GROUPED,
        (f(5, 3, 12), f(5, 12, 20)),
        expect="a b (c+ d!), a (c+ d!) (e f!) -> a b (e f!) | linear 10 01",
    )


def test_columns() -> None:
    """`[E, M, K]` by `[K, R]`: here columns are sorted by expert, and routed."""
    call, _ = make_call(GROUPED, (f(4, 7, 12), f(11, 12).t(), ends(3, 0, 6, 2)))
    assert rule_line(RULES.rule(call)) == (
        "a+ b (c+ d!), (c+ d!) e!, a+ -> b e! | linear 100 010 | select a by offsets 2 to dim 1"
    )


def test_sum_over_rows() -> None:
    """Experts over ranks; cutting features makes a part contiguous, which only a program turns."""
    args = (f(11, 12).t(), f(11, 20), ends(3, 0, 6, 2, 0))
    expect = (
        "(a b!) c!, c! (d e!), f! -> g+ (a b!) (d e!) | linear 100 010"
        " | select g by offsets 2 with 0 1"
    )
    call, _ = make_call(GROUPED, args)
    assert rule_line(RULES.rule(call)) == expect
    rule = RULES.rule(call)
    lookup = Lookup(rule.results[0][0][0], 1, 5, "owned")
    assert rule.operand_placement(0, lookup) == Routed("owned", 1, 1, 11)
    assert rule.operand_placement(1, lookup) == Routed("owned", 0, 1, 11)
    assert rule.operand_placement(2, lookup) == REPLICATE
    assert rule.result_placement(0, lookup) == Shard(0, 1, 5)
    for ranks in (2, 3, 4):
        check_choice(RULES, GROUPED, args, None, lookup, ranks)


def test_two_axes(fallback: torch._ops.OpOverload) -> None:
    """Experts over one axis and their inner dim over the other, and experts over both."""
    mesh = Mesh({"dp": 2, "tp": 3})
    args = (f(11, 6), f(7, 6, 10), ends(2, 0, 3, 1, 0, 4, 1))
    experts = Lookup(1, 1, 7, "picks")
    for choices in ((experts, Split(2, 1, 6)), (Split(3, 1, 10), experts), (experts, experts)):
        check_choice(RULES, fallback, args, None, choices, mesh)


def test_lookup_placements() -> None:
    x, w, offs = f(11, 12), f(4, 12, 20), ends(2, 0, 5, 4)
    call, _ = make_call(GROUPED, (x, w, offs))
    rule = RULES.rule(call)
    lookup = Lookup(1, 1, 4, "owned")
    rows = Routed("owned", 0, 1, 11)
    placements = [rule.operand_placement(i, lookup) for i in range(3)]
    assert placements == [rows, Shard(0, 1, 4), Shard(0, 1, 4)]
    assert rule.result_placement(0, lookup) == rows
    assert rule.result_placement(0, Split(2, 1, 3)) == Partial()


def test_a_bias_stays_whole() -> None:
    half = torch.bfloat16
    operands = (
        TensorType((11, 16), half),
        TensorType((4, 16, 24), half),
        TensorType((4,), torch.int32),
        TensorType((4, 24), half),
    )
    call = OpCall(GROUPED, operands, {}, operands, (TensorType((11, 24), half),))
    assert rule_line(RULES.rule(call)) == "a! b!, c! d! e!, f!, g! h! -> i! j!"
    x, w, bias = (TensorType(shape, half) for shape in ((4, 3, 16), (4, 16, 24), (4, 24)))
    result = TensorType((4, 3, 24), half)
    call = OpCall(GROUPED, (x, w, None, bias), {}, (x, w, bias), (result,))
    assert rule_line(RULES.rule(call)) == "a! b! c!, d! e! f!, g! h! -> i! j! k!"


def test_offsets_of_a_part_give_the_rows_of_its_experts() -> None:
    """What the rule rests on: earlier rows go to the first expert, later ones to none."""
    x, w, offs = f(11, 12), f(4, 12, 20), ends(2, 3, 4, 2)
    whole, part = GROUPED(x, w, offs), GROUPED(x, w[1:3].contiguous(), offs[1:3].contiguous())
    torch.testing.assert_close(part[2:9], whole[2:9])
    torch.testing.assert_close(part[:2], x[:2] @ w[1])


def test_strides_must_be_units_of_16_bytes() -> None:
    """What the units rest on; without the limit, every dim could shard as it is."""
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        GROUPED(b(11, 24), b(4, 24, 12), ends(2, 3, 4, 2))
