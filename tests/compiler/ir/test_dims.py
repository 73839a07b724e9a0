"""Symbolic sizes compute as integers do, and say of themselves only what is so at every value."""

from __future__ import annotations

import copy
import itertools
import math
import operator
import pickle
from collections.abc import Mapping

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rolemesh.compiler.ir.dims import Dim, Scope, concrete, gcd, replaced
from rolemesh.compiler.ir.placement import Segment, Shard, ceil_div

NAMES = ("T", "B", "S")
Values = Mapping[sympy.Symbol, int]


def scope_of(*hints: int) -> tuple[Scope, list[Dim]]:
    """A scope with symbols T, B and S, as many as there are hints."""
    scope = Scope()
    sizes = [scope.symbol(name, value) for name, value in zip(NAMES, hints, strict=False)]
    return scope, [size for size in sizes if isinstance(size, Dim)]


def grid(scope: Scope, *options: int) -> list[Values]:
    """All ways to give the symbols one of the values."""
    symbols = list(scope.hints)
    return [
        dict(zip(symbols, chosen, strict=True))
        for chosen in itertools.product(options, repeat=len(symbols))
    ]


# ------------------------------------------------------------------------ expressions at all values

_LEAVES = st.sampled_from([*NAMES, 0, 1, 2, 3, 4, 6, -1])
_BINARY = st.sampled_from(["+", "-", "*", "//", "%", "gcd", "min", "max", "ceil_div"])
_TREES = st.recursive(_LEAVES, lambda inner: st.tuples(_BINARY, inner, inner), max_leaves=6)


def evaluated(tree: object, sizes: Mapping[str, int]) -> int:
    """An expression over integers or symbolic sizes; ZeroDivisionError as integers do.

    Divisors are made positive, as sizes are.
    """
    if isinstance(tree, str):
        return sizes[tree]
    if isinstance(tree, int):
        return tree
    assert isinstance(tree, tuple)
    name, left, right = tree[0], evaluated(tree[1], sizes), evaluated(tree[2], sizes)
    if name in ("//", "%", "ceil_div"):
        right = right * right + 1
    functions = {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "//": lambda: left // right,
        "%": lambda: left % right,
        "min": lambda: min(left, right),
        "max": lambda: max(left, right),
        "ceil_div": lambda: ceil_div(left, right),
        "gcd": lambda: gcd(left, right),
    }
    return functions[name]()


def has_gcd(tree: object) -> bool:
    return isinstance(tree, tuple) and (tree[0] == "gcd" or any(map(has_gcd, tree[1:])))


@settings(max_examples=150, deadline=None)
@given(_TREES, st.tuples(*[st.integers(2, 9)] * 3), st.lists(st.integers(2, 40), min_size=3))
def test_arithmetic_is_that_of_integers_at_every_value(
    tree: object, hints: tuple[int, ...], others: list[int]
) -> None:
    assume(not has_gcd(tree))  # a common divisor need not be the greatest one at each value
    scope, sizes = scope_of(*hints)
    made = evaluated(tree, dict(zip(NAMES, sizes, strict=True)))
    if isinstance(made, Dim):
        assert made.hint == evaluated(tree, dict(zip(NAMES, hints, strict=True)))
    else:
        assert type(made) is int
    assert scope.holds(scope.hints)
    for chosen in itertools.permutations(others[:4], 3):
        values = dict(zip(scope.hints, chosen, strict=True))
        if scope.holds(values):
            assert concrete(made, values) == evaluated(tree, dict(zip(NAMES, chosen, strict=True)))


@settings(max_examples=80, deadline=None)
@given(_TREES, _TREES, st.tuples(*[st.integers(2, 9)] * 3))
def test_equal_sizes_are_equal_at_every_value(
    left: object, right: object, hints: tuple[int, ...]
) -> None:
    scope, sizes = scope_of(*hints)
    named = dict(zip(NAMES, sizes, strict=True))
    a, b = evaluated(left, named), evaluated(right, named)
    assert (a == b) is not (a != b)
    if a == b:
        assert hash(a) == hash(b)
    for values in grid(scope, 2, 3, 7, 12):
        if a == b:
            assert concrete(a, values) == concrete(b, values)


@settings(max_examples=80, deadline=None)
@given(_TREES, _TREES, st.tuples(*[st.integers(2, 9)] * 3))
def test_order_is_right_wherever_its_assumptions_hold(
    left: object, right: object, hints: tuple[int, ...]
) -> None:
    scope, sizes = scope_of(*hints)
    named = dict(zip(NAMES, sizes, strict=True))
    a, b = evaluated(left, named), evaluated(right, named)
    found = [a < b, a <= b, a > b, a >= b]
    assert scope.holds(scope.hints)
    for values in grid(scope, 2, 3, 7, 12):
        if scope.holds(values):
            x, y = concrete(a, values), concrete(b, values)
            assert found == [x < y, x <= y, x > y, x >= y], (a, b, values)


@settings(max_examples=80, deadline=None)
@given(st.lists(_TREES, min_size=2, max_size=3), st.tuples(*[st.integers(2, 9)] * 3))
def test_a_common_divisor_divides_at_every_value(
    trees: list[object], hints: tuple[int, ...]
) -> None:
    scope, sizes = scope_of(*hints)
    named = dict(zip(NAMES, sizes, strict=True))
    extents = [evaluated(tree, named) for tree in trees]
    found = gcd(*extents)
    for values in grid(scope, 2, 3, 7, 12):
        divisor = concrete(found, values)
        for extent in concrete(extents, values):
            assert extent % divisor == 0 if divisor else extent == 0


# ------------------------------------------------------------------------------------- identity


def test_a_size_is_not_its_hint() -> None:
    _, (t,) = scope_of(8)
    assert t != 8
    assert not t == 8  # noqa: SIM201 - both operators
    assert t != 8
    assert t not in (1, 8)
    assert t == t + 2 - 2
    assert len({t, t * 1, t + 1, 8}) == 3
    assert (t, 4) == (t + 0, 4)


def test_equal_hints_are_not_equal_sizes() -> None:
    _, (t, b) = scope_of(6, 6)
    assert t != b
    assert t * b == b * t
    assert t - b != 0


def test_what_has_no_symbol_left_is_plain() -> None:
    _, (t, b) = scope_of(6, 4)
    for size, value in ((t - t, 0), (t * 6 // t, 6), (t * b % b, 0), (t * t // t // t, 1)):
        assert type(size) is int
        assert size == value
    assert t * t // t == t
    assert (2 * t + 4 * b) // 2 == t + 2 * b
    assert divmod(t * b, t) == (b, 0)
    assert divmod(7, t)[0] * t + divmod(7, t)[1] != 0


def test_what_is_not_known_to_be_zero_counts_as_something() -> None:
    """So `if size % ranks` takes the uneven way, and assumes nothing."""
    scope, (t,) = scope_of(8)
    assert t % 4
    assert t - 8
    assert t % 4 != 0
    assert not t * 4 % 4
    assert not scope.assumptions


def test_order_is_proven_by_ranges_where_it_can_be() -> None:
    scope, (t, b) = scope_of(5, 3)
    assert t > 1
    assert t >= 2
    assert t * b > t
    assert not t < 2
    assert t + b >= t
    assert t // 2 + 1 > 0
    assert max(1, t) == t
    assert min(0, t - 2) == 0
    assert not scope.assumptions


def test_order_is_assumed_where_it_cannot() -> None:
    scope, (t, b) = scope_of(5, 3)
    assert t > b
    assert t > 4
    t_, b_ = scope.hints
    assert {str(a) for a in scope.assumptions} == {"-B + T > 0", "T - 4 > 0"}
    assert scope.holds({t_: 9, b_: 8})
    assert not scope.holds({t_: 9, b_: 9})
    assert not scope.holds({t_: 4, b_: 3})
    assert not scope.holds({t_: 9, b_: 1})  # out of range
    assert not (b >= t)
    assert len(scope.assumptions) == 2


def test_floats_are_costs() -> None:
    scope, (t,) = scope_of(8)
    assert t * 0.5 == 4.0
    assert 1.5 * t == 12.0
    assert t / 2 == 4.0
    assert t > 7.5
    assert sum([t, 0.5]) == 8.5
    assert not scope.assumptions


def test_other_operators() -> None:
    scope, (t,) = scope_of(5)
    values = dict.fromkeys(scope.hints, 7)
    assert concrete([-t, +t, abs(t), abs(-t), 10 - t, 20 // t, 20 % t], values) == [
        *(-7, 7, 7, 7, 3, 2, 6)
    ]
    assert concrete(math.prod([t, 2, t]), values) == 98
    assert concrete(sum([t, 2, t]), values) == 16
    with pytest.raises(TypeError):
        t + "1"  # type: ignore[operator]


def test_a_power_is_a_formula() -> None:
    _, (t,) = scope_of(5)
    assert t**2 == t * t
    assert t**0 == 1
    with pytest.raises(TypeError, match="symbolic"):
        2**t


def test_bits_of_a_size_are_unknown() -> None:
    _, (t,) = scope_of(5)
    for name in ("and_", "or_", "xor", "lshift", "rshift"):
        for operands in ((t, 1), (1, t)):
            with pytest.raises(TypeError, match="symbolic size T"):
                getattr(operator, name)(*operands)
    with pytest.raises(TypeError, match="symbolic size T"):
        operator.invert(t)


# ----------------------------------------------------------------------------------------- scopes


def test_names_are_unique() -> None:
    scope, _ = scope_of(3)
    with pytest.raises(ValueError, match="symbol T exists"):
        scope.symbol("T", 4)


def test_scopes_do_not_mix() -> None:
    _, (t,) = scope_of(6)
    _, (other,) = scope_of(6)
    assert t != other
    for mixed in (lambda: t + other, lambda: t < other, lambda: gcd(t, other)):
        with pytest.raises(ValueError, match="two different graphs"):
            mixed()


def test_copies_are_the_size_itself() -> None:
    _, (t,) = scope_of(6)
    assert copy.copy(t) is t
    assert copy.deepcopy([t * 2])[0] is t * 2


def test_a_size_is_not_pickled() -> None:
    _, (t,) = scope_of(6)
    with pytest.raises(TypeError, match="symbolic size 2\\*T belongs to one process"):
        pickle.dumps([t * 2])


def test_values_are_read_from_inputs() -> None:
    scope, sizes = scope_of(6, 3)
    t, b = (size.formula for size in sizes)
    scope.sources = {t: (1, 0), b: (0, None)}
    assert scope.values([torch.tensor(9), torch.empty(4, 2)]) == {t: 4, b: 9}


def test_structures_become_concrete() -> None:
    scope, (t,) = scope_of(6)
    values = dict.fromkeys(scope.hints, 9)
    found = concrete({"a": [t, (t + 1, None)], "b": slice(0, t, None), "c": True}, values)
    assert found == {"a": [9, (10, None)], "b": slice(0, 9, None), "c": True}
    placement = concrete(Shard(0, 1, t), values)
    assert placement == Shard(0, 1, 9)
    assert isinstance(placement, Shard)
    assert concrete((Segment(t * 2, 1, t),), values) == (Segment(18, 1, 9),)
    assert replaced([t, 3], str) == ["T", 3]
