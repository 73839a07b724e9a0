"""Repeats of a bound graph, lowered a few times and stamped for the rest.

What a repeat (`rolemesh.lowering.repeats`) becomes does not depend on how many of them there are. So
all but the first few are left out of a graph before it is traced and rewritten (`shorten`). In the
result the repeats are looked for again: where one ends may have moved, since fused ops cross the
ends of layers. There `lengthen` puts one call (`rolemesh.lowering.ge.stamp`), for which torchair's
converter adds GE's ops of those that were left out.

Invariants:

* Nothing is taken for granted: repeats of the result are those of the graph only if each reads the
  inputs that come next, of every input that repeats read. Otherwise `UnlikeError` says that the
  graph is to be lowered whole.
* A graph has the inputs and outputs that it had, in their order.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module

from rolemesh.lowering.flatten import Fake
from rolemesh.lowering.ge.loader import Torchair
from rolemesh.lowering.ge.stamp import Stamp, UnlikeError, mark
from rolemesh.lowering.repeats import Ops, Repeats, find_repeats, without_leaks

__all__ = ["Short", "shorten"]

_KEPT = 4
"""Repeats that are lowered: the first, which may compute what all share, the last, and two alike."""


@dataclass(frozen=True)
class _Run:
    """Repeats of a bound graph.

    Attributes:
        repeats: The repeats.
        follows: By the name of an input that one of them reads, that of the input which the next
            one reads there.
    """

    repeats: Repeats
    follows: Mapping[str, str]

    @property
    def left_out(self) -> int:
        """How many repeats the short graph does not have."""
        return self.repeats.count - _KEPT

    def later(self, name: str, repeats: int) -> str:
        """The input in the place of another one, some repeats later."""
        for _ in range(repeats if name in self.follows else 0):
            name = self.follows[name]
        return name

    def earlier(self, name: str) -> str | None:
        """The input that is read in the short graph for one behind the repeats; None if none is."""
        if name not in self.inputs:
            return name
        before = {other: one for one, other in self.follows.items()}
        found: str | None = name
        for _ in range(self.left_out):
            found = before.get(found) if found else None
        return found

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Names of all inputs that not every repeat reads."""
        return frozenset([*self.follows, *self.follows.values()])

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
    runs: Sequence[_Run]
    inputs: Sequence[int]
    outputs: Sequence[int]
    mutated: Mapping[int, int]

    def lengthen(
        self, short: fx.GraphModule, kept: Sequence[int], fakes: Sequence[Fake], torchair: Torchair
    ) -> tuple[fx.GraphModule, tuple[int, ...]]:
        """The whole graph, rewritten as the short one was.

        Args:
            short: What became of the short graph.
            kept: Indices of the outputs that it returns.
            fakes: Example inputs of the whole graph.
            torchair: The torchair that converts it.

        Returns:
            The graph, and the indices of outputs that it returns.

        Raises:
            UnlikeError: If its repeats are not those of the bound graph.
        """
        results = self.whole.graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        for place in kept:
            value = results[self.outputs[place]]
            if place in self.mutated and any(run.repeats.holds(value) for run in self.runs):
                raise UnlikeError("repeats return new values of inputs")
        returned = tuple([self.outputs[place] for place in kept])
        return _Lengthening(self, short, fakes, torchair).run(), returned


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
    found: list[_Run] = []
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


def _run(repeats: Repeats, kinds: Mapping[fx.Node, object]) -> _Run | None:
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
    is_order = follows and len(follows) == len({*follows.values()})
    return _Run(repeats, follows) if is_order else None


def _can_leave_out(run: _Run, results: Sequence[object], updates: Mapping[int, fx.Node]) -> bool:
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
        run.earlier(node.name) is None
        or (repeats.holds(node) and run.places[node.name][0] < left_out)
        for node in read
    ):
        return False
    return all(
        row.keys() == set(range(repeats.count))
        and all(run.follows.get(row[k]) == row[k + 1] for k in range(repeats.count - 1))
        for row in new_values.values()
    )


class _Shortening:
    """The short graph under construction."""

    def __init__(
        self, module: fx.GraphModule, runs: Sequence[_Run], updates: Mapping[int, fx.Node]
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
        for node in nodes:
            copies[node] = short.node_copy(node, lambda x, node=node: copies[self._read(x, node)])  # type: ignore[misc]
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

    def _result(self, index: int, value: object) -> object:
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
                return self.inputs[str(run.earlier(value.name))]
        return value


class _Lengthening:
    """The rewritten whole graph under construction."""

    def __init__(
        self, short: Short, module: fx.GraphModule, fakes: Sequence[Fake], torchair: Torchair
    ) -> None:
        self.short = short
        self.module = module
        self.fakes = fakes
        self.torchair = torchair
        self.ops = Ops.of(module.graph)
        self.runs: dict[int, _Run] = {}  # by the first node of the repeats that are of it
        self.found: Sequence[Repeats] = ()
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[str, fx.Node] = {}
        self.marks: list[fx.Node] = []
        self.stamped: dict[tuple[fx.Node, int], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        self.found = find_repeats(self.ops, self._matched)
        matched = [self.runs[repeats.start] for repeats in self.found]
        if sorted(map(id, matched)) != sorted(map(id, self.short.runs)):
            raise UnlikeError("not all repeats are repeats after rewriting")
        whole = self.short.whole.graph.find_nodes(op="placeholder")
        for number, (node, fake) in enumerate(zip(whole, self.fakes, strict=True)):
            target = f"arg{number}_1"  # as tracing calls it, and torchair the op
            made = self.graph.create_node("placeholder", target, name=node.name)
            made.meta["val"] = fake
            self.inputs[node.name] = made
        for node in self.module.graph.find_nodes(op="get_attr"):
            self.copies[node] = self.graph.node_copy(node)
        last = {repeats.end - repeats.period: repeats for repeats in self.found}
        before = {repeats.end - 2 * repeats.period for repeats in self.found}
        ends = {repeats.end: repeats for repeats in self.found}
        for place, node in enumerate([*self.ops.nodes, self.module.graph.output_node()]):
            if place in ends:
                self._stamp(ends[place])
            if place in last or place in before:
                self.marks.append(self.graph.call_function(mark))
            self.copies[node] = self.graph.node_copy(node, lambda x, at=place: self._read(x, at))  # type: ignore[misc]
        return _make_graph_module(self.module, self.graph)

    def _matched(self, repeats: Repeats) -> Repeats | None:
        """Those among repeats that are of a run of the bound graph; None if no two are."""
        runs = [self._run_of(repeats, repeat) for repeat in range(repeats.count - 1)]
        blocks = [(run, len(list(block))) for run, block in itertools.groupby(runs)]
        ends = list(itertools.accumulate(length for _, length in blocks))
        found = [
            (length, end, run)
            for (run, length), end in zip(blocks, ends, strict=True)
            if run is not None
        ]
        if not found:
            return None
        length, end, run = max(found, key=lambda block: block[0])
        start = repeats.start + (end - length) * repeats.period
        matched = replace(repeats, start=start, count=length + 1)
        if any(slot.age >= matched.count for slot in matched.carried):
            return None
        self.runs[matched.start] = run
        return matched

    def _run_of(self, repeats: Repeats, repeat: int) -> _Run | None:
        """The run of which two repeats in a row are, by the inputs that they read; None if none."""
        found: dict[int, _Run] = {}
        for column in repeats.given.values():
            one, other = column[repeat : repeat + 2]
            if one is other or self._are_equal(one, other):
                continue
            run = next((x for x in self.short.runs if x.follows.get(one.name) == other.name), None)
            if run is None:
                return None
            found[id(run)] = run
        return found.popitem()[1] if len(found) == 1 else None

    def _are_equal(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two values are constants that are the same."""
        if one.op != "get_attr" or other.op != "get_attr":
            return False
        values = [getattr(self.module, str(node.target)) for node in (one, other)]
        return values[0].dtype is values[1].dtype and torch.equal(*values)

    def _read(self, value: fx.Node, place: int) -> fx.Node:
        """What a node of the long graph reads where that of the short one read a value.

        Args:
            value: The value.
            place: The index of the reader.
        """
        for repeats in self.found:
            run = self.runs[repeats.start]
            if place < repeats.end:
                continue
            if value.name in run.inputs:
                return self.inputs[run.later(value.name, run.left_out)]
            if repeats.holds(value):
                return self._result(repeats, value)
        return self.inputs[value.name] if value.op == "placeholder" else self.copies[value]

    def _result(self, repeats: Repeats, value: fx.Node) -> fx.Node:
        """What lies behind the repeats where a value of the short graph's was."""
        repeat, offset = divmod(self.ops.index[value] - repeats.start, repeats.period)
        later = repeat + self.runs[repeats.start].left_out
        if later < repeats.count:
            return self.copies[repeats.node(later, offset)]
        return self.stamped[repeats.node(repeats.count - 1, offset), later - repeats.count]

    def _stamp(self, repeats: Repeats) -> None:
        """Add the repeats that the short graph did not have."""
        run = self.runs[repeats.start]
        after = {*self.ops.nodes[repeats.end :], self.module.graph.output_node()}
        wanted: list[tuple[fx.Node, int]] = []
        for node in self.ops.nodes[repeats.start : repeats.end]:
            if not after.isdisjoint(node.users):
                repeat, offset = divmod(self.ops.index[node] - repeats.start, repeats.period)
                later = repeat + run.left_out - repeats.count
                if later >= 0:
                    wanted.append((repeats.node(repeats.count - 1, offset), later))
        numbers = {name: number for number, name in enumerate(sorted(run.inputs))}
        given: dict[str, fx.Node] = {"first": self.marks[-2], "second": self.marks[-1]}
        given |= {f"input_{number}": self.inputs[name] for name, number in numbers.items()}
        given |= {f"result_{k}": self.copies[node] for k, (node, _) in enumerate(wanted)}
        follows = {numbers[one]: numbers[other] for one, other in run.follows.items()}
        stamp = Stamp(run.left_out, follows, [later for _, later in wanted], run.renamed)
        stamp.register(self.torchair)
        made = self.graph.call_function(stamp, (given,))
        made.meta["val"] = [node.meta["val"] for node, _ in wanted]
        for number, (node, later) in enumerate(wanted):
            item = self.graph.call_function(operator.getitem, (made, number))
            item.meta["val"] = node.meta["val"]
            self.stamped[node, later] = item
