"""Values of the symbols that a case runs at: those where a hint in place of a size shows.

A size that divides by the ranks and one that does not, fewer than there are ranks, one that equals
another size of the program, all symbols equal, and anything.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import sympy
from tests.passes.random.case import Case, Values

from rolemesh.compiler.ir.dims import Dim

__all__ = ["KINDS", "draw_runs"]

_Symbols = Sequence[sympy.Symbol]
_Pick = Callable[[random.Random, Case, _Symbols], Values]


def _dividing(rng: random.Random, case: Case, symbols: _Symbols) -> Values:
    return {symbol: case.mesh.size * rng.choice((1, 2)) for symbol in symbols}


def _uneven(rng: random.Random, case: Case, symbols: _Symbols) -> Values:
    return {symbol: case.mesh.size + rng.choice((-1, 1, 3)) for symbol in symbols}


def _few(rng: random.Random, case: Case, symbols: _Symbols) -> Values:
    return {symbol: rng.choice((2, 3)) for symbol in symbols}


def _plain_size(rng: random.Random, case: Case, symbols: _Symbols) -> Values:
    sizes = {
        size
        for step in case.steps
        for value in step.types
        for size in value.shape
        if not isinstance(size, Dim) and size > 1
    }
    options = sorted(sizes) or [2]
    return {symbol: rng.choice(options) for symbol in symbols}


def _equal(rng: random.Random, case: Case, symbols: _Symbols) -> Values:
    return dict.fromkeys(symbols, rng.randint(2, 9))


def _any(rng: random.Random, case: Case, symbols: _Symbols) -> Values:
    return {symbol: rng.randint(2, 9) for symbol in symbols}


KINDS: Mapping[str, _Pick] = {
    "dividing": _dividing,
    "uneven": _uneven,
    "few": _few,
    "plain size": _plain_size,
    "equal": _equal,
    "any": _any,
}
_LARGEST = 5000


def draw_runs(rng: random.Random, case: Case, count: int) -> Case:
    """The case with `count` values of its symbols to run at; the hints are not among them.

    Args:
        rng: Of what is drawn.
        case: A case with symbols.
        count: How many.
    """
    assert case.scope is not None
    symbols, hints = tuple(case.scope.hints), dict(case.scope.hints)
    runs: list[Values] = []
    for _ in range(20):
        if len(runs) == count:
            break
        values = dict(rng.choice(list(KINDS.values()))(rng, case, symbols))
        for symbol in symbols:  # products of many large sizes take long and show no more
            if rng.random() < 0.2 or _most_elements(case, values) > _LARGEST:
                values[symbol] = rng.randint(2, 5)
        if values != hints and values not in runs and _most_elements(case, values) <= _LARGEST:
            runs.append(values)
    return replace(case, runs=tuple(runs))


def _most_elements(case: Case, values: Values) -> int:
    most = 0
    for step in case.steps:
        for value in step.types:
            count = 1
            for size in value.shape:
                count *= size.scope.value(size.formula, values) if isinstance(size, Dim) else size
            most = max(most, count)
    return most
