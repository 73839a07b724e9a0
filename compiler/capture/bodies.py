"""Bodies of repeated layers, lowered to ATen once each.

`rolemesh.compiler.capture.outline` leaves an opaque op in place of every call of a marked layer;
`inline` puts the ATen ops of the layer's body in place of each such op. What comes out is the graph
that AOTAutograd gives for the model with all its layers written out, but for the order of its
inputs.

An operand of a body comes from one of three places. What the layer is called with, and what all
layers share, are values of the graph around it. The layer's weights are its own: they are no inputs
of Dynamo's graph (except the traced layer's, which are taken out), and are read from the layer at
each call. Its part of the cache is an input of Dynamo's graph that only layers use; a body may
write it, and returns its new value. What is outside of the graph around it costs AOTAutograd
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from rolemesh.compiler.capture.entry import Weight
from rolemesh.compiler.ir.nodes import copy_node

__all__ = [
    "Body",
    "BodyCall",
    "Inlined",
    "Outlined",
    "call_op",
    "calling_module",
    "inline",
    "nodes_in",
    "returned_nodes",
    "tracing_calls",
]

_MODULES = "nn_module_stack"


@dataclass(frozen=True)
class Body:
    """The functional form of a region.

    Attributes:
        graph: AOTAutograd's graph: new values of written operands first, then the results.
        written: Which operands are written, in the order of the outputs.
        modules: Path of the module that the traced call was made in.
    """

    graph: fx.Graph
    written: tuple[int, ...]
    modules: str


@dataclass(frozen=True)
class BodyCall:
    """One call of a body.

    Attributes:
        body: The body.
        operands: What the layer holds, one of Dynamo's flat inputs by its number, or None for a
            value of the graph around it.
        modules: Path of the module that the call is made in.
    """

    body: Body
    operands: tuple[Weight | int | None, ...]
    modules: str

    def written_around(self) -> list[int]:
        """Which of the operands in the graph around it are written."""
        return [operand for operand in self.body.written if self.operands[operand] is None]

    def outputs(self) -> list[Tensor]:
        """What the opaque op gives: new values of written operands around it, then results."""
        returned = [node.meta["val"] for node in returned_nodes(self.body.graph)]
        written = self.body.written
        around = [returned[written.index(operand)] for operand in self.written_around()]
        return [*around, *returned[len(written) :]]


@dataclass(frozen=True)
class Outlined:
    """What `outline` took out of a graph.

    Attributes:
        module: What is left.
        calls: Calls of bodies, in order; an opaque op has its number.
        kept: Which of Dynamo's flat inputs the graph still has.
    """

    module: fx.GraphModule
    calls: list[BodyCall]
    kept: list[int]


@dataclass(frozen=True)
class Inlined:
    """Inputs and outputs that a graph got with the bodies of its calls.

    Attributes:
        inputs: What each placeholder added stands for: one of Dynamo's flat inputs by its number,
            or what a layer holds.
        written: Dynamo's flat inputs whose new values were added to the outputs, in their order.
    """

    inputs: dict[fx.Node, int | Weight]
    written: list[int]


_CALLS: ContextVar[Sequence[BodyCall]] = ContextVar("rolemesh_calls")


@contextmanager
def tracing_calls(outlined: Outlined) -> Iterator[None]:
    """Let opaque ops be traced inside the block."""
    token = _CALLS.set(outlined.calls)
    try:
        yield
    finally:
        _CALLS.reset(token)


def inline(graph: fx.Graph, outlined: Outlined, position: int) -> Inlined:
    """Put the ops of its body in place of every opaque op, in place.

    Args:
        graph: AOTAutograd's graph of what `outline` left.
        outlined: What `outline` returned.
        position: Where among the graph's outputs new values of inputs go that bodies write.
    """
    found = Inlined({}, [])
    if not outlined.calls:
        return found
    written: list[fx.Node] = []
    inputs: dict[int | Weight, fx.Node] = {}
    last = next(iter(reversed(graph.find_nodes(op="placeholder"))), None)
    for opaque in graph.find_nodes(op="call_function", target=call_op()):
        call = outlined.calls[cast(int, opaque.args[2])]
        tensors, sizes = (iter(nodes_in(entry)) for entry in opaque.args[:2])
        operands: list[Argument] = []
        placeholders = call.body.graph.find_nodes(op="placeholder")
        for source, node in zip(call.operands, placeholders, strict=True):
            if source is None:
                operands.append(next(tensors if isinstance(node.meta["val"], Tensor) else sizes))
                continue
            if source not in inputs:
                with graph.inserting_after(last):
                    last = inputs[source] = graph.placeholder(node.name)
                last.meta = {"val": node.meta["val"]}
                found.inputs[last] = source
            operands.append(inputs[source])
        returned = _inline(graph, opaque, call, operands)
        for operand, value in zip(call.body.written, returned, strict=False):
            place = call.operands[operand]
            if isinstance(place, int):
                found.written.append(place)
                written.append(value)
    output = graph.output_node()
    results = returned_nodes(graph)
    output.args = ([*results[:position], *written, *results[position:]],)
    graph.eliminate_dead_code()
    return found


def _inline(
    graph: fx.Graph, opaque: fx.Node, call: BodyCall, operands: Sequence[Argument]
) -> list[fx.Node]:
    """Copy a body's ops; gives what it returns."""
    body = call.body
    values = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(opaque):
        for node in body.graph.nodes:
            if node.op == "call_function":
                copy = copy_node(graph, node, values.__getitem__)
                copy.meta = {**node.meta, _MODULES: _moved(node, body.modules, call.modules)}
                values[node] = copy
    returned = [cast(fx.Node, values[node]) for node in returned_nodes(body.graph)]
    around = [body.written.index(operand) for operand in call.written_around()]
    given = [*(returned[index] for index in around), *returned[len(body.written) :]]
    for pick in list(opaque.users):
        value = given[cast(int, pick.args[1])]
        for user in list(pick.users):
            if user.target is torch.ops.aten.copy.default and user.args[1] is pick:
                user.replace_all_uses_with(value)
                graph.erase_node(user)
        pick.replace_all_uses_with(value)
        graph.erase_node(pick)
    graph.erase_node(opaque)
    return returned


def _moved(node: fx.Node, old: str, new: str) -> dict[str, tuple[str, object]]:
    """Which modules a node of a body is in, for another call of the body."""
    stack: dict[str, tuple[str, object]] = node.meta.get(_MODULES) or {}
    return {
        key: (new + path[len(old) :] if path.startswith(old) else path, kind)
        for key, (path, kind) in list(stack.items())[-1:]
    }


def nodes_in(values: Argument) -> list[fx.Node]:
    """An argument that is a list, as nodes."""
    return list(cast(Sequence[fx.Node], values))


def calling_module(call: fx.Node) -> str:
    """Path of the module that a node is in, as Dynamo spells it."""
    stack = call.meta.get(_MODULES)
    return list(stack.values())[-1][0] if stack else ""


def returned_nodes(graph: fx.Graph) -> Sequence[fx.Node]:
    """What a graph returns."""
    returned = graph.output_node().args[0]
    return cast(Sequence[fx.Node], returned if isinstance(returned, list | tuple) else [returned])


@functools.cache
def _library() -> torch.library.Library:
    """The definition of the opaque op; it goes away with this object."""
    library = torch.library.Library("rolemesh", "FRAGMENT")
    library.define("call_body(Tensor[] operands, SymInt[] sizes, int call) -> Tensor[]")

    def shapes(operands: list[Tensor], sizes: list[int], call: int) -> list[Tensor]:
        return [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            for x in _CALLS.get()[call].outputs()
        ]

    torch.library.register_fake("rolemesh::call_body", shapes, lib=library)
    return library


def call_op() -> OpOverload:
    """The opaque op: `rolemesh::call_body(operands, sizes, number)`, with those around a call."""
    _library()
    found: OpOverload = torch.ops.rolemesh.call_body.default
    return found
