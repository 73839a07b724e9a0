"""Propagate: choose, for every op and mesh axis, how the op shards.

One forward pass per mesh axis, in graph order. An op's candidates are: doing nothing (every operand
whole), following one operand's shard, following the layout its result is pinned to, and letting
partial operands through where the op is linear. The cheapest wins, by the price of bringing the
operands there (`passes.cost.reshard_cost`, which partition pays later), the price of resolving a
partial result, and the work each rank then does.

Rules for partial values: one is never made from a whole value, so a bias is added exactly once; a
value with several users is resolved once, before them; a partial value passes a linear op only if
every operand that must be partial is.

On an axis of data parallelism tokens stay where they are whatever the sizes: weights count as
whole, to be gathered at use, and moving anything computed of tokens is dear. On an axis of tensor
parallelism it is the weights that stay (`rolemesh.passes.seed.Stays`).

Axes are independent but for two things: the bytes of a value already split by an earlier axis are
fewer, and two axes may not claim overlapping digits of one factor.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from rolemesh.compiler.ir.dims import Dim
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Partial,
    Placement,
    Replicate,
    Routed,
    Segmented,
    Shard,
    same_placement,
)
from rolemesh.compiler.ir.program import (
    Alternative,
    Decision,
    InputKind,
    Program,
)
from rolemesh.compiler.ir.rule import (
    Choice,
    JoinSegments,
    Kind,
    Linear,
    Lookup,
    Route,
    Split,
    SplitSegments,
    TakeSegments,
    Whole,
)
from rolemesh.passes.calls import Calls, Op
from rolemesh.passes.constraints import pinned_values
from rolemesh.passes.cost import CostTable, reshard_cost
from rolemesh.passes.homes import Homes
from rolemesh.passes.naming import stored_names, value_label
from rolemesh.passes.overlap import overlap
from rolemesh.passes.rules import default_rules
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.seed import Stays

__all__ = ["Propagate"]

WHOLE = Whole()
Placements = tuple[Placement, ...]


_TOKENS, _PIN, _NOTHING = -1, -2, -3
"""What a candidate follows, where it is no operand."""


_DEAR = 1e9
"""What moving a byte costs, in bytes, that should stay: less than infinity, if it must be moved."""


class _Candidate(NamedTuple):
    price: float
    moved: float
    choice: Choice
    results: Placements
    driver: int


class _Best(NamedTuple):
    """The cheapest candidate, and the one to compare it with where there is a choice to explain."""

    candidate: _Candidate
    second: _Candidate | None
    explained: bool
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Propagate:
    """The pass; see the module docstring.

    Attributes:
        costs: Prices of collectives and arithmetic.
        rules: Sharding rules.
        stays: By axis, what is never moved along it.
    """

    costs: CostTable = field(default_factory=CostTable)
    rules: Rules = field(default_factory=default_rules)
    stays: Mapping[str, Stays] = field(default_factory=dict)
    name = "propagate"
    requires = "layouts of all inputs"
    ensures = "layouts of all values and a decision per op"

    def apply(self, program: Program) -> Program:
        """The program with a decision per op and a layout per value."""
        mesh = program.the_mesh
        pins = pinned_values(program)
        ops: dict[fx.Node, Op] = {}
        calls = Calls(self.rules)
        picks: list[fx.Node] = []
        for node in program.ops:
            if node.target is operator.getitem:
                picks.append(node)
            else:
                ops[node] = calls.op(node)
        axes = [
            _Axis(self, program, index, mesh.sizes[index], pins, ops)
            for index in range(len(mesh.names))
        ]
        for index, axis in enumerate(axes):
            axis.run(axes[:index])
        layouts = dict(program.layouts)
        decisions = {}
        for node, op in ops.items():
            decisions[node] = Decision(
                op.call,
                op.rule,
                tuple([axis.choices[node] for axis in axes]),
                tuple([axis.reasons.get(node, "") for axis in axes]),
                tuple([axis.alternatives.get(node, ()) for axis in axes]),
            )
        lain: dict[tuple[Placements, ...], tuple[Layout, ...]] = {}
        for node in (*ops, *picks):
            rows = tuple([axis.placements[node] for axis in axes])
            found = lain.get(rows)
            if found is None:
                found = lain[rows] = tuple(map(Layout, zip(*rows, strict=True)))
            layouts[node] = found
        return program.after(self.name, layouts=layouts, decisions=decisions)


class _Axis:
    """The forward pass over one mesh axis."""

    def __init__(
        self,
        options: Propagate,
        program: Program,
        index: int,
        ranks: int,
        pins: Mapping[fx.Node, Layout],
        ops: Mapping[fx.Node, Op],
    ) -> None:
        self.costs = options.costs
        self.program = program
        self.index = index
        self.ranks = ranks
        self.ops = ops
        # One rank holds everything, whatever its layout is called.
        self.pins = {n: layout.placements[index] for n, layout in pins.items() if ranks > 1}
        stays = options.stays.get(program.the_mesh.names[index], Stays.NOTHING)
        weights = {
            node
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
            if entry.kind is InputKind.PARAMETER
        }
        gathered = weights if stays is Stays.TOKENS else set()
        self.placements: dict[fx.Node, Placements] = {
            node: (
                layouts[0].placements[index] if ranks > 1 and node not in gathered else REPLICATE,
            )
            for node, layouts in program.layouts.items()
            if node.op == "placeholder"
        }
        self.staying: Collection[fx.Node] = _computed_of(weights, program)
        if stays is Stays.TOKENS:
            self.staying = [node for node in program.graph.nodes if node not in self.staying]
        self.staying = frozenset(() if stays is Stays.NOTHING else self.staying)
        self.names = stored_names(program)
        self.choices: dict[fx.Node, Choice] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.alternatives: dict[fx.Node, tuple[Alternative, ...]] = {}
        self.homes = Homes(program, self.placements, ops, ranks)
        # Layers repeat: what was decided for an equal call in equal circumstances.
        self.decided: dict[object, _Best] = {}

    def run(self, earlier: list[_Axis]) -> None:
        placements = self.placements
        for node in self.program.ops:
            if node.target is operator.getitem:
                source, position = node.args
                assert isinstance(source, fx.Node)
                assert isinstance(position, int)
                placements[node] = (placements[source][position],)
                self.homes.take(node, source, position)
                continue
            op = self.ops[node]
            sources = [placements[operand][0] for operand in op.operands]
            pin = self.pins.get(node)
            home = self.homes.follow(op)
            if pin is None and sources.count(REPLICATE) == len(sources):
                self.choices[node] = WHOLE
                placements[node] = (REPLICATE,) * len(op.types)
                continue
            self._decide(op, sources, pin, home, earlier)

    def _decide(
        self,
        op: Op,
        sources: list[Placement],
        pin: Placement | None,
        home: Split | None,
        earlier: list[_Axis],
    ) -> None:
        node = op.node
        taken: tuple[tuple[Choice, int], ...] = ()
        split: tuple[int, ...] = ()
        if earlier:
            taken = tuple([(axis.choices[node], axis.ranks) for axis in earlier])
            split = tuple(self._already_split(op, earlier))
        key: object = None
        best: _Best | None = None
        if op.rule.select is None:  # else a choice names an operand
            pending = [n for n, p in zip(op.operands, sources, strict=True) if type(p) in _PENDING]
            used = tuple([_uses(operand) > 1 for operand in pending])
            staying = tuple([operand in self.staying for operand in op.operands])
            key = (id(op.call), tuple(sources), pin, home, taken, split, used, staying)
            best = self.decided.get(key)
        if best is None:
            best = self._best(op, sources, pin, home, split or self._whole(op), taken)
            if key is not None:
                self.decided[key] = best
        self.choices[node] = best.candidate.choice
        self.placements[node] = best.candidate.results
        self.alternatives[node] = best.alternatives
        if best.explained:
            self.reasons[node] = self._reason(op, best)

    def _best(
        self,
        op: Op,
        sources: list[Placement],
        pin: Placement | None,
        home: Split | None,
        split: Sequence[int],
        taken: Sequence[tuple[Choice, int]],
    ) -> _Best:
        """The cheapest candidate; among equals, the first."""
        candidates = []
        for choice, driver in self._drivers(op, sources, pin, home).items():
            if taken and overlap(op.rule, taken, choice, self.ranks):
                continue
            candidate = self._price(op, sources, choice, driver, pin, split, home is not None)
            if candidate is not None:
                candidates.append(candidate)
        if pin is None:
            candidates.extend(self._linear(op, sources, split, home is not None))
        elif not candidates:  # the op cannot give that layout: compute whole, cut afterwards
            whole = self._price(op, sources, WHOLE, _NOTHING, None, split, False)
            assert whole is not None
            candidates.append(whole)
        best = min(candidates, key=operator.itemgetter(0))
        others = [c for c in candidates if c is not best and c.price > 0]
        second = min(others, key=operator.itemgetter(0)) if others and best.price > 0 else None
        explained = len(candidates) > 1 and bool(
            best.moved or isinstance(best.choice, Split | SplitSegments | JoinSegments)
        )
        alternatives = (
            ()
            if len(candidates) == 1
            else tuple(map(_alternative, sorted(candidates, key=operator.itemgetter(0))))
        )
        return _Best(best, second, explained, alternatives)

    def _drivers(
        self, op: Op, sources: list[Placement], pin: Placement | None, home: Split | None
    ) -> dict[Choice, int]:
        """Choices worth pricing, each with the operand that it follows."""
        rule = op.rule
        drivers: dict[Choice, int] = {WHOLE: _NOTHING}
        for position, source in enumerate(sources):
            choice = self._follow(op, position, source)
            if choice is not None:
                drivers.setdefault(choice, position)
        joined = rule.join(sources)
        if joined is not None:
            drivers.setdefault(joined, next(i for i, s in enumerate(sources) if _splits(s)))
        if home is not None and not all(isinstance(source, Replicate) for source in sources):
            drivers.setdefault(home, _TOKENS)
        if pin is not None and rule.results:
            matched = rule.match(rule.results[0], pin, self.ranks)
            if isinstance(matched, TakeSegments | JoinSegments) or (
                matched is not None and rule.kinds[matched.factor] is Kind.PASS
            ):
                drivers.setdefault(matched, _PIN)
        return drivers

    def _whole(self, op: Op) -> tuple[int, ...]:
        return (1,) * (len(op.operands) + len(op.types))

    def _already_split(self, op: Op, earlier: list[_Axis]) -> list[int]:
        """Into how many parts earlier axes split each operand and then each result."""
        split = [1] * (len(op.operands) + len(op.types))
        for axis in earlier:
            for position, operand in enumerate(op.operands):
                if isinstance(axis.placements[operand][0], Shard | Segmented):
                    split[position] *= axis.ranks
            for position, placement in enumerate(axis.placements[op.node], len(op.operands)):
                if isinstance(placement, Shard | Segmented):
                    split[position] *= axis.ranks
        return split

    def _follow(self, op: Op, position: int, source: Placement) -> Choice | None:
        rule = op.rule
        if position in rule.unread:
            return None
        select = rule.select
        if isinstance(source, Routed) and select is not None and position in select.follows:
            key = f"{select.by}:{op.operands[select.operand].name}:{rule.sizes[select.factor]}"
            if source.key == key:
                return Lookup(select.factor, 1, rule.sizes[select.factor], key)
        choice = rule.match(rule.operands[position], source, self.ranks)
        if isinstance(choice, Route) and rule.kinds[choice.factor] is Kind.REDUCE:
            return None  # rows of other ranks would count: a sum is linear, and masks them first
        if isinstance(choice, TakeSegments | JoinSegments) or choice is None or select is None:
            return choice
        if choice.factor != select.factor:
            return choice
        if not isinstance(choice, Split) or choice.outer != 1:
            return None
        if choice.size != rule.sizes[choice.factor] or isinstance(choice.size, Dim):
            return None
        key = f"{select.by}:{op.operands[select.operand].name}:{choice.size}"
        return Lookup(choice.factor, 1, choice.size, key)

    def _price(
        self,
        op: Op,
        sources: list[Placement],
        choice: Choice,
        driver: int,
        pin: Placement | None,
        split: Sequence[int],
        scatters: bool,
    ) -> _Candidate | None:
        rule = op.rule
        results = tuple(rule.result_placement(i, choice) for i in range(len(op.types)))
        if pin is not None and not same_placement(results[0], pin, op.types[0].shape, self.ranks):
            return None
        moved = 0.0
        for position, (operand, source) in enumerate(zip(op.operands, sources, strict=True)):
            target = rule.operand_placement(position, choice)
            moved += self._reshard(operand, source, target, split[position])
        work = op.flops / self.costs.flops_per_byte
        if isinstance(choice, Lookup):
            work /= self.ranks  # a rank computes what its own entries are picked for
        pending = 0.0
        for position, (value, placement) in enumerate(zip(op.types, results, strict=True)):
            nbytes = value.nbytes / split[len(sources) + position]
            work += self.costs.memory * nbytes
            if isinstance(placement, Partial):
                pending += self._resolved(nbytes, scatters)
        if isinstance(choice, Split | SplitSegments | TakeSegments | JoinSegments):
            work /= self.ranks
        price = moved + pending + work
        return None if price == float("inf") else _Candidate(price, moved, choice, results, driver)

    def _linear(
        self, op: Op, sources: list[Placement], split: Sequence[int], scatters: bool
    ) -> list[_Candidate]:
        """Candidates that let partial operands through; routed ones are sums of masked rows."""
        kinds = [Partial() if isinstance(source, Routed) else source for source in sources]
        pending = [isinstance(kind, Partial) for kind in kinds]
        # A pending maximum passes no arithmetic.
        if any(isinstance(kind, Partial) and kind.op not in ("sum", "avg") for kind in kinds):
            return []
        if not any(pending) or len(op.types) > 1:  # several results are several sums
            return []
        found = []
        for pattern, flags in enumerate(op.rule.linear):
            if any(
                flag != is_pending
                or (flag and (_uses(operand) > 1 or kind != kinds[flags.index(True)]))
                for flag, is_pending, operand, kind in zip(
                    flags, pending, op.operands, kinds, strict=True
                )
            ):
                continue
            summed = next(kind for kind in kinds if isinstance(kind, Partial))
            moved = sum(
                self._reshard(operand, source, summed if flag else REPLICATE, split[position])
                for position, (operand, source, flag) in enumerate(
                    zip(op.operands, sources, flags, strict=True)
                )
            )
            if moved == float("inf"):
                continue
            nbytes = sum(value.nbytes for value in op.types) / split[len(sources)]
            # A hair below resolving first, and more than writing whole results costs, so that ties
            # stay partial and resolve once, later.
            price = moved + 0.99 * self._resolved(nbytes, scatters) + self.costs.memory * nbytes
            choice = Linear(pattern, summed.op)
            results = (Partial(summed.op),) * len(op.types)
            found.append(_Candidate(price, moved, choice, results, _NOTHING))
        return found

    def _reshard(
        self, operand: fx.Node, source: Placement, target: Placement | None, split: int
    ) -> float:
        if target is None or source == target or isinstance(source, Replicate):
            return reshard_cost(source, target, 0, self.ranks, self.costs)
        value = operand.meta["type"]
        price = reshard_cost(source, target, value.nbytes / split, self.ranks, self.costs)
        return price * _DEAR if operand in self.staying and _splits(source) else price

    def _resolved(self, nbytes: float, scatters: bool) -> float:
        target = Shard(0, 1, self.ranks) if scatters else REPLICATE
        return reshard_cost(Partial(), target, nbytes, self.ranks, self.costs)

    def _reason(self, op: Op, best: _Best) -> str:
        chosen, second = best.candidate, best.second
        if chosen.driver != _NOTHING:
            reason = f"follows {self._label(op, chosen.driver)}"
        elif isinstance(chosen.choice, Linear):
            reason = "the op is linear, so the sum stays pending"
        else:
            reason = "needs its operands whole"
        if second is not None and second.price >= _DEAR:
            reason += "; anything else would move what stays on this axis"
        elif second is not None:
            instead = "whole operands"
            if second.driver != _NOTHING:
                instead = f"following {self._label(op, second.driver)}"
            reason += f"; {instead} instead: {second.price / chosen.price:.1f}x the cost"
        return reason

    def _label(self, op: Op, driver: int) -> str:
        if driver == _TOKENS:
            return "the tokens"
        if driver == _PIN:
            return "the layout its result must have"
        return value_label(op.operands[driver], self.names)


def _alternative(candidate: _Candidate) -> Alternative:
    driver = candidate.driver
    follows = {_TOKENS: "tokens", _PIN: "result", _NOTHING: ""}.get(driver, f"operand {driver}")
    return Alternative(candidate.choice, candidate.price, candidate.moved, follows)


def _computed_of(weights: Collection[fx.Node], program: Program) -> set[fx.Node]:
    """Weights, and what is computed of nothing else."""
    found = set(weights)
    for node in program.ops:
        if node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _splits(placement: Placement) -> bool:
    return isinstance(placement, Shard | Segmented)


_PENDING = (Partial, Routed)
"""Placements of what is still to be summed, or masked and summed."""


def _uses(node: fx.Node) -> int:
    return sum(len(user.users) if user.target is operator.getitem else 1 for user in node.users)
