"""Slices, splits, cats, selects and scatters: their rules as a table, checked on all choices."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.rules.harness import check_op, make_call

from rolemesh.compiler.ir.placement import Shard
from rolemesh.passes.rules import slicing
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
SEEDS = itertools.count()  # no two operands alike: x - x tells nothing
RULES = Rules((slicing.RULES,), (slicing.LOCAL,))


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(next(SEEDS))).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


CASES = [
    (aten.slice.Tensor, (f(12, 5), 0, 0, 2**63 - 1), "a b -> a b | linear 1"),
    (aten.slice.Tensor, (f(12, 5), 0, -12, 12), "a b -> a b | linear 1"),
    (aten.slice.Tensor, (b(12, 5), 0, 6, 12), "(a! b) c -> b c | linear 1"),
    (aten.slice.Tensor, (f(12, 5), 0, -6), "(a! b) c -> b c | linear 1"),
    (aten.slice.Tensor, (f(12, 5), 0, 4, 12), "(a! b) c -> (d! b) c | linear 1"),
    (aten.slice.Tensor, (f(5, 12), 1, 1, 12, 3), "a (b c!) -> a b | linear 1"),
    (aten.slice.Tensor, (f(13, 5), 0, 1, 11, 3), "a! b -> c! b | linear 1"),
    (aten.slice.Tensor, (f(13, 5), 0, 1, 4), "a! b -> c! b | linear 1"),
    (aten.slice.Tensor, (f(6, 5), 0, 6, 9), "a! b -> c! b | linear 1"),
    (aten.slice.Tensor, (f(6, 5),), "a b -> a b | linear 1"),
    (aten.narrow.default, (f(12, 5), 0, 4, 4), "(a! b) c -> b c | linear 1"),
    (aten.split.Tensor, (f(12, 5), 4), "(a! b) c -> b c, b c, b c | linear 1"),
    (aten.split.Tensor, (b(5, 12), 6, -1), "a (b! c) -> a c, a c | linear 1"),
    (aten.split.Tensor, (f(5, 12), 12, 1), "a b -> a b | linear 1"),
    (aten.split.Tensor, (f(10, 5), 4), "(a! b) c -> (d! b) c, (e! b) c, b c | linear 1"),
    (
        aten.split_with_sizes.default,
        (f(5, 12), [8, 2, 2], 1),
        "a (b! c) -> a (d! c), a c, a c | linear 1",
    ),
    (aten.split_with_sizes.default, (f(7, 5), [3, 4]), "a! b -> c! b, d! b | linear 1"),
    (aten.chunk.default, (f(12, 5), 2), "(a! b) c -> b c, b c | linear 1"),
    (aten.unbind.int, (f(3, 5),), "a! b -> b, b, b | linear 1"),
    (aten.unbind.int, (f(5, 2), 1), "a b! -> a, a | linear 1"),
    (aten.select.int, (f(4, 5), 0, -1), "a! b -> b | linear 1"),
    (aten.select.int, (f(1, 5), 0, 0), "a b -> (a b) | linear 1"),
    (aten.cat.default, ([f(4, 5), f(4, 5)],), "a b, a b -> (c! a) b | linear 11"),
    (aten.cat.default, ([b(5, 4), b(5, 6)], -1), "a (b! c), a (d! c) -> a (e! c) | linear 11"),
    (aten.cat.default, ([f(3, 5), f(4, 5)],), "a! b, c! b -> d! b | linear 11"),
    (aten.cat.default, ([f(3, 4), f(3, 0)], 1), "a b, a 1 -> a b | linear 11"),
    (aten.cat.default, ([f(0), f(3, 4)], 1), "1, a b -> a b | linear 11"),
    (aten.cat.default, ([f(3, 4)], 1), "a b -> a b | linear 1"),
    (aten.stack.default, ([f(3, 5), f(3, 5)], 1), "a b, a b -> a c! b | linear 11"),
    (aten.stack.default, ([b(3), b(3), b(3)], -1), "a, a, a -> a b! | linear 111"),
    (
        aten.slice_scatter.default,
        (f(12, 5), f(4, 5), 0, 4, 8),
        "(a! b) c, b c -> (a! b) c | linear 11",
    ),
    (aten.slice_scatter.default, (f(12, 5), f(12, 5)), "_, a b -> a b | linear 01"),
    (
        aten.slice_scatter.default,
        (f(13, 5), f(4, 5), 0, 1, 13, 3),
        "a! b, c! b -> a! b | linear 11",
    ),
    (aten.slice_backward.default, (f(4, 5), [12, 5], 0, 4, 8, 1), "a b -> (c! a) b | linear 1"),
    (aten.slice_backward.default, (f(5, 4), [5, 7], 1, 3, 7, 1), "a b! -> a c! | linear 1"),
    (aten.select_scatter.default, (f(4, 5), f(5), 0, 2), "a! b, b -> a! b | linear 11"),
    (aten.select_backward.default, (f(5), [4, 5], 0, 2), "a -> b! a | linear 1"),
]


@pytest.mark.parametrize(("target", "args", "text"), CASES, ids=lambda v: str(v)[:40])
def test_rule(target: torch._ops.OpOverload, args: tuple[object, ...], text: str) -> None:
    assert check_op(RULES, target, args, expect=text) > 0


def test_halves_of_a_packed_weight_shard_as_two_units() -> None:
    call, _ = make_call(aten.split.Tensor, (f(12, 5), 6))
    rule = RULES.rule(call)
    choice = rule.match(rule.results[1], Shard(0, 1, 6), 4)
    assert choice is not None
    assert rule.operand_placement(0, choice) == Shard(0, 2, 6)


@given(
    st.integers(1, 24), st.integers(-26, 26), st.integers(-26, 26), st.sampled_from([1, 1, 2, 3])
)
@settings(max_examples=100)
def test_any_slice(extent: int, start: int, end: int, step: int) -> None:
    args = (f(3, extent), 1, start, end, step)
    check_op(RULES, aten.slice.Tensor, args, ranks=(2, 3), limit=3)


@given(st.lists(st.integers(0, 8), min_size=1, max_size=4), st.sampled_from([1, 2, 3]))
@settings(max_examples=60)
def test_any_split_and_cat(sizes: list[int], unit: int) -> None:
    sizes = [size * unit for size in sizes]
    whole = f(sum(sizes), 3)
    check_op(RULES, aten.split_with_sizes.default, (whole, sizes), ranks=(2, 3), limit=3)
    check_op(RULES, aten.cat.default, ([*whole.split(sizes)],), ranks=(2, 3), limit=3)


@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 12), st.sampled_from([1, 2, 3]))
@settings(max_examples=60)
def test_any_slice_scatter(extent: int, start: int, length: int, unit: int) -> None:
    extent, start = extent * unit, start * unit
    end = min(start + length * unit, extent)
    source = f(extent, 3)[start:end].clone()
    args = (f(extent, 3), source, 0, start, end)
    check_op(RULES, aten.slice_scatter.default, args, ranks=(2, 3), limit=3)
