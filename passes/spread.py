"""Spread: what the layout of one stored tensor implies for the tensors around it.

A recurrent state that lies by heads wants the projections that lead to it, the weights of the
convolution before it, its biases and decays, and the projection that reads it to lie by the same
heads. Which tensors those are, and which run of their features is which, is what the sharding rules
of the ops between say: dims that share a factor shard together. So the layout is followed from
value to value, forward and backward, until a contraction sums the heads away or a weight is
reached. What is packed is put together of its pieces, and is whole where no piece asks for more.

Invariant: every placement found fits its value, and follows from the start by rules alone.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import deque

from torch import fx

from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Placement,
    Segment,
    Segmented,
    Shard,
    segmented,
)
from rolemesh.compiler.ir.program import Program, operand_nodes, tensor_type
from rolemesh.compiler.ir.rule import Chunked, DimFactors, Rule, segments_of
from rolemesh.passes.calls import op_call
from rolemesh.passes.rules.registry import Rules

__all__ = ["spread"]


def spread(
    program: Program, start: fx.Node, placement: Placement, ranks: int, rules: Rules
) -> dict[fx.Node, Placement]:
    """Placements that follow from one value's.

    Args:
        program: A canonicalised Program.
        start: The value.
        placement: How it lies on an axis.
        ranks: Ranks of that axis.
        rules: Sharding rules.

    Returns:
        By value, for all values that are split because `start` is; `start` among them.
    """
    walk = _Walk(program, ranks, rules)
    walk.place(start, placement)
    return walk.run()


class _Walk:
    """Values placed so far, and those that wait for their pieces."""

    def __init__(self, program: Program, ranks: int, rules: Rules) -> None:
        self.order = {node: index for index, node in enumerate(program.graph.nodes)}
        self.tied = _new_values(program)
        self.ranks = ranks
        self.rules = rules
        self.known: dict[fx.Node, Rule] = {}
        self.placed: dict[fx.Node, Placement] = {}
        self.queue: deque[fx.Node] = deque()
        self.packed: dict[fx.Node, int] = {}  # values of which pieces are placed, with the dim

    def run(self) -> dict[fx.Node, Placement]:
        """Follow placements until nothing is left to follow."""
        while self.queue or self.packed:
            if self.queue:
                value = self.queue.popleft()
                for op in dict.fromkeys((_producer(value), *value.users)):
                    if op.op == "call_function" and op.target is not operator.getitem:
                        self._through(op, value)
                continue
            # A later value may be a piece of an earlier one.
            value = max(self.packed, key=self._readiness)
            self._assemble(value, self.packed.pop(value))
        return self.placed

    def place(self, value: fx.Node, placement: Placement | None) -> None:
        """Note that a value is split, unless it is already."""
        if isinstance(placement, Shard | Segmented) and value not in self.placed:
            self.placed[value] = placement
            self.packed.pop(value, None)
            self.queue.append(value)
            if value in self.tied:
                self.place(self.tied[value], placement)

    def _rule(self, op: fx.Node) -> Rule:
        if op not in self.known:
            self.known[op] = self.rules.rule(op_call(op), op.name)
        return self.known[op]

    def _through(self, op: fx.Node, value: fx.Node) -> None:
        """What a value's placement says of the other operands and results of an op."""
        rule, operands, results = self._rule(op), operand_nodes(op), _results(op)
        placement = self.placed[value]
        for index, operand in enumerate(operands):
            if operand is not value or index in rule.unread:
                continue
            if rule.joins is not None and rule.joins.dim == _dim(placement):
                self._wait(op, rule.joins.dim)
            else:
                self._choose(rule, rule.operands[index], placement, operands, results)
        for index, result in results.items():
            if result is not value:
                continue
            if rule.cuts is not None and rule.cuts.dim == _dim(placement):
                self._wait(operands[0], rule.cuts.dim)
            else:
                self._choose(rule, rule.results[index], placement, operands, results)

    def _choose(
        self,
        rule: Rule,
        dims: DimFactors,
        placement: Placement,
        operands: list[fx.Node],
        results: dict[int, fx.Node],
    ) -> None:
        choice = rule.match(dims, placement, self.ranks) or self._regrouped(rule, dims, placement)
        if choice is None:
            return
        for index, operand in enumerate(operands):
            self.place(operand, rule.operand_placement(index, choice))
        for index, result in results.items():
            self.place(result, rule.result_placement(index, choice))

    def _regrouped(self, rule: Rule, dims: DimFactors, placement: Placement) -> Chunked | None:
        """The choice for units in fewer groups than ranks, or for the units of such groups.

        Where four ranks have eight heads of two groups, each pair of ranks has one group.
        """
        if isinstance(placement, Segmented) and len(placement.segments) == 1:
            (only,) = placement.segments
            units = Shard(placement.dim, only.outer, only.size * only.copies)
            fits = only.length % (units.outer * units.size) == 0
            return rule.match(dims, units, self.ranks) if fits else None
        if not isinstance(placement, Shard) or placement.outer != 1 or placement.size % self.ranks:
            return None
        extents = [rule.sizes[factor] for factor in dims[placement.dim] if rule.sizes[factor] != 1]
        if not extents or extents[0] >= self.ranks or self.ranks % extents[0]:
            return None
        groups, length = extents[0], math.prod(extents)
        shared = Segment(length, 1, groups, self.ranks // groups)
        return rule.match(dims, Segmented(placement.dim, (shared,)), self.ranks)

    def _wait(self, value: fx.Node, dim: int) -> None:
        if value not in self.placed:
            self.packed[value] = dim

    def _pieces(self, value: fx.Node, dim: int) -> list[tuple[int, int, fx.Node]]:
        """Start, length and value of the pieces that a value is joined of, or cut into."""
        found: dict[tuple[int, int], fx.Node] = {}
        if value.op == "call_function" and value.target is not operator.getitem:
            joins = self._rule(value).joins
            if joins is not None and joins.dim == dim:
                found.update(zip(joins.bounds, operand_nodes(value), strict=True))
        for user in value.users:
            if user.op != "call_function" or user.target is operator.getitem:
                continue
            cuts = self._rule(user).cuts
            if cuts is not None and cuts.dim == dim:
                for index, result in _results(user).items():
                    if result in self.placed:
                        found[cuts.bounds[index]] = result
                    else:
                        found.setdefault(cuts.bounds[index], result)
        return sorted((*bounds, piece) for bounds, piece in found.items())

    def _readiness(self, value: fx.Node) -> tuple[bool, int]:
        pieces = self._pieces(value, self.packed[value])
        return all(piece in self.placed for *_, piece in pieces), self.order[value]

    def _assemble(self, value: fx.Node, dim: int) -> None:
        """Place a value by its pieces; what no piece tells of is whole."""
        segments: list[Segment] = []
        extent, end = tensor_type(value).shape[dim], 0
        pieces = self._pieces(value, dim)
        marks = {mark for start, length, _ in pieces for mark in (start, start + length)}
        placed = [(s, n, self.placed[piece]) for s, n, piece in pieces if piece in self.placed]
        for start, length, placement in (*placed, (extent, 0, REPLICATE)):
            if start < end:
                return  # pieces overlap
            whole = sorted({end, start} | {mark for mark in marks if end < mark < start})
            segments.extend(Segment(b - a, 1, 0) for a, b in itertools.pairwise(whole))
            if length:
                segments.extend(segments_of(placement, dim, length))
            end = start + length
        self.place(value, segmented(dim, segments))


def _new_values(program: Program) -> dict[fx.Node, fx.Node]:
    """The new value of every mutated input, and the input of that value: they lie alike."""
    pairs = [
        (program.placeholders[output.mutates], value)
        for value, output in zip(program.results, program.outputs, strict=True)
        if output.mutates is not None and isinstance(value, fx.Node)
    ]
    return {**dict(pairs), **{value: state for state, value in pairs}}


def _producer(value: fx.Node) -> fx.Node:
    if value.target is operator.getitem:
        return value.all_input_nodes[0]
    return value


def _results(op: fx.Node) -> dict[int, fx.Node]:
    """The values of an op's results that are used, by position."""
    picks = [user for user in op.users if user.target is operator.getitem]
    if not picks:
        return {0: op}
    return {index: pick for pick in picks if isinstance(index := pick.args[1], int)}


def _dim(placement: Placement) -> int:
    return placement.dim if isinstance(placement, Shard | Segmented) else -1
