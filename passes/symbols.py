"""Which dims are batch and sequence: symbols that follow the tokens through a Program.

A Program is traced at fixed sizes. For formulas, the batch and sequence dims of the token inputs
get the symbols B and T, and each op hands them on along the factors of its sharding rule: what an
operand has within a factor, a result has at the same place within it. So a symbol also passes an op
that sees a merged `[B * T]` as one factor. What no factor connects to the tokens stays a number.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import NamedTuple

import sympy
from torch import fx

from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.program import Program, operand_nodes, tensor_type, tensor_types
from rolemesh.compiler.ir.rule import DimFactors, Rule
from rolemesh.passes.tokens import token_inputs

__all__ = ["BATCH", "TOKENS", "Symbols", "follow_symbols"]

BATCH = sympy.Symbol("B", positive=True, integer=True)
TOKENS = sympy.Symbol("T", positive=True, integer=True)

Symbols = Mapping[Shard, sympy.Symbol]
"""Symbols of one value, by the factor of the dim they stand for."""


def follow_symbols(program: Program) -> dict[fx.Node, tuple[Symbols, ...]]:
    """The symbols of every value's dims.

    Args:
        program: A Program with decisions (after propagation, before partitioning).

    Returns:
        For each node, one mapping per result.
    """
    found: dict[fx.Node, tuple[Symbols, ...]] = {}
    for node in program.placeholders:
        found[node] = ({},)
    for node in token_inputs(program):
        batch, tokens = tensor_type(node).shape[:2]
        found[node] = ({Shard(0, 1, batch): BATCH, Shard(1, 1, tokens): TOKENS},)
    for node in program.ops:
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(position, int)
            found[node] = (found[source][position],)
            continue
        rule = program.decisions[node].rule
        factors: dict[_Place, sympy.Symbol] = {}
        for position, operand in enumerate(operand_nodes(node)):
            for shard, symbol in found[operand][0].items():
                place = _place(rule, rule.operands[position][shard.dim], shard)
                if place is not None:
                    factors.setdefault(place, symbol)
        found[node] = tuple(
            _placed(rule, dims, factors) if factors else {}
            for dims, _ in zip(rule.results, tensor_types(node), strict=True)
        )
    return found


class _Place(NamedTuple):
    """A part of a factor, seen as `[outer, size, inner]`."""

    factor: int
    outer: int
    size: int


def _place(rule: Rule, factors: tuple[int, ...], shard: Shard) -> _Place | None:
    """Where a part of a dim lies in the dim's factors; a factor of just its size comes first."""
    within: list[_Place] = []
    before = 1
    for factor in factors:
        extent = rule.sizes[factor]
        outer, rest = divmod(shard.outer, before)
        if not rest and extent % (outer * shard.size) == 0:
            within.append(_Place(factor, outer, shard.size))
            if outer == 1 and extent == shard.size:
                return within[-1]
        before *= extent
    return within[0] if within else None


def _placed(rule: Rule, dims: DimFactors, symbols: Mapping[_Place, sympy.Symbol]) -> Symbols:
    placed = {}
    for dim, factors in enumerate(dims):
        before = 1
        for factor in factors:
            for place, symbol in symbols.items():
                if place.factor == factor:
                    placed[Shard(dim, before * place.outer, place.size)] = symbol
            before *= rule.sizes[factor]
    return placed
