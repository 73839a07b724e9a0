"""Repeats: parts of a graph that are the same ops again and again, as layers of a model are.

A repeat is a sequence of nodes that follows itself: the same ops with the same plain arguments,
where every operand is

- an input of the graph, which may be another one in each repeat (its weights, its cache);
- the same node before all repeats (a mask, rotary angles);
- the node at the same distance: of the same repeat, or of an earlier one (hidden states, or the
  start of a collective that runs behind the layer before).

Nothing is known of models: the period is read off the distances between equal ops, and where it
begins does not matter. A graph without repeats has none.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from torch import fx

__all__ = [
    "Ops",
    "Repeats",
    "Slot",
    "Trim",
    "find_repeats",
    "is_input",
    "nodes_in",
    "without_leaks",
]

_PERIODS = 8
"""How many distances are tried as a period."""

_KINDS = 8
"""Most kinds of layers that take turns: where each has the weights of one rank, ranks of a node."""

_LEAST = 32
"""Fewest nodes of a repeat: below, a call of it is not worth its arguments."""


class Slot(NamedTuple):
    """A value of an earlier repeat: that of the node at `offset`, `age` repeats ago."""

    offset: int
    age: int


@dataclass(frozen=True)
class Ops:
    """What a graph computes, in order.

    Attributes:
        nodes: The nodes.
        index: The place of each of them.
        operands: For each of them, the nodes among its arguments in order, repeats kept.
        kinds: For each of them, a number that ops with the same plain arguments share.
    """

    nodes: Sequence[fx.Node]
    index: Mapping[fx.Node, int]
    operands: Sequence[Sequence[fx.Node]]
    kinds: Sequence[int]

    @classmethod
    def of(cls, graph: fx.Graph) -> Ops:
        """Those of a graph of calls of functions."""
        nodes = [node for node in graph.nodes if not is_input(node) and node.op != "output"]
        assert all(node.op == "call_function" for node in nodes), "a bound graph calls functions"
        numbers: dict[object, int] = {}
        operands: list[list[fx.Node]] = []
        kinds: list[int] = []
        for node in nodes:
            found: list[fx.Node] = []
            key = (id(node.target), _key(node.args, found), _key(node.kwargs, found))
            kinds.append(numbers.setdefault(key, len(numbers)))
            operands.append(found)
        return cls(nodes, {node: i for i, node in enumerate(nodes)}, operands, kinds)


@dataclass(frozen=True)
class Repeats:
    """`count` times `period` nodes, from the one at `start` on.

    Attributes:
        ops: The nodes that they are among.
        start: Index of the first node of the first repeat.
        period: Nodes of a repeat.
        count: How many repeats there are.
        moves: By offset, and for each operand in order, the distance to it where it moves on with
            the repeats; None for one that is given to each repeat.
    """

    ops: Ops
    start: int
    period: int
    count: int
    moves: Sequence[Sequence[int | None]]

    @property
    def end(self) -> int:
        """Index of the first node after the last repeat."""
        return self.start + self.period * self.count

    @property
    def saved(self) -> int:
        """Nodes that need not be written out."""
        return self.period * (self.count - 1)

    def node(self, repeat: int, offset: int) -> fx.Node:
        """The node at an offset of a repeat; of an earlier one, or before all, if negative."""
        return self.ops.nodes[self.start + repeat * self.period + offset]

    @cached_property
    def given(self) -> Mapping[tuple[int, int], Sequence[fx.Node]]:
        """By offset and operand, what is given to the repeats there: a value for each of them."""
        found: dict[tuple[int, int], Sequence[fx.Node]] = {}
        for offset, moves in enumerate(self.moves):
            rows = self.ops.operands[self.start + offset : self.end : self.period]
            for operand, move in enumerate(moves):
                if move is None:
                    found[offset, operand] = tuple([row[operand] for row in rows])
        return found

    @cached_property
    def carried(self) -> Sequence[Slot]:
        """Values that a repeat gets of earlier ones, to read or to hand on."""
        oldest: dict[int, int] = {}
        for offset, moves in enumerate(self.moves):
            for move in moves:
                if move is not None and move > offset:
                    slot = self.slot(offset - move)
                    oldest[slot.offset] = max(slot.age, oldest.get(slot.offset, 0))
        return [Slot(o, age) for o in sorted(oldest) for age in range(1, oldest[o] + 1)]

    def slot(self, offset: int) -> Slot:
        """The value at a negative offset."""
        return Slot(offset % self.period, -(offset // self.period))

    @cached_property
    def exported(self) -> Sequence[int]:
        """Offsets of values that every repeat gives to what is outside of the repeats."""
        return self._leaving(0)

    def holds(self, node: fx.Node) -> bool:
        """Whether a node is of a repeat."""
        return self.start <= self.ops.index.get(node, -1) < self.end

    def _leaving(self, repeat: int) -> list[int]:
        """Offsets of values that are read outside, and are not handed on until there."""
        found = []
        for offset in range(self.period):
            users = self.node(repeat, offset).users
            outside = any(not self.holds(user) for user in users)
            if outside and Slot(offset, self.count - repeat) not in self.carried:
                found.append(offset)
        return found

    def good(self) -> int:
        """How many of the repeats hold no value longer than one by one they would.

        A value that only some repeats give to what is outside would live for as long as a repeat
        runs, and so would what all repeats read, or hand on, and nothing after them does.
        """
        for repeat in range(self.count):
            if self._leaving(repeat) != self.exported:
                return repeat
        held = {values[0] for values in self.given.values() if not is_input(values[0])}
        held |= {node for node in self.last if node is not None}
        ends = all(any(self._follows(user) for user in node.users) for node in held)
        return self.count if ends else self.count - 1

    @property
    def first(self) -> Sequence[fx.Node | None]:
        """The carried values that the first repeat gets; None where there is no such node."""
        return self._handed_to(0)

    @property
    def last(self) -> Sequence[fx.Node | None]:
        """The values that the last repeat hands on."""
        return self._handed_to(self.count)

    def _handed_to(self, repeat: int) -> Sequence[fx.Node | None]:
        start = self.start + repeat * self.period
        places = [start + slot.offset - slot.age * self.period for slot in self.carried]
        return [self.ops.nodes[place] if place >= 0 else None for place in places]

    def _follows(self, node: fx.Node) -> bool:
        return self.ops.index.get(node, self.end) >= self.end


def is_input(node: fx.Node) -> bool:
    """Whether a node is there before a graph runs."""
    return node.op in ("placeholder", "get_attr")


def nodes_in(value: object) -> list[fx.Node]:
    """The nodes in an argument, in order, repeats kept."""
    found: list[fx.Node] = []
    _key(value, found)
    return found


Trim = Callable[[Repeats], Repeats | None]
"""As many of some repeats as are wanted, or cut elsewhere; None if none are."""


def find_repeats(ops: Ops, trim: Trim) -> Sequence[Repeats]:
    """The repeats among ops, in order, as `trim` leaves them."""
    return _within(ops, trim, 0, len(ops.nodes))


def _within(ops: Ops, trim: Trim, first: int, end: int) -> list[Repeats]:
    """Repeats of the nodes from `first` to `end`: those that save most, and those around them."""
    for period in _periods(ops.kinds, first, end):
        found = list(filter(None, map(trim, _of_period(ops, period, first, end))))
        if found:
            best = max(found, key=lambda repeats: repeats.saved)
            before = _within(ops, trim, first, best.start)
            return [*before, best, *_within(ops, trim, best.end, end)]
    return []


def _periods(kinds: Sequence[int], first: int, end: int) -> list[int]:
    """Likely periods, the one by which most ops repeat first.

    They are among the most frequent distances between an op and the next one of its kind, and the
    multiples of those: layers of several kinds in turn have most of their ops in common.
    """
    latest: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for index in range(first, end):
        kind = kinds[index]
        if kind in latest:
            distances[index - latest[kind]] += 1
        latest[kind] = index
    frequent = [distance for distance, _ in distances.most_common(_PERIODS)]
    multiples = (distance * turn for distance in frequent for turn in range(1, _KINDS + 1))
    tried = {period for period in multiples if _LEAST <= period <= (end - first) // 2}

    def repeated(period: int) -> int:
        return sum(map(operator.eq, kinds[first : end - period], kinds[first + period : end]))

    return sorted(tried, key=lambda period: (-repeated(period), period))


def _of_period(ops: Ops, period: int, first: int, end: int) -> Iterator[Repeats]:
    start, moves = first, list[list[int | None]]()
    for index in range(first, end + 1):
        following = _moves(ops, index, period) if index + period < end else None
        length = index - start
        if following is not None and (length < period or moves[-period] == following):
            moves.append(following)
            continue
        if length >= period:
            yield Repeats(ops, start, period, length // period + 1, moves[:period])
        start, moves = index + 1, []


def without_leaks(repeats: Repeats) -> Repeats | None:
    """As many of these repeats as hold no value too long; None if there are no two."""
    while repeats.count > 1:
        good = repeats.good()
        if good == repeats.count:
            return repeats
        if good > 1:
            repeats = replace(repeats, count=good)
        else:
            start = repeats.start + repeats.period
            repeats = replace(repeats, start=start, count=repeats.count - 1)
    return None


def _moves(ops: Ops, index: int, period: int) -> list[int | None] | None:
    """How the operands of an op move on to those of the op a period later; None if not so."""
    later = index + period
    if ops.kinds[index] != ops.kinds[later]:
        return None
    found: list[int | None] = []
    for one, other in zip(ops.operands[index], ops.operands[later], strict=True):
        place, moved = ops.index.get(one), ops.index.get(other)
        if one is other or (place is None and moved is None):
            found.append(None)
        elif place is None or moved is None or place + period != moved:
            return None
        else:
            found.append(index - place)
    return found


def _key(value: object, operands: list[fx.Node]) -> object:
    """A hashable form of an argument without its nodes, which `operands` gets.

    1, 1.0 and True, which compare equal, differ in it.
    """
    if isinstance(value, fx.Node):
        operands.append(value)
        return fx.Node
    if isinstance(value, tuple | list):
        return (type(value), *[_key(item, operands) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _key(item, operands)) for name, item in value.items()])
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return (slice, *[_key(part, operands) for part in parts])
    if isinstance(value, float):
        return repr(value)
    return type(value), value
