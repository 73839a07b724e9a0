"""A rewritten graph with all of its repeats, where it was made of one with fewer.

The repeats of a short graph (`rolemesh.lowering.ge.shorten`) are looked for again in what became of
it. Where one ends may have moved, since fused ops cross the ends of layers. Behind the last of them
goes one call (`rolemesh.lowering.ge.stamp`), for which torchair's converter adds the ops in GE of
those that were left out.

Invariants:

* Nothing is taken for granted: repeats of the result are those of the graph only if each reads the
  inputs that come next, of every input that repeats read, and if what is before and behind them
  reads the first ones and the last ones. Otherwise the graph is to be lowered whole.
* The graph has the inputs and outputs of the whole one, in their order.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.fx._lazy_graph_module import _make_graph_module

from rolemesh.lowering.flatten import Fake
from rolemesh.lowering.ge.loader import Torchair
from rolemesh.lowering.ge.shorten import Run, Short
from rolemesh.lowering.ge.stamp import Stamp, UnlikeError, mark
from rolemesh.lowering.repeats import Ops, Repeats, find_repeats

__all__ = ["lengthen"]


def lengthen(
    short: Short,
    module: fx.GraphModule,
    kept: Sequence[int],
    fakes: Sequence[Fake],
    torchair: Torchair,
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The whole graph, rewritten as the short one was.

    Args:
        short: The short graph.
        module: What became of it.
        kept: Indices of the outputs that this returns.
        fakes: Example inputs of the whole graph.
        torchair: The torchair that converts it.

    Returns:
        The graph, and the indices of outputs that it returns.

    Raises:
        UnlikeError: If its repeats are not those of the bound graph.
    """
    results = short.whole.graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    for place in kept:
        value = results[short.outputs[place]]
        if not isinstance(value, fx.Node) or place not in short.mutated:
            continue
        if any(run.repeats.holds(value) for run in short.runs):
            raise UnlikeError("repeats return new values of inputs")
    returned = tuple([short.outputs[place] for place in kept])
    return _Lengthening(short, module, fakes, torchair).run(), returned


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
        self.runs: dict[int, Run] = {}  # by the first node of the repeats that are of it
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
        for repeats in self.found:
            self._check_around(repeats)
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
            self.copies[node] = self.graph.node_copy(
                node, functools.partial(self._read, place=place)
            )
        return _make_graph_module(self.module, self.graph)

    def _check_around(self, repeats: Repeats) -> None:
        """Check that nothing behind the repeats came before them, and the other way round.

        An op may have been moved to where all can read its value. What it reads tells where it was.

        Raises:
            UnlikeError: If it did.
        """
        run, period, nodes = self.runs[repeats.start], repeats.period, self.ops.nodes
        end = self.module.graph.output_node()

        def places(readers: Sequence[fx.Node]) -> list[int]:
            read = {operand.name for node in readers for operand in node.all_input_nodes}
            return [run.inputs[name][1] for name in read if name in run.inputs]

        before, after = nodes[: repeats.start], [*nodes[repeats.end :], end]
        first = places(nodes[repeats.start : repeats.start + period])
        last = places(nodes[repeats.end - period : repeats.end])
        if places(before) and max(places(before)) > max(first):
            raise UnlikeError("what is before the repeats reads inputs of later ones")
        if places(after) and min(places(after)) < min(last):
            raise UnlikeError("what is behind the repeats reads inputs of earlier ones")
        own: set[fx.Node] = set()
        for node in before:
            if any(x in own or x.name in run.inputs for x in node.all_input_nodes):
                own.add(node)
        if any(not own.isdisjoint(node.all_input_nodes) for node in after):
            raise UnlikeError("what is behind the repeats reads values of the first")

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

    def _run_of(self, repeats: Repeats, repeat: int) -> Run | None:
        """The run of which two repeats in a row are, by the inputs that they read; None if none."""
        found: dict[int, Run] = {}
        for column in repeats.given.values():
            one, other = column[repeat : repeat + 2]
            if one is other or self._are_equal(one, other):
                continue
            run = next((run for run in self.short.runs if _follows(run, one, other)), None)
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
                return self.inputs[str(run.later(value.name, run.left_out))]
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
        given: dict[str, fx.Node] = {"first": self.marks[-2], "second": self.marks[-1]}
        for number, row in enumerate(run.rows):
            given |= {f"input_{number}_{k}": self.inputs[name] for k, name in enumerate(row)}
        given |= {f"result_{k}": self.copies[node] for k, (node, _) in enumerate(wanted)}
        lengths = [len(row) for row in run.rows]
        stamp = Stamp(run.left_out, lengths, [later for _, later in wanted], run.renamed)
        stamp.register(self.torchair)
        made = self.graph.call_function(stamp, (given,))
        made.meta["val"] = [node.meta["val"] for node, _ in wanted]
        for number, (node, later) in enumerate(wanted):
            item = self.graph.call_function(operator.getitem, (made, number))
            item.meta["val"] = node.meta["val"]
            self.stamped[node, later] = item


def _follows(run: Run, one: fx.Node, other: fx.Node) -> bool:
    return one.name in run.inputs and run.later(one.name, 1) == other.name
