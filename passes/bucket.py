"""Bucket: small collectives that do not depend on each other become one.

A collective costs a fixed time besides its bytes, and three small ones cost it three times: those
of latents, rotary keys and index keys that a model writes to three caches, for example. Here those
of one kind, over the same axes, of one dtype and (for reductions) of one operation share a bundle:
one op of the mesh dialect that takes a list of values. Their elements lie one after the other on
the wire, so a rank receives as many bytes as before.

A bundle stands where its last value is computed, and what reads the earlier ones comes after it. So
that nothing else is late, a bundle takes no more values once a later collective depends on one that
it has. Two kinds of collectives stay alone:

- those of more than `limit` bytes together, whose fixed time is small against their bytes;
- those of stored weights alone: they can start as early as memory allows.

Invariant: the order of a bundle's values, and of bundles, is that of the collectives they are made
of, so it is the same on every rank.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collective
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.program import InputKind, Origin, Program, origin, tensor_type

__all__ = ["Bucket", "reads_call"]


@dataclass(frozen=True)
class Bucket:
    """The pass; see the module docstring.

    Attributes:
        limit: Most bytes that a rank receives in one bundle.
    """

    limit: int = 16 << 20
    name = "bucket"
    requires = "a partitioned graph"
    ensures = "no two small collectives of one kind where one would do"

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise RolemeshError(
                "RM018",
                what=f"the limit of a bundle is {self.limit}",
                where="pass bucket",
                why="it is a number of bytes",
                fix="use 0 for no bundles",
            )

    def apply(self, program: Program) -> Program:
        """The program with bundles; unchanged if nothing can be bundled."""
        bundles = [found for found in self._bundles(program) if len(found) > 1]
        if not bundles:
            return program.after(self.name)
        return _Rewrite(program, bundles).run(self.name)

    def _bundles(self, program: Program) -> list[list[fx.Node]]:
        """Collectives by the bundle they belong to."""
        given = reads_call(program)
        found: list[list[fx.Node]] = []
        needs: dict[int, int] = {}  # bundles that a bundle needs, as bits
        taking: dict[int, _Open] = {}  # bundles that may take more
        settled = 0  # bundles that take no more, nor does any that they need
        reach: dict[fx.Node, int] = {}  # bundles that a node needs, as bits, but for settled ones
        for node in program.graph.nodes:
            bits = 0
            for operand in node.all_input_nodes:
                bits |= reach[operand]
            reach[node] = bits = bits & ~settled
            if not isinstance(node.target, MeshOp) or not node.target.communicates:
                continue
            bits = _closure(bits, needs)
            for index in [index for index in taking if bits >> index & 1]:
                del taking[index]
            for index in [i for i in needs if i not in taking and not needs[i] & ~settled]:
                settled |= 1 << index
                del needs[index]
            if node.target not in _KINDS or node not in given:
                continue
            size, key = collective(program, node).bytes_received, _key(node)
            fits = (
                i for i, b in taking.items() if b.key == key and b.received + size <= self.limit
            )
            place = next(fits, None)
            if place is None:
                place = len(found)
                taking[place] = _Open(key)
                found.append([])
                needs[place] = 0
            found[place].append(node)
            taking[place].received += size
            needs[place] |= bits
            reach[node] = bits | 1 << place
        return found


_KINDS = frozenset(
    {dialect.ALL_GATHER, dialect.ALL_REDUCE, dialect.ALL_TO_ALL, dialect.REDUCE_SCATTER}
)


@dataclass
class _Open:
    """A bundle that may take more."""

    key: object
    received: int = 0


def _key(node: fx.Node) -> object:
    return node.target, node.kwargs["axes"], node.kwargs.get("op"), tensor_type(node).dtype


def _closure(bits: int, needs: Mapping[int, int]) -> int:
    """Bundles among `bits`, and all that they need; settled ones need none that matters."""
    seen = 0
    while bits:
        lowest = bits & -bits
        seen |= lowest
        bits = (bits | needs.get(lowest.bit_length() - 1, 0)) & ~seen
    return seen


def reads_call(program: Program) -> set[fx.Node]:
    """Values that depend on what a call brings, and not on stored weights alone."""
    found: set[fx.Node] = set()
    inputs = dict(zip(program.placeholders, program.inputs, strict=True))
    for node in program.graph.nodes:
        entry = inputs.get(node)
        if entry is None:
            reads = any(operand in found for operand in node.all_input_nodes)
        else:
            reads = entry.mutated or entry.kind in _OF_A_CALL
        if reads:
            found.add(node)
    return found


_OF_A_CALL = (InputKind.USER, InputKind.TANGENT, InputKind.SAVED)


class _Rewrite:
    """The new graph; nodes that read a value of a bundle wait for it."""

    def __init__(self, program: Program, bundles: list[list[fx.Node]]) -> None:
        self.program = program
        self.bundles: Mapping[fx.Node, list[fx.Node]] = {found[-1]: found for found in bundles}
        self.early = {node for found in bundles for node in found[:-1]}
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        self.waiting: list[fx.Node] = []
        self.open: set[fx.Node] = set()  # of the nodes so far, those without a value

    def run(self, name: str) -> Program:
        for node in self.program.graph.nodes:
            if node in self.early:
                self.open.add(node)
            else:
                self._place(node)
        assert not self.waiting, self.waiting
        return self.program.after(name, graph=self.graph, layouts=self.layouts)

    def _place(self, node: fx.Node) -> None:
        bundle = self.bundles.get(node)
        if self.open and not all(
            self.open.isdisjoint(each.all_input_nodes) for each in bundle or (node,)
        ):
            self.waiting.append(node)
            self.open.add(node)
        elif bundle is None:
            self._define(node, copy_node(self.graph, node, self.values.__getitem__))
        else:
            self._bundle(bundle)
            waiting, self.waiting = self.waiting, []
            for later in waiting:
                self._place(later)

    def _bundle(self, members: list[fx.Node]) -> None:
        first, graph = members[0], self.graph
        kwargs: dict[str, object] = {}
        for key, value in first.kwargs.items():
            each = key in ("shard", "split", "concat")
            kwargs[key] = tuple(node.kwargs[key] for node in members) if each else value
        sources = [self.values[_source(member)] for member in members]
        node = add_call(graph, first.target, (sources,), kwargs, f"{first.name}_bundle")
        node.meta["type"] = tuple(tensor_type(member) for member in members)
        node.meta["origin"] = _origin(members)
        self.layouts[node] = tuple(self.program.layout(member) for member in members)
        for position, member in enumerate(members):
            item = add_call(graph, operator.getitem, (node, position), name=member.name)
            self._define(member, item)

    def _define(self, node: fx.Node, new: fx.Node) -> None:
        new.meta.update(node.meta)
        self.values[node] = new
        self.open.discard(node)
        if node in self.program.layouts:
            self.layouts[new] = self.program.layouts[node]


def _source(member: fx.Node) -> fx.Node:
    source = member.args[0]
    assert isinstance(source, fx.Node)
    return source


def _origin(members: list[fx.Node]) -> Origin:
    """Where a bundle comes from: the module around its values, and the reasons of them all.

    It is said to bring the first of its values; what takes the others out of it says so of them.
    """
    places = [origin(member) for member in members]
    paths = zip(*(place.module.split(".") for place in places), strict=False)
    around = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, paths)]
    reasons = dict.fromkeys(place.reason for place in places if place.reason)
    return replace(places[0], module=".".join(around), reason="; ".join(reasons))
