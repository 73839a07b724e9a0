"""A GE graph laid out for running: ops in order, their inputs and results as places in one list.

All that does not depend on a run's inputs is done here, once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.binding import Binding, bind_nodes
from rolemesh.runtime.ge.communicator import Communicator
from rolemesh.runtime.ge.graph import DATA_TYPES, SOURCE_TYPES, Edge, Graph, Node, malformed
from rolemesh.runtime.ge.ops.table import Op, Result
from rolemesh.runtime.ge.schedule import Sharing, needed, shuffled

__all__ = ["Plan", "Step"]

_UNKNOWN = (None, None)
"""Data type and number of elements of a result that the graph does not describe."""

_COPYING = ("TensorMove", "Assign")
"""Op types that only copy their last input."""


@dataclass(frozen=True, slots=True)
class Step:
    """One op, ready to run on a list of values.

    Attributes:
        binding: The op.
        call: Its function, which takes its inputs by position.
        slots: For each input the index of its value.
        lists: For each input that is a list, its position and the indices of its values.
        outputs: For each output the index of its value.
        equal: Indices of values whose data types must be equal.
        expected: For each output, its data type and number of elements as far as they are known.
        written: By output that is an input, the index of that input's value.
        copies: Whether it only copies its last input.
        clones: Whether its results are copied into memory of their own.
        dead: Indices of values that no later op uses.
    """

    binding: Binding
    call: Callable[..., Result]
    slots: tuple[int, ...]
    lists: tuple[tuple[int, tuple[int, ...]], ...]
    outputs: tuple[int, ...]
    equal: tuple[int, ...]
    expected: tuple[tuple[torch.dtype | None, int | None], ...]
    written: Mapping[int, int]
    copies: bool
    clones: bool
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How to run a graph.

    Attributes:
        initial: The values before anything runs; a run works on a copy of the list.
        data: For each input of the graph the index of its value; None if nothing needs it.
        steps: The ops in order.
        results: For each result the index of its value.
        shared: For each result, indices of inputs and constants whose memory it may share.
        twins: For each result, the earlier results whose memory it may share.
    """

    initial: list[object]
    data: tuple[int | None, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]
    twins: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        graph: Graph,
        ops: Mapping[str, Op],
        communicator: Communicator | None,
        seed: int | None,
    ) -> Plan:
        """Lay out a graph; arguments and errors are those of `executor.Executor`."""
        nodes = needed(graph)
        order = bind_nodes(
            graph, [n for n in nodes if n.type not in (*SOURCE_TYPES, "NetOutput")], ops
        )
        if seed is not None:
            order = shuffled(order, seed)
        results = [edge for edge in graph.net_output.inputs if edge is not None]
        sharing = Sharing.of(order, results)
        _refuse_writes_to_constants(graph, order)
        slots: dict[Edge, int] = {}
        initial: list[object] = []
        for node in nodes:
            for index in range(len(node.outputs)):
                slots[Edge(node.name, index)] = len(initial)
                initial.append(_constant(node))
        make = _StepMaker(graph, slots, initial, communicator, _last_uses(order, results))
        roots = [sharing.of_edge(edge) for edge in results]
        return cls(
            initial,
            tuple(slots.get(Edge(node.name, 0)) for node in graph.data),
            tuple(make(binding, binding.node.name in sharing.copied) for binding in order),
            tuple(slots[edge] for edge in results),
            tuple(
                tuple(slots[edge] for edge in found if _source_type(graph, edge)) for found in roots
            ),
            tuple(
                tuple(other for other in range(index) if roots[other] & roots[index])
                for index in range(len(roots))
            ),
        )


class _StepMaker:
    """Makes steps; gives places to what is not the result of an op: defaults and lists."""

    def __init__(
        self,
        graph: Graph,
        slots: Mapping[Edge, int],
        initial: list[object],
        communicator: Communicator | None,
        last_uses: Mapping[str, Sequence[Edge]],
    ) -> None:
        self.graph = graph
        self.slots = slots
        self.initial = initial
        self.communicator = communicator
        self.last_uses = last_uses

    def __call__(self, binding: Binding, clones: bool) -> Step:
        node = binding.node
        places: list[int] = []
        lists: list[tuple[int, tuple[int, ...]]] = []
        for position, argument in enumerate(binding.arguments):
            if isinstance(argument, Edge):
                places.append(self.slots[argument])
                continue
            if argument is not None:
                lists.append((position, self._places(argument)))
            places.append(len(self.initial))
            self.initial.append(binding.defaults[position] if argument is None else None)
        dead = self.last_uses.get(node.name, ())
        # What nobody reads may have another type than PyTorch's CPU kernel gives it.
        unread = {edge.output for edge in dead if edge.producer == node.name}
        return Step(
            binding,
            self._call(binding),
            tuple(places),
            tuple(lists),
            self._places([Edge(node.name, index) for index in range(len(node.outputs))]),
            self._places(binding.edges(*binding.op.equal)),
            tuple(
                (desc.dtype, desc.numel) if desc.described and index not in unread else _UNKNOWN
                for index, desc in enumerate(node.outputs)
            ),
            {output: self.slots[edge] for output, edge in binding.written.items()},
            node.type in _COPYING,
            clones,
            self._places(dead),
        )

    def _places(self, edges: Sequence[Edge]) -> tuple[int, ...]:
        return tuple(self.slots[edge] for edge in edges)

    def _call(self, binding: Binding) -> Callable[..., Result]:
        function, attributes = binding.function, binding.node.attributes
        if not binding.op.collective:
            return partial(function, attributes)
        if self.communicator is None:
            raise RolemeshError(
                "RM030",
                what="a graph with collectives has no communicator",
                where=self.graph.describe(binding.node),
                why="its ranks are other processes, or other threads of this one",
                fix="load it with an engine that has a communicator",
            )
        return partial(function, attributes, self.communicator)


def _source_type(graph: Graph, edge: Edge) -> str:
    """The type of the op that a tensor comes from, if that computes nothing; else empty."""
    kind = graph.nodes[edge.producer].type
    return kind if kind in SOURCE_TYPES else ""


def _refuse_writes_to_constants(graph: Graph, order: Sequence[Binding]) -> None:
    for binding in order:
        for edge in binding.written.values():
            if _source_type(graph, edge) not in ("", *DATA_TYPES):
                raise malformed(
                    f"an op writes to the constant {edge.producer!r}",
                    graph.describe(binding.node),
                    "a constant has the same value in every run",
                )


def _last_uses(order: Sequence[Binding], results: Sequence[Edge]) -> dict[str, list[Edge]]:
    """For each op, the computed values that nothing needs once it has run."""
    last: dict[Edge, str] = {}
    computed = {binding.node.name for binding in order}
    for binding in order:
        name = binding.node.name
        for index in range(len(binding.node.outputs)):
            last[Edge(name, index)] = name
        for edge in binding.node.inputs:
            if edge is not None and edge.producer in computed:
                last[edge] = name
    kept = set(results)
    uses: dict[str, list[Edge]] = {}
    for edge, name in last.items():
        if edge not in kept:
            uses.setdefault(name, []).append(edge)
    return uses


def _constant(node: Node) -> torch.Tensor | None:
    """The value of a node that has one before anything runs."""
    return _at_address(node) if node.type == "ConstPlaceHolder" else node.value


def _at_address(node: Node) -> torch.Tensor:
    """The memory of a frozen parameter, which a ConstPlaceHolder points at."""
    attributes = node.attributes
    where = f"{node.type} {node.name!r}"
    try:
        shape, dtype = attributes.ints("origin_shape"), attributes.dtype("dtype")
        size, address = attributes.int("size"), attributes.int("addr")
    except (TypeError, ValueError, AssertionError) as error:
        raise malformed("a frozen parameter is not described", where, str(error)) from error
    expected = math.prod(shape) * dtype.itemsize
    if size != expected or min(shape, default=0) < 0 or (expected and address <= 0):
        raise malformed(
            f"a frozen parameter has {size} bytes at address {address}",
            where,
            f"its shape is {shape}, its data type {dtype}",
        )
    if not expected:
        return torch.empty(shape, dtype=dtype)
    memory = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).reshape(shape)
