"""A bound graph with fewer of its repeats.

What becomes of a repeat (`rolemesh.lowering.repeats`) does not depend on how many there are. So all
but a few are left out before a graph is traced and rewritten. Those that are left out come back at
the end (`rolemesh.lowering.ge.lengthen`).

Invariants:

* The first repeats stay. What lies behind the repeats reads, of the last one that stays, the values
  and the inputs that it read of the last one.
* Repeats are left out only if nothing but that, and new values of inputs, leaves them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.node import Argument

from rolemesh.lowering.flatten import Fake
from rolemesh.lowering.repeats import Ops, Repeats, find_repeats, without_leaks

__all__ = ["Run", "Short", "shorten"]

_KEPT = 4
"""Repeats that stay: the first, which may compute what all share, two alike, and the last, of which
a part may become one with what lies behind it."""


@dataclass(frozen=True, eq=False)
class Run:
    """Repeats of a bound graph.

    Attributes:
        repeats: The repeats.
        rows: Inputs by name: those of a row are read in one place by one repeat after the other.
    """

    repeats: Repeats
    rows: Sequence[Sequence[str]]

    @property
    def left_out(self) -> int:
        """How many repeats the short graph does not have."""
        return self.repeats.count - _KEPT

    @cached_property
    def inputs(self) -> Mapping[str, tuple[Sequence[str], int]]:
        """The row and the place in it of each input that not every repeat reads."""
        return {name: (row, place) for row in self.rows for place, name in enumerate(row)}

    def later(self, name: str, repeats: int) -> str | None:
        """The input in the place of another one, some repeats later or earlier; None if none is."""
        if name not in self.inputs:
            return name
        row, place = self.inputs[name]
        return row[place + repeats] if 0 <= place + repeats < len(row) else None

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """By the name of a node, its repeat and its offset."""
        period = self.repeats.period
        return {
            self.repeats.node(repeat, offset).name: (repeat, offset)
            for repeat in range(self.repeats.count)
            for offset in range(period)
        }

    def renamed(self, name: str, repeats: int) -> str:
        """What a node of the traced graph is called some repeats later."""
        bound, separator, number = name.partition("__")
        if bound not in self.places:
            return f"{name}_{repeats}"  # a fused op, which no node of the bound graph is named for
        repeat, offset = self.places[bound]
        return f"{self.repeats.node(repeat + repeats, offset).name}{separator}{number}"


@dataclass(frozen=True)
class Short:
    """A bound graph with fewer repeats.

    Attributes:
        module: The short graph.
        whole: The graph that it was made of.
        runs: The repeats that it has fewer of.
        inputs: For each of its inputs, the index among those of the whole graph.
        outputs: Likewise for its outputs.
        mutated: By index of an output that is the new value of an input, the index of that input.
    """

    module: fx.GraphModule
    whole: fx.GraphModule
    runs: Sequence[Run]
    inputs: Sequence[int]
    outputs: Sequence[int]
    mutated: Mapping[int, int]


def shorten(
    module: fx.GraphModule, fakes: Sequence[Fake], mutated: Mapping[int, int], fewest: int
) -> Short | None:
    """A bound graph with few of its repeats; None if nothing in it repeats so often.

    Args:
        module: A bound graph.
        fakes: Fake tensors like its inputs, and values of symbols.
        mutated: By index of an output that is the new value of an input, the index of that input.
        fewest: Fewest repeats of which some are left out.
    """
    graph = module.graph
    inputs, results = graph.find_nodes(op="placeholder"), graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    found: list[Run] = []
    kinds = {node: _kind(fake) for node, fake in zip(inputs, fakes, strict=True)}
    updates = {index: inputs[place] for index, place in mutated.items()}

    def trim(repeats: Repeats) -> Repeats | None:
        kept = without_leaks(repeats)
        run = None if kept is None or kept.count < max(fewest, _KEPT + 1) else _run(kept, kinds)
        if run is None or not _can_leave_out(run, results, updates):
            return None
        found.append(run)
        return kept

    chosen = find_repeats(Ops.of(graph), trim)
    runs = [next(run for run in found if run.repeats is repeats) for repeats in chosen]
    symbols = [x for x, fake in zip(inputs, fakes, strict=True) if isinstance(fake, torch.SymInt)]
    return _Shortening(module, runs, updates).run(symbols) if runs else None


def _kind(value: Fake) -> object:
    """What is traced for one input demands of another in its place."""
    if isinstance(value, torch.SymInt):
        return str(value)
    # Sizes as text: to compare symbols would guard on them.
    return value.dtype, value.device, str(value.shape), str(value.stride())


def _run(repeats: Repeats, kinds: Mapping[fx.Node, object]) -> Run | None:
    """Repeats with the order of their inputs; None if these have none, or are not alike."""
    follows: dict[str, str] = {}
    for column in repeats.given.values():
        for one, other in itertools.pairwise(column):
            if one is other:
                continue
            if one not in kinds or other not in kinds or kinds[one] != kinds[other]:
                return None
            if follows.setdefault(one.name, other.name) != other.name:
                return None
    rows = [[name] for name in sorted(follows.keys() - follows.values())]
    for row in rows:
        while row[-1] in follows:
            row.append(follows[row[-1]])
    in_order = sum(map(len, rows)) == len(follows.keys() | follows.values())
    return Run(repeats, rows) if rows and in_order else None


def _can_leave_out(run: Run, results: Sequence[object], updates: Mapping[int, fx.Node]) -> bool:
    """Whether all that is read behind the repeats is of the last, but for new values of inputs."""
    repeats, left_out = run.repeats, run.left_out
    if any(slot.age >= _KEPT for slot in repeats.carried):
        return False
    after = repeats.ops.nodes[repeats.end :]
    read = {operand for node in after for operand in node.all_input_nodes}
    new_values: dict[int, dict[int, str]] = {}
    for index, value in enumerate(results):
        if not isinstance(value, fx.Node) or updates.get(index) is value:
            continue
        if index in updates and repeats.holds(value):
            repeat, offset = run.places[value.name]
            row = new_values.setdefault(offset, {})
            if repeat in row:
                return False
            row[repeat] = updates[index].name
        elif index not in updates:
            read.add(value)
        elif repeats.ops.index.get(value, -1) >= repeats.end:
            read.add(updates[index])
    if any(
        run.later(node.name, -left_out) is None
        or (repeats.holds(node) and run.places[node.name][0] < left_out)
        for node in read
    ):
        return False
    return all(
        row.keys() == set(range(repeats.count))
        and all(row[k] == run.later(row[0], k) for k in range(repeats.count))
        for row in new_values.values()
    )


class _Shortening:
    """The short graph under construction."""

    def __init__(
        self, module: fx.GraphModule, runs: Sequence[Run], updates: Mapping[int, fx.Node]
    ) -> None:
        self.module = module
        self.runs = runs
        self.updates = updates
        self.ops = runs[0].repeats.ops
        self.inputs = {node.name: node for node in module.graph.find_nodes(op="placeholder")}

    def run(self, symbols: Sequence[fx.Node]) -> Short:
        """The short graph, which has all symbols as inputs."""
        graph, short = self.module.graph, fx.Graph()
        results = graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        nodes = [node for node in self.ops.nodes if not self._is_left_out(node)]
        outputs = {i: self._result(i, x) for i, x in enumerate(results) if self._stays(i, x)}
        updates = {i: self._update(i, results[i]) for i in outputs if i in self.updates}
        used = {self._read(x, node) for node in nodes for x in node.all_input_nodes}
        used |= {value for value in outputs.values() if isinstance(value, fx.Node)}
        used |= {*updates.values(), *symbols}
        inputs = [*self.inputs.values()]
        copies: dict[fx.Node, fx.Node] = {}
        for node in (*inputs, *graph.find_nodes(op="get_attr")):
            if node in used:
                copies[node] = short.node_copy(node)

        def copied(value: fx.Node, reader: fx.Node) -> fx.Node:
            return copies[self._read(value, reader)]

        for node in nodes:
            copies[node] = short.node_copy(node, functools.partial(copied, reader=node))
        short.output(fx.map_arg(tuple(outputs.values()), copies.__getitem__))
        places = [index for index, node in enumerate(inputs) if node in used]
        return Short(
            _make_graph_module(self.module, short),
            self.module,
            self.runs,
            places,
            list(outputs),
            {
                number: places.index(inputs.index(updates[index]))
                for number, index in enumerate(outputs)
                if index in updates
            },
        )

    def _is_left_out(self, node: fx.Node) -> bool:
        index = self.ops.index.get(node, -1)
        return any(
            run.repeats.end - run.left_out * run.repeats.period <= index < run.repeats.end
            for run in self.runs
        )

    def _stays(self, index: int, value: object) -> bool:
        """Whether the short graph has an output."""
        update = self.updates.get(index)
        if update is None or not isinstance(value, fx.Node):
            return True
        return value is not update and not self._is_left_out(value)

    def _result(self, index: int, value: Argument) -> Argument:
        if not isinstance(value, fx.Node) or index in self.updates:
            return value
        return self._read(value)

    def _update(self, index: int, value: object) -> fx.Node:
        """The input that an output is the new value of."""
        found = self.updates[index]
        return self._read(found, value) if isinstance(value, fx.Node) else found

    def _read(self, value: fx.Node, reader: fx.Node | None = None) -> fx.Node:
        """What is read in the place of a value behind its repeats: that of the last that are left.

        Args:
            value: What is read in the whole graph.
            reader: The node that reads it; None for the output.
        """
        for run in self.runs:
            repeats = run.repeats
            if reader is not None and self.ops.index.get(reader, -1) < repeats.end:
                continue
            if repeats.holds(value):
                repeat, offset = run.places[value.name]
                return repeats.node(repeat - run.left_out, offset)
            if value.name in run.inputs:
                return self.inputs[str(run.later(value.name, -run.left_out))]
        return value
