"""Reshapes, moves of dims, padding: their rules as a table, each checked on all its choices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.rules.harness import check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.rule import Split
from rolemesh.passes.rules import views
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
SEEDS = itertools.count()  # no two operands alike: x - x tells nothing
RULES = Rules((views.RULES,), (views.LOCAL,))


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(SEEDS))).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def i(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) * 7 % 23


CASES = [
    (aten.view.default, (f(6, 4), [24]), "a b -> (a b)"),
    (aten.view.default, (b(6, 4), [-1]), "a b -> (a b)"),
    (aten.view.default, (i(5, 6), [30]), "a b -> (a b)"),
    (aten.view.default, (f(12, 5), [3, 4, 5]), "(a b) c -> a b c"),
    (aten.view.default, (f(6, 4), [2, 3, 2, 2]), "(a b) (c d) -> a b c d"),
    (aten.view.default, (f(3, 2, 5), [1, 6, 5]), "(a b) c d -> a (b c) d"),
    (aten.view.default, (f(1, 16), [16]), "a b -> (a b)"),
    (aten.view.default, (f(16, 1), [16]), "a b -> (a b)"),
    (aten.view.default, (f(16), [1, 16, 1]), "(a b c) -> a b c"),
    (aten.view.default, (f(1, 7, 6), [1, 7, 2, 3]), "a b (c d) -> a b c d"),
    (aten.view.default, (f(1, 1), []), "a! b! -> ."),
    (aten.view.default, (f(), [1, 1]), ". -> a b"),
    (aten.view.default, (f(5, 3), [5, 3]), "a b -> a b"),
    # What does not refine replicates, and only that: the gcd from either side still passes.
    (aten.view.default, (f(4, 6), [6, 4]), "(a b!) (c! d) -> (a e!) (f! d)"),
    (aten.view.default, (f(4, 9, 6), [6, 9, 4]), "(a b!) c! (d! e) -> (a f!) g! (h! e)"),
    (aten.view.default, (f(2, 3, 5, 3, 2), [3, 2, 5, 2, 3]), "a! b! c d! e! -> f! g! c h! i!"),
    (aten.view.default, (f(0, 3), [3, 0]), "a! b! -> c! d!"),
    (aten._unsafe_view.default, (f(2, 5, 6), [10, 6]), "a b c -> (a b) c"),
    (aten.reshape.default, (f(5, 6).t(), [2, 15]), "(a b) c -> a (b c)"),
    (aten._reshape_alias.default, (f(5, 6), [30], [1]), "a b -> (a b)"),
    (aten.squeeze.default, (f(2, 1, 5),), "a b c -> a (b c)"),
    # A rank that holds one row of a dim of two must not squeeze it.
    (aten.squeeze.dim, (f(2, 5), 0), "a b -> a b"),
    (aten.squeeze.dim, (f(5, 1), -1), "a b -> (a b)"),
    (aten.squeeze.dims, (f(1, 2, 5, 1), [0, -1]), "a b c d -> (a b) (c d)"),
    (aten.squeeze.dims, (f(1, 5), []), "a b -> a b"),
    (aten.squeeze.default, (f(1, 1),), "a! b! -> ."),
    (aten.unsqueeze.default, (f(3, 5), 0), "(a b) c -> a b c"),
    (aten.unsqueeze.default, (b(3, 5), 1), "a (b c) -> a b c"),
    (aten.unsqueeze.default, (f(3, 5), -1), "a (b c) -> a b c"),
    (aten.unsqueeze.default, (f(), 0), ". -> a!"),
    (aten.expand.default, (f(3, 1), [3, 7]), "a 1 -> a b"),
    (aten.expand.default, (b(1, 5), [3, -1, 5]), "a b -> c a b"),
    (aten.expand.default, (f(1, 5), [3, 7, 5]), "1 a -> b c a"),
    (aten.repeat.default, (f(3, 5), [2, 1, 4]), "a b -> c a (d b)"),
    (aten.permute.default, (f(3, 5, 7), [2, 0, -2]), "a b c -> c a b"),
    (aten.transpose.int, (b(3, 5, 7), 0, -1), "a b c -> c b a"),
    (aten.t.default, (f(3, 5),), "a b -> b a"),
    (aten.t.default, (f(5),), "a -> a"),
    (aten.movedim.int, (f(3, 5, 7), 0, 2), "a b c -> b c a"),
    (aten.movedim.intlist, (f(3, 5, 7), [0, 1], [-1, 0]), "a b c -> b c a"),
    (aten.flip.default, (f(3, 5, 7), [1, -1]), "a b~ c~ -> a b~ c~"),
    (aten.roll.default, (f(3, 5), [1], [0]), "a~ b -> a~ b"),
    (aten.roll.default, (f(3, 5), [2]), "a~ b~ -> a~ b~"),
    (aten.constant_pad_nd.default, (f(3, 5), [1, 2], 0.0), "a b! -> a c!"),
    (aten.constant_pad_nd.default, (f(3, 5, 7), [0, 0, -1, 1]), "a b! c -> a d! c"),
    (aten.unfold.default, (f(12, 5), 0, 4, 4), "(a b!) c -> a c b!"),
    (aten.unfold.default, (f(3, 11), 1, 4, 2), "a b! -> a c! d!"),
    (aten.diagonal.default, (f(5, 3, 4),), "a! b! c -> c d!"),
    (aten.diagonal.default, (f(5, 3, 4), 1, 0, -1), "a! b c! -> b d!"),
    (aten.view_as_complex.default, (f(3, 5, 2),), "a b c! -> a b"),
    (aten.view_as_real.default, (torch.view_as_complex(f(3, 5, 2)),), "a b -> a b c!"),
    (aten.clone.default, (b(3, 5),), "a b -> a b"),
    (aten.clone.default, (f(3, 5).t(),), "a b -> a b"),
    (aten.alias.default, (f(3, 5),), "a b -> a b"),
    (aten.detach.default, (f(3, 5),), "a b -> a b"),
    (aten.lift_fresh_copy.default, (i(3, 5),), "a b -> a b"),
    (aten.contiguous.default, (f(3, 5).t(),), "a b -> a b"),
]


def _linear(text: str, args: tuple[object, ...]) -> str:
    operand = args[0]
    assert isinstance(operand, torch.Tensor)
    return text if 0 in operand.shape else f"{text} | linear 1"


@pytest.mark.parametrize(("target", "args", "text"), CASES, ids=lambda v: str(v)[:40])
def test_rule(target: torch._ops.OpOverload, args: tuple[object, ...], text: str) -> None:
    assert check_op(RULES, target, args, expect=_linear(text, args)) > 0


def test_padding_with_another_value_is_not_linear() -> None:
    call, _ = make_call(aten.constant_pad_nd.default, (f(3, 5), [1, 2], 1.0))
    assert rule_line(RULES.rule(call)) == "a b! -> a c!"


def test_view_as_another_type() -> None:
    check_op(RULES, aten.view.dtype, (b(3, 5), torch.float16), expect="a b -> a b")
    check_op(RULES, aten.view.dtype, (f(3, 5), torch.int32), expect="a! b! -> a! b!")
    check_op(RULES, aten.view.dtype, (f(3, 5), torch.bfloat16), expect="a b! -> a c!")


def test_a_sharded_batch_of_one_survives_a_view() -> None:
    call, _ = make_call(aten.view.default, (f(1, 16), [16]))
    rule = RULES.rule(call)
    choice = rule.match(rule.operands[0], Shard(0, 1, 1), 4)
    assert choice is not None
    assert rule.result_placement(0, choice) == Shard(0, 1, 1)


def test_a_merged_dim_keeps_the_sharded_sequence() -> None:
    call, _ = make_call(aten.view.default, (f(2, 5, 3), [10, 3]))
    rule = RULES.rule(call)
    choice = rule.match(rule.operands[0], Shard(1, 1, 5), 4)
    assert isinstance(choice, Split)
    assert rule.result_placement(0, choice) == Shard(0, 2, 5)


@st.composite
def two_factorisations(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes with the same number of elements."""
    primes = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=5))

    def grouped(order: list[int]) -> list[int]:
        shape: list[int] = []
        for prime in order:
            if shape and draw(st.booleans()):
                shape[-1] *= prime
            else:
                shape.append(prime)
        return shape

    return grouped(primes), grouped(draw(st.permutations(primes)))


@given(two_factorisations())
@settings(max_examples=100)
def test_any_reshape(shapes: tuple[list[int], list[int]]) -> None:
    source, target = shapes
    check_op(RULES, aten.reshape.default, (f(*source), target), ranks=(2, 3), limit=4)


@given(two_factorisations())
@settings(max_examples=100)
def test_a_reshape_and_its_inverse_pass_the_same_factors(
    shapes: tuple[list[int], list[int]],
) -> None:
    there, _ = make_call(aten.reshape.default, (f(*shapes[0]), shapes[1]))
    back, _ = make_call(aten.reshape.default, (f(*shapes[1]), shapes[0]))
    sizes = [
        sorted(s for s, k in zip(r.sizes, r.kinds, strict=True) if k.name == "PASS" and s > 1)
        for r in (RULES.rule(there), RULES.rule(back))
    ]
    assert sizes[0] == sizes[1]


@given(st.permutations(range(4)), st.lists(st.integers(1, 5), min_size=4, max_size=4))
@settings(max_examples=15)
def test_any_permutation(order: list[int], shape: list[int]) -> None:
    check_op(RULES, aten.permute.default, (f(*shape), order), ranks=(2, 3), limit=4)
