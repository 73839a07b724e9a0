"""Which node of one stage is which node of another.

Names alone do not say: one op more in a model renumbers what follows. Nodes are matched by where
they come from, in this order, each step among what the steps before left:

1. inputs by their name in the model;
2. if both stages are of one program, by the node's name, which passes keep;
3. ops by module, source line and op; equal ones in the order they come, after those whose operands
   are alike. Where a file was edited, lines are matched first;
4. what partitioning inserted, by the op, the value it moves and the op it is for;
5. ops that a pass made local, by module, source line and the name they were captured with, less
   its number;
6. by alignment of what is left of a module, longest common runs first: like ops, for source lines
   that moved; then whatever has like results on one source line, for ops that a pass replaced.

Alignment is `difflib.SequenceMatcher`'s: Ratcliff and Metzener, "Pattern matching: the gestalt
approach", 1988.

Invariant: a node has at most one partner, and inputs match inputs only.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from rolemesh.compiler.dump.reader import Node, Stage

__all__ = ["Matching", "is_inserted", "match"]

Key = Callable[[Node], Hashable]


@dataclass(frozen=True)
class Matching:
    """Partners of the nodes of two stages.

    Attributes:
        pairs: The name of each matched node of the first stage, and its partner's in the second.
        moved: Nodes of the first stage whose partner stands elsewhere among its matched neighbours.
    """

    pairs: Mapping[str, str]
    moved: frozenset[str]


def is_inserted(node: Node) -> bool:
    """Whether partitioning inserted the node, to bring a value elsewhere."""
    return node.op.startswith("mesh.") and bool(node.data.get("value"))


def match(left: Stage, right: Stage, *, one_program: bool, same_sizes: bool) -> Matching:
    """The partners of the nodes of two stages.

    Args:
        left: The first stage.
        right: The second.
        one_program: Whether both are stages of one program, so that names mean the same.
        same_sizes: Whether sizes tell nodes apart; not if the stages have other numbers of tokens.
    """
    matcher = _Matcher(left, right, same_sizes)
    matcher.inputs()
    if one_program:
        matcher.names()
    matcher.grouped(matcher.provenance, lambda node: not is_inserted(node))
    matcher.inserted()
    matcher.grouped(matcher.captured_as, lambda node: not is_inserted(node))
    matcher.aligned(lambda node: (node.op, matcher.alike(node)))
    matcher.aligned(lambda node: (node.op, matcher.results(node)))
    matcher.aligned(
        lambda node: (
            node.op if is_inserted(node) else matcher.source(node),
            matcher.results(node),
        )
    )
    return Matching(matcher.pairs, _moved(left, right, matcher.pairs))


class _Matcher:
    """The steps."""

    def __init__(self, left: Stage, right: Stage, same_sizes: bool) -> None:
        self.left, self.right = left, right
        self.same_sizes = same_sizes
        self.pairs: dict[str, str] = {}
        self.rest = ({**left.nodes}, {**right.nodes})
        self.input_names = {
            id(side): {entry["node"]: entry["name"] for entry in side.head["inputs"]}
            for side in (left, right)
        }
        self.side_of = {id(node): side for side in (left, right) for node in side.nodes.values()}
        self.lines = _moved_lines(left, right)

    def pair(self, left: Node, right: Node) -> None:
        self.pairs[left.name] = right.name
        del self.rest[0][left.name], self.rest[1][right.name]

    def inputs(self) -> None:
        """Step 1. Inputs that remain are not matched with anything else."""
        by_name = {
            entry["name"]: self.right.nodes[entry["node"]] for entry in self.right.head["inputs"]
        }
        for entry in self.left.head["inputs"]:
            other = by_name.pop(entry["name"], None)
            if other is not None:
                self.pair(self.left.nodes[entry["node"]], other)
        for rest in self.rest:
            for name in [name for name, node in rest.items() if node.op == "input"]:
                del rest[name]

    def names(self) -> None:
        """Step 2; a name that now stands for something else is no match."""
        for name, node in list(self.rest[0].items()):
            other = self.rest[1].get(name)
            if other is not None and (
                node.op == other.op or (node.module, node.source) == (other.module, other.source)
            ):
                self.pair(node, other)

    def inserted(self) -> None:
        """Step 4. One conversion serves several users: then the value alone says what it is."""

        def value(node: Node, field: str) -> object:
            name = node.data.get(field, "")
            return self.pairs.get(name, name) if self.side_of[id(node)] is self.left else name

        self.grouped(lambda node: (node.op, value(node, "value"), value(node, "user")), is_inserted)
        self.grouped(lambda node: (node.op, value(node, "value")), is_inserted)
        self.grouped(self.provenance, is_inserted)

    def grouped(self, key: Key, among: Callable[[Node], bool]) -> None:
        """Match nodes of one key: those that are alike in order, then out of order, then others."""
        groups: dict[Hashable, tuple[list[Node], list[Node]]] = {}
        for side, rest in enumerate(self.rest):
            for node in rest.values():
                if among(node):
                    groups.setdefault(key(node), ([], []))[side].append(node)
        for left, right in groups.values():
            if left and right:
                self._aligned(left, right, self.alike)
                self._in_order(left, right, self.alike)
                self._in_order(left, right, lambda _: ())

    def aligned(self, key: Key) -> None:
        """Step 6. What was inserted is matched by its op only."""
        modules: dict[str, tuple[list[Node], list[Node]]] = {}
        for side, rest in enumerate(self.rest):
            for node in rest.values():
                modules.setdefault(node.module, ([], []))[side].append(node)
        for left, right in modules.values():
            if left and right:
                self._aligned(left, right, key)

    def _aligned(self, left: Sequence[Node], right: Sequence[Node], key: Key) -> None:
        keys = [key(node) for node in left], [key(node) for node in right]
        matcher = SequenceMatcher(a=keys[0], b=keys[1], autojunk=False)
        for first, second, size in matcher.get_matching_blocks():
            for offset in range(size):
                self.pair(left[first + offset], right[second + offset])

    def _in_order(self, left: Sequence[Node], right: Sequence[Node], key: Key) -> None:
        waiting: dict[Hashable, list[Node]] = {}
        for node in right:
            if node.name in self.rest[1]:
                waiting.setdefault(key(node), []).append(node)
        for node in left:
            if node.name in self.rest[0] and waiting.get(key(node)):
                self.pair(node, waiting[key(node)].pop(0))

    def alike(self, node: Node) -> Hashable:
        """What tells equal ops on one line apart: results, operands, and arguments but sizes."""
        side = self.side_of[id(node)]
        names = self.input_names[id(side)]
        operands = tuple(names.get(name) or side.nodes[name].op for name in node.operands)
        return self.results(node), operands, tuple(_words(node.data.get("args", [])))

    def source(self, node: Node) -> str:
        """A node's source line, as the second stage has it."""
        if self.side_of[id(node)] is self.left:
            return self.lines.get(node.source, node.source)
        return node.source

    def provenance(self, node: Node) -> Hashable:
        """Module, source line and op."""
        return node.module, self.source(node), node.op

    def captured_as(self, node: Node) -> Hashable:
        """Module, source line and name without its number."""
        return node.module, self.source(node), re.sub(r"_\d+$", "", node.name)

    def results(self, node: Node) -> Hashable:
        """The types of a node's results."""
        shapes = [value["shape"] for value in node.data["types"]]
        return tuple(
            (value["dtype"], tuple(shape) if self.same_sizes else len(shape))
            for value, shape in zip(node.data["types"], shapes, strict=True)
        )


def _moved_lines(left: Stage, right: Stage) -> dict[str, str]:
    """Where source lines of the first stage are in the second, if its files were edited since.

    A line is known by the modules and ops it has. A file counts as edited if clearly more of its
    lines agree by their order than by their numbers.
    """
    found = {}
    sides = [_lines(stage) for stage in (left, right)]
    for file in sides[0].keys() & sides[1].keys():
        before, after = (side[file] for side in sides)
        unmoved = sum(after.get(line) == content for line, content in before.items())
        matcher = SequenceMatcher(a=[*before.values()], b=[*after.values()], autojunk=False)
        blocks = matcher.get_matching_blocks()
        if 10 * sum(block.size for block in blocks) > 11 * unmoved:
            numbers = [*before], [*after]
            for first, second, size in blocks:
                for offset in range(size):
                    old, new = numbers[0][first + offset], numbers[1][second + offset]
                    found[f"{file}:{old}"] = f"{file}:{new}"
    return found


def _lines(stage: Stage) -> dict[str, dict[int, Hashable]]:
    """By file and line number, what a line of the model's code has."""
    contents: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for node in stage.nodes.values():
        file, _, line = node.source.rpartition(":")
        if file and not is_inserted(node):
            lines = contents.setdefault(file, {})
            lines.setdefault(int(line), []).append((node.module, node.op))
    return {
        file: {line: tuple(lines[line]) for line in sorted(lines)}
        for file, lines in contents.items()
    }


def _words(value: Any) -> Iterable[Hashable]:
    """The arguments that are neither nodes nor sizes."""
    if isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str | float | bool | None):
        yield value


def _moved(left: Stage, right: Stage, pairs: Mapping[str, str]) -> frozenset[str]:
    """Nodes outside of the longest run of matched nodes that both stages have in one order.

    Patience sorting; see Fredman, "On computing the length of longest increasing subsequences",
    1975.
    """
    place = {name: index for index, name in enumerate(right.nodes)}
    names = [name for name in left.nodes if name in pairs]
    places = [place[pairs[name]] for name in names]
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int | None] = []
    for index, value in enumerate(places):
        length = bisect_left(tails, value)
        previous.append(ends[length - 1] if length else None)
        tails[length : length + 1] = [value]
        ends[length : length + 1] = [index]
    kept = set()
    at = ends[-1] if ends else None
    while at is not None:
        kept.add(names[at])
        at = previous[at]
    return frozenset(names) - kept
