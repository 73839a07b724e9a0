"""The families of ops that cases are drawn from, and the case of a seed."""

from __future__ import annotations

import random
from functools import partial

from tests.layouts import MESHES
from tests.passes.random.block_ops import attention, bias, constrain, experts, matmul, table
from tests.passes.random.case import Call, Case, live
from tests.passes.random.draw import Draw, Family
from tests.passes.random.lookup_ops import lookup, write, written
from tests.passes.random.shape_ops import arrange, create, cut, join, regroup, reshape
from tests.passes.random.value_ops import (
    binary,
    cast,
    compare,
    integer,
    norm,
    order,
    reduce,
    same_shape,
    truth,
    unary,
    where,
)  # fmt: skip
from tests.passes.random.values import draw_runs

from rolemesh.compiler.ir.dims import Dim

__all__ = ["FAMILIES", "draw_case", "draw_symbolic_case"]

FAMILIES: tuple[Family, ...] = (
    unary, binary, binary, same_shape, same_shape, compare, where, cast, matmul, matmul, bias,
    reshape, reshape, regroup, arrange, arrange, cut, cut, join, reduce, reduce, truth,
    integer, norm, order, lookup, lookup, write, create, attention, experts, table, table,
    constrain,
)  # fmt: skip


def draw_case(seed: int) -> Case:
    """A case without symbols, on any mesh."""
    rng = random.Random(seed)
    return _draw(rng, Draw(rng, rng.choice(MESHES), 0), 0)


def draw_symbolic_case(seed: int, runs: int = 2) -> Case:
    """A case with one to three symbols, on two axes.

    Args:
        seed: Of the case.
        runs: At how many values of the symbols to run it.
    """
    rng = random.Random(f"symbolic {seed}")
    mesh = rng.choice([mesh for mesh in MESHES if len(mesh.names) == 2])
    return _draw(rng, Draw(rng, mesh, rng.choice([1, 2, 2, 3])), runs)


def _draw(rng: random.Random, d: Draw, runs: int) -> Case:
    count = rng.randint(1, 3)
    while len(d.steps) < count:
        shape = d.shape(rng.choice([1, 2, 2, 3, 3]))
        if d.steps or not d.symbols or any(isinstance(size, Dim) for size in shape):
            d.attempt(partial(Draw.leaf, shape=shape))
    goal = rng.randint(3, 10)
    for _ in range(200):
        if sum(isinstance(step, Call) for step in d.steps) >= goal:
            break
        d.attempt(rng.choice(FAMILIES))
    d.mutate(written)
    d.choose_results()
    case = live(Case(d.mesh, tuple(d.steps), tuple(d.results), d.scope))
    return case if d.scope is None else draw_runs(rng, case, runs)
