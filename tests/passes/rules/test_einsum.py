"""Rules written as specs: what they read, what they refuse and in which words."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.rule import OpCall, Rule
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.einsum import parse

Shape = tuple[int, ...]


def call_of(operands: list[Shape], results: list[Shape]) -> OpCall:
    values = tuple(TensorType(shape, torch.float32) for shape in operands)
    outputs = tuple(TensorType(shape, torch.float32) for shape in results)
    return OpCall(torch.ops.aten.mm.default, values, {}, values, outputs)


def derive(spec: str, operands: list[Shape], *results: Shape) -> Rule:
    return parse(spec, "lib::op")(call_of(operands, list(results)))


CASES: list[tuple[str, list[Shape], list[Shape], str]] = [
    ("b m k, b k n -> b m n", [(2, 3, 4), (2, 4, 5)], [(2, 3, 5)],
     "a b c+, a c+ d -> a b d | linear 10 01"),
    ("tokens width, width -> tokens width", [(3, 4), (4,)], [(3, 4)], "a b, b -> a b"),
    ("  m  k!,k! n->m   n ", [(3, 4), (4, 5)], [(3, 5)], "a b!, b! c -> a c"),
    # a mark counts wherever it stands
    ("m k, k! n -> m n", [(3, 4), (4, 5)], [(3, 5)], "a b!, b! c -> a c"),
    ("t e -> t k!, t k!", [(3, 8)], [(3, 2), (3, 2)], "a b+ -> a c!, a c!"),
    # one operand: a sum of what, the spec does not say, so nothing partial goes in
    ("t k -> t", [(3, 4)], [(3,)], "a b+ -> a"),
    ("m k, k n, n -> m n", [(3, 4), (4, 5), (5,)], [(3, 5)],
     "a b+, b+ c, c -> a c | linear 100 010"),
    ("i j, j k, k l -> i l", [(2, 3), (3, 4), (4, 5)], [(2, 5)],
     "a b+, b+ c+, c+ d -> a d | linear 100 010 001"),
    ("k, k ->", [(4,), (4,)], [()], "a+, a+ -> . | linear 10 01"),
    (", m -> m", [(), (4,)], [(4,)], "., a -> a"),
    ("i j, k l -> i k", [(2, 3), (4, 5)], [(2, 4)], "a b+, c d+ -> a c"),
    # broadcasting
    ("b m k, b k n -> b m n", [(1, 3, 4), (2, 4, 5)], [(2, 3, 5)],
     "1 a b+, c b+ d -> c a d | linear 10 01"),
    ("b m k, b k n -> b m n", [(1, 3, 4), (1, 4, 5)], [(1, 3, 5)],
     "a b c+, a c+ d -> a b d | linear 10 01"),
    ("b m -> b m", [(1, 3)], [(2, 3)], "1 a -> b a"),
    ("a, a -> a", [(0,), (1,)], [(0,)], "a, 1 -> a"),
    ("t d 1 -> 1 t", [(3, 4, 1)], [(1, 3)], "a b+ 1 -> 1 a"),
    ("... d!, d! -> ... d!", [(2, 3, 4), (4,)], [(2, 3, 4)], "a b c!, c! -> a b c!"),
    ("... d!, d! -> ... d!", [(4,), (4,)], [(4,)], "a!, a! -> a!"),
    ("..., ... -> ...", [(2, 3, 1), (4,)], [(2, 3, 4)], "a b 1, c -> a b c"),
    ("h ... d -> ... h d", [(5, 2, 3, 4)], [(2, 3, 5, 4)], "a b c d -> b c a d"),
    # groups
    ("b h d -> b (h d)", [(2, 3, 4)], [(2, 12)], "a b c -> a (b c)"),
    ("b (h d) -> b h d", [(2, 12)], [(2, 3, 4)], "a (b c) -> a b c"),
    ("b (h d), h -> b (h d)", [(2, 12), (3,)], [(2, 12)], "a (b c), b -> a (b c)"),
    ("b(h d!), d -> b h", [(2, 12), (4,)], [(2, 3)], "a (b c!), c! -> a b"),
    ("(b g) s, b s -> (b g) s", [(6, 4), (2, 4)], [(6, 4)], "(a b) c, a c -> (a b) c"),
    ("(h d), h d -> h d", [(1,), (3, 4)], [(3, 4)], "1, a b -> a b"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "operands", "results", "expect"), CASES)
def test_rule(spec: str, operands: list[Shape], results: list[Shape], expect: str) -> None:
    assert rule_line(derive(spec, operands, *results)) == expect


def test_one_function_serves_all_shapes() -> None:
    """Extents and, with an ellipsis, numbers of dims come from each call anew."""
    rule = parse("... d!, d! -> ... d!", "lib::op")
    assert rule(call_of([(3, 4), (4,)], [(3, 4)])).sizes == (3, 4)
    assert rule(call_of([(5, 6), (6,)], [(5, 6)])).sizes == (5, 6)
    assert rule(call_of([(2, 5, 6), (6,)], [(2, 5, 6)])).sizes == (2, 5, 6)
    assert rule(call_of([(3, 4), (4,)], [(3, 4)])).sizes == (3, 4)


def test_linear_patterns_may_be_given() -> None:
    rule = parse("n, m k!, k! n -> m n", "lib::op", linear=((True, True, False),))
    assert rule(call_of([(5,), (3, 4), (4, 5)], [(3, 5)])).linear == ((True, True, False),)


MALFORMED = [
    ("m k, k n", "a spec has one '->'"),
    ("m -> m -> m", "a spec has one '->'"),
    ("m k -> n", "'n' is on the right only"),
    ("m ... -> m ...2", "cannot read '...2'"),
    ("m m -> m", "'m' stands twice in 'm m'"),
    ("m! m -> m", "'m' stands twice in 'm! m'"),
    ("m (n -> m", "cannot read '(n'"),
    ("m ((n k) l) -> m", "cannot read '((n k) l)'"),
    ("m () -> m", "cannot read the group '()'"),
    ("m (n 2) -> m", "cannot read the group '(n 2)'"),
    ("... m ... -> m", "'...' stands twice in '... m ...'"),
    ("m!! -> m", "cannot read 'm!!'"),
    ("m 2 -> m", "cannot read '2'"),
    ("m -> (m m)", "'m' stands twice in '(m m)'"),
]


@pytest.mark.parametrize(("spec", "what"), MALFORMED)
def test_malformed_spec(spec: str, what: str) -> None:
    with pytest.raises(RolemeshError) as caught:
        parse(spec, "lib::op")
    assert caught.value.code == "RM022"
    assert caught.value.what == what
    assert caught.value.where == f"rule of lib::op: {spec!r}"


UNFIT: list[tuple[str, list[Shape], list[Shape], str]] = [
    ("m k, k n -> m n", [(3, 4)], [(3, 5)], "the spec has 2 operands, the call has 1"),
    ("m k -> m", [(3, 4)], [(3,), (3,)], "the spec has 1 results, the call has 2"),
    # as many tensors in sum, as many dims each
    ("m k, m k -> m k", [(3, 4)], [(3, 4), (3, 4)], "the spec has 2 operands, the call has 1"),
    ("m k -> m", [(3, 4, 5)], [(3,)], "operand 0 has 3 dims, the spec gives it 2"),
    ("m ... k -> m", [(3,)], [(3,)], "operand 0 has 1 dims, the spec gives it 2"),
    ("m k -> m", [(3, 4)], [(3, 1)], "result 0 has 2 dims, the spec gives it 1"),
    ("m k, k n -> m n", [(3, 4), (5, 6)], [(3, 6)], "'k' is 4 and 5 in one call"),
    ("m k -> m k", [(3, 4)], [(3, 1)], "'k' is 4 and 1 in one call"),
    ("m 1 -> m", [(3, 4)], [(3,)], "'1' is 1 and 4 in one call"),
    ("(h d), h -> d", [(12,), (5,)], [(3,)], "'h d' is 15 and 12 in one call"),
    ("(h d), h -> (h d)", [(12,), (5,)], [(12,)], "the extent of 'd' is not known"),
    ("(h d) -> (h d)", [(12,)], [(12,)], "the extent of 'h' is not known"),
]


@pytest.mark.parametrize(("spec", "operands", "results", "what"), UNFIT)
def test_call_that_does_not_fit(
    spec: str, operands: list[Shape], results: list[Shape], what: str
) -> None:
    rule = parse(spec, "lib::op")
    with pytest.raises(RolemeshError) as caught:
        rule(call_of(operands, results))
    assert caught.value.code == "RM022"
    assert caught.value.what == what


def test_message() -> None:
    with pytest.raises(RolemeshError) as caught:
        parse("m k, k n -> m p", "lib::op")
    assert str(caught.value) == (
        "[RM022] 'p' is on the right only\n"
        "  where: rule of lib::op: 'm k, k n -> m p'\n"
        "  why: no operand says how to shard it\n"
        "  fix: write p! to keep the dim whole, or name it on the left too"
    )
