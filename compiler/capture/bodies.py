"""Bodies of regions, lowered to ATen once each.

Dynamo's graph of a model with repeated layers (`rolemesh.compiler.capture.regions`) calls one body
many times. `outline` traces each body with AOTAutograd by itself and puts an opaque op in place of
every call, so that tracing what is around them costs nothing per layer; `inline` puts the ATen ops
of the body in place of each such op. What comes out is the graph that AOTAutograd gives for the
model with all its layers written out.

A body may write to its operands (a cache). Its functional form returns their new values, and each
call is followed by copies of those into the operands, which AOTAutograd makes functional in turn.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch.fx.node import Argument

from rolemesh.compiler.capture.editing import depends_on_data

__all__ = ["Body", "inline", "outline", "tracing_calls"]

aten = torch.ops.aten

_MODULES = "nn_module_stack"


@dataclass(frozen=True)
class Body:
    """The functional form of a region.

    Attributes:
        module: AOTAutograd's graph: new values of written operands first, then the results.
        written: Which operands are written, in the order of the outputs.
        modules: Path of the module that the traced call was made in.
    """

    module: fx.GraphModule
    written: tuple[int, ...]
    modules: str

    def outputs(self) -> list[Tensor]:
        """What a call gives, without data."""
        return [node.meta["val"] for node in _returned(self.module.graph)]


_BODIES: ContextVar[Sequence[Body]] = ContextVar("rolemesh_bodies")


@contextmanager
def tracing_calls(bodies: Sequence[Body]) -> Iterator[None]:
    """Let calls of these bodies be traced inside the block."""
    token = _BODIES.set(bodies)
    try:
        yield
    finally:
        _BODIES.reset(token)


def outline(module: fx.GraphModule) -> list[Body]:
    """Put an opaque op in place of every call of a region, in place.

    Args:
        module: Dynamo's graph.

    Returns:
        The bodies that the ops call. A region whose body is not a function of tensors alone is
        written out instead.
    """
    from torch._higher_order_ops.passes.inline_invoke_subgraph import inline_invoke_subgraph_nodes

    calls = module.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.invoke_subgraph
    )
    found: dict[str, Body | None] = {}
    bodies: list[Body] = []
    for call in calls:
        name = str(_operands(call, 0)[0].target)
        if name not in found:
            body = found[name] = _body(getattr(module, name), call)
            if body is not None:
                bodies.append(body)
        body = found[name]
        if body is None:
            inline_invoke_subgraph_nodes(module, [call])
        else:
            _replace(call, body, bodies.index(body))
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)
    if calls:
        module.recompile()
    return bodies


def _body(module: fx.GraphModule, call: fx.Node) -> Body | None:
    """The functional form of a region, from its first call."""
    operands = [node.meta["example_value"] for node in _operands(call)]
    results = _returned(module.graph)
    if not all(isinstance(node.meta.get("example_value"), Tensor) for node in results):
        return None
    traced: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        traced.append(gm)
        return make_boxed_func(lambda *flat: [])

    context = TracingContext(TracingContext.get().fake_mode)
    with tracing(context):
        aot_module_simplified(module, operands, fw_compiler=keep)
    metadata = context.fw_metadata
    assert metadata is not None
    (body,) = traced
    operands_kept = len(body.graph.find_nodes(op="placeholder")) == len(operands)
    if not operands_kept or body.graph.find_nodes(op="get_attr"):
        return None
    if any(depends_on_data(node.meta.get("val")) for node in body.graph.nodes):
        return None
    if not all(isinstance(node, fx.Node) for node in _returned(body.graph)):
        return None
    return Body(body, tuple(metadata.mutated_inp_runtime_indices), _module_path(call))


def _replace(call: fx.Node, body: Body, index: int) -> None:
    """Put the opaque op in place of one call."""
    graph, operands = call.graph, _operands(call)
    tensors = [node for node in operands if isinstance(node.meta["example_value"], Tensor)]
    sizes = [node for node in operands if node not in tensors]
    with graph.inserting_before(call):
        opaque = graph.call_function(_call_op(), (tensors, sizes, index))
        opaque.meta = dict(call.meta)
        outputs: list[fx.Node] = []
        for position, value in enumerate(body.outputs()):
            output = graph.call_function(operator.getitem, (opaque, position))
            output.meta["example_value"] = value
            outputs.append(output)
        for output, position in zip(outputs, body.written, strict=False):
            graph.call_method("copy_", (operands[position], output))
    for user in list(call.users):
        user.replace_all_uses_with(outputs[len(body.written) + cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(call)


def inline(graph: fx.Graph, bodies: Sequence[Body]) -> None:
    """Put the ops of its body in place of every opaque op, in place.

    Args:
        graph: AOTAutograd's graph of what `outline` left.
        bodies: What `outline` returned.
    """
    if not bodies:
        return
    for call in graph.find_nodes(op="call_function", target=_call_op()):
        _inline(graph, call, bodies[cast(int, call.args[2])])
    graph.eliminate_dead_code()


def _inline(graph: fx.Graph, call: fx.Node, body: Body) -> None:
    tensors, sizes = (list(cast(Sequence[Argument], entry)) for entry in call.args[:2])
    values: dict[fx.Node, Argument] = {}
    for node in body.module.graph.find_nodes(op="placeholder"):
        values[node] = (tensors if isinstance(node.meta["val"], Tensor) else sizes).pop(0)
    path = _module_path(call)
    with graph.inserting_before(call):
        for node in body.module.graph.nodes:
            if node.op == "call_function":
                copy = graph.node_copy(node, values.__getitem__)
                copy.meta = {**node.meta, _MODULES: _moved(node, body.modules, path)}
                values[node] = copy
    outputs = [values[node] for node in _returned(body.module.graph)]
    for pick in list(call.users):
        value = cast(fx.Node, outputs[cast(int, pick.args[1])])
        for user in list(pick.users):
            if user.target is aten.copy.default and user.args[1] is pick:
                user.replace_all_uses_with(value)
                graph.erase_node(user)
        pick.replace_all_uses_with(value)
        graph.erase_node(pick)
    graph.erase_node(call)


def _moved(node: fx.Node, old: str, new: str) -> dict[str, tuple[str, object]]:
    """Which modules a node of a body is in, for another call of the body."""
    stack: dict[str, tuple[str, object]] = node.meta.get(_MODULES) or {}
    return {
        key: (new + path[len(old) :] if path.startswith(old) else path, kind)
        for key, (path, kind) in list(stack.items())[-1:]
    }


def _operands(call: fx.Node, first: int = 2) -> list[fx.Node]:
    return list(cast(Sequence[fx.Node], call.args[first:]))


def _module_path(call: fx.Node) -> str:
    stack = call.meta.get(_MODULES)
    return list(stack.values())[-1][0] if stack else ""


def _returned(graph: fx.Graph) -> Sequence[fx.Node]:
    returned = graph.output_node().args[0]
    return cast(Sequence[fx.Node], returned if isinstance(returned, list | tuple) else [returned])


@functools.cache
def _library() -> torch.library.Library:
    """The definition of the opaque op; it goes away with this object."""
    library = torch.library.Library("rolemesh", "FRAGMENT")
    library.define("call_body(Tensor[] operands, SymInt[] sizes, int body) -> Tensor[]")

    def shapes(operands: list[Tensor], sizes: list[int], body: int) -> list[Tensor]:
        return [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            for x in _BODIES.get()[body].outputs()
        ]

    torch.library.register_fake("rolemesh::call_body", shapes, lib=library)
    return library


def _call_op() -> OpOverload:
    _library()
    found: OpOverload = torch.ops.rolemesh.call_body.default
    return found
