"""Halves: a partitioned joint Program as a forward and a backward Program.

What the forward half saves for the backward half is chosen by PyTorch's min-cut partitioner, on
one rank's shapes. They are the same on every rank, so is the choice, and so is the order of
collectives.

* Weights that were gathered are never saved: the backward half gathers them again from the shards.
* Collectives of activations run once: what they give, or what is made of it, is saved.
* How much else is computed twice is a matter of the budget: 1 recomputes what a compiler fuses for
  free, less saves fewer bytes for more work, 0 saves inputs only.

Invariants: the forward half has the inputs of the joint Program without tangents, and its outputs
without gradients, then what is saved. The backward half has tangents and what is saved as inputs
(in any order, each with the name of its value) and gradients as outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import Argument
from torch.utils.checkpoint import CheckpointPolicy

from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.program import (
    Input,
    InputKind,
    Output,
    Program,
    tensor_types,
)

__all__ = ["Halves", "halves"]

_JOINT = "rolemesh_joint"
"""Key of a shadow node's metadata: the joint Program's node."""


@dataclass(frozen=True)
class Halves:
    """A training step in two Programs.

    Attributes:
        forward: Inputs to results and saved values.
        backward: Saved values and tangents to gradients.
    """

    forward: Program
    backward: Program

    @property
    def saved(self) -> tuple[int, ...]:
        """For each input of the backward half, which value it is.

        A number below the count of the forward half's inputs is one of these, the next ones are its
        outputs; -1 - i is tangent i.
        """
        names = {node.name: i for i, node in enumerate(self.forward.placeholders)}
        count = len(names)
        for index, value in enumerate(self.forward.results):
            if isinstance(value, fx.Node):
                names.setdefault(value.name, count + index)
        found: list[int] = []
        tangents = 0
        for node, entry in zip(self.backward.placeholders, self.backward.inputs, strict=True):
            if entry.kind is InputKind.TANGENT:
                tangents += 1
                found.append(-tangents)
            else:
                found.append(names[node.name])
        return tuple(found)


def halves(program: Program, budget: float = 1.0) -> Halves:
    """Split a joint Program.

    Args:
        program: A partitioned joint Program.
        budget: Share of the activations that may be saved, 0 to 1.
    """
    results = sum(output.gradient_of is None for output in program.outputs)
    shadow = _shadow(program)
    with functorch_config.patch(activation_memory_budget=budget, cse=False):
        forward, backward = min_cut_rematerialization_partition(
            fx.GraphModule(torch.nn.Module(), shadow), None, num_fwd_outputs=results
        )
    saved = [_joint(node) for node in backward.graph.find_nodes(op="placeholder")]
    kept = [node for node in saved if node.op != "placeholder"]
    return Halves(
        _forward(program, forward.graph, results, kept), _backward(program, backward.graph, results)
    )


def _joint(node: fx.Node) -> fx.Node:
    found = node.meta[_JOINT]
    assert isinstance(found, fx.Node)
    return found


def _local(*operands: object) -> None:
    """Stands for a mesh op in the graph that the partitioner sees."""


def _shadow(program: Program) -> fx.Graph:
    """The graph as the partitioner knows it: local fake tensors, and marks on some nodes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    gathered = _of_weights(program)
    started: set[fx.Node] = set()  # by tangents
    entries = dict(zip(program.placeholders, program.inputs, strict=True))
    with FakeTensorMode():
        for index, node in enumerate(program.graph.nodes):
            if node.op == "placeholder":
                tangent = entries[node].kind is InputKind.TANGENT
                prefix = "tangents" if tangent else "primals"
                copy = graph.placeholder(f"{prefix}_{index}")
                started.update([node] if tangent else [])
            elif node.op == "output":
                break
            elif isinstance(node.target, MeshOp):
                operands = tuple(copies[operand] for operand in node.all_input_nodes)
                # The number keeps any two apart.
                copy = add_call(graph, _local, (index, *operands), name=node.name)
            else:
                copy = add_call(
                    graph,
                    node.target,
                    fx.map_arg(node.args, copies.__getitem__),
                    fx.map_arg(node.kwargs, copies.__getitem__),
                    name=node.name,
                )
            copies[node] = copy
            copy.meta[_JOINT] = node
            values = _local_values(program, node)
            copy.meta["val"] = values[0] if len(values) == 1 else values
            if started.intersection(node.all_input_nodes):
                started.add(node)
            elif node in gathered:
                copy.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                copy.meta["ac_graph_id"] = 0
            elif isinstance(node.target, MeshOp) and node.target.communicates:
                copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        graph.output(fx.map_arg(_returned(program.results), copies.__getitem__))
        graph.output_node().meta["desc"] = [None] * len(program.results)
    return graph


def _returned(values: Sequence[object]) -> Argument:
    return cast(Argument, tuple(values))


def _local_values(program: Program, node: fx.Node) -> tuple[torch.Tensor, ...]:
    layouts = program.layouts.get(node, ())
    return tuple(
        torch.empty(
            [int(n) for n in layout.local_shape(kind.shape, program.the_mesh)], dtype=kind.dtype
        )
        for kind, layout in zip(tensor_types(node), layouts, strict=True)
    )


def _of_weights(program: Program) -> set[fx.Node]:
    """Ops on weights alone."""
    found = {
        node
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if entry.kind is InputKind.PARAMETER
    }
    weights = set(found)
    for node in program.ops:
        if node.all_input_nodes and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found - weights


class _Half:
    """A Program's graph under construction."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        self.inputs: list[Input] = []

    def add_input(self, node: fx.Node, entry: Input) -> None:
        new = self.graph.create_node("placeholder", node.name, name=node.name)
        new.meta.update(node.meta)
        self.inputs.append(entry)
        self._define(node, new)

    def add_ops(self, graph: fx.Graph) -> None:
        """The ops of a graph of shadow nodes, in its order."""
        for copy in graph.nodes:
            if copy.op == "call_function":
                node = _joint(copy)
                self._define(node, copy_node(self.graph, node, self.values.__getitem__))

    def _define(self, node: fx.Node, new: fx.Node) -> None:
        self.values[node] = new
        if node in self.program.layouts:
            self.layouts[new] = self.program.layouts[node]

    def made(
        self,
        name: str,
        values: Sequence[object],
        outputs: Sequence[Output],
        pinned: dict[int, Layout],
    ) -> Program:
        self.graph.output(fx.map_arg(_returned(values), self.values.__getitem__))
        return replace(
            self.program,
            name=f"{self.program.name}.{name}",
            graph=self.graph,
            inputs=tuple(self.inputs),
            outputs=tuple(outputs),
            layouts=self.layouts,
            pinned=pinned,
            history=(*self.program.history, "halves"),
        )


def _forward(program: Program, graph: fx.Graph, results: int, kept: Sequence[fx.Node]) -> Program:
    half = _Half(program)
    for node, entry in zip(program.placeholders, program.inputs, strict=True):
        if entry.kind is not InputKind.TANGENT:
            half.add_input(node, entry)
    half.add_ops(graph)
    pinned = {i: layout for i, layout in program.pinned.items() if i < results}
    pinned |= {results + i: program.layout(node) for i, node in enumerate(kept)}
    outputs = [*program.outputs[:results], *(Output() for _ in kept)]
    return half.made("forward", [*program.results[:results], *kept], outputs, pinned)


def _backward(program: Program, graph: fx.Graph, results: int) -> Program:
    half = _Half(program)
    entries = dict(zip(program.placeholders, program.inputs, strict=True))
    for copy in graph.find_nodes(op="placeholder"):
        node = _joint(copy)
        entry = entries.get(node) or Input(node.name, InputKind.SAVED)
        half.add_input(node, replace(entry, mutated=False))
    half.add_ops(graph)
    gradients = range(results, len(program.outputs))
    pinned = {i - results: program.output_layout(i) for i in gradients}
    outputs = [Output() for _ in gradients]
    return half.made("backward", program.results[results:], outputs, pinned)
