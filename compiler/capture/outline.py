"""Calls of marked layers, taken out of Dynamo's graph.

Dynamo's graph of a model with marked layers has one region for each layer that was traced, and for
each call of a layer one of `traced_call` or `another_call` (`rolemesh.compiler.capture.calls`).
`outline` traces each region with AOTAutograd by itself and puts an opaque op in place of every
call, so that tracing what is around them costs little per layer. `.bodies.inline` puts the ops
back.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._guards import TracingContext, tracing
from torch.utils._pytree import tree_leaves

from rolemesh.compiler.capture.alike import NotAlikeError
from rolemesh.compiler.capture.bodies import (
    Body,
    BodyCall,
    Outlined,
    call_op,
    calling_module,
    nodes_in,
    returned_nodes,
)
from rolemesh.compiler.capture.calls import another_call, traced_call
from rolemesh.compiler.capture.editing import depends_on_data
from rolemesh.compiler.capture.entry import Weight
from rolemesh.compiler.capture.regions import Marks

__all__ = ["outline"]


@dataclass(frozen=True)
class _Argument:
    number: int


@dataclass(frozen=True)
class _Held:
    number: int


@dataclass(frozen=True)
class _Template:
    """A body, and what its operands were in the call that was traced.

    Attributes:
        body: The body.
        operands: Where each comes from: an argument of the call, something the layer holds, or a
            value of the graph that all calls share.
        pattern: Which arguments of the call are one.
    """

    body: Body
    operands: tuple[_Argument | _Held | fx.Node, ...]
    pattern: tuple[int, ...]


def outline(module: fx.GraphModule, marks: Marks | None) -> Outlined:
    """Put an opaque op in place of every call of a marked layer.

    Args:
        module: Dynamo's graph. It stays as it is: Dynamo goes by its placeholders.
        marks: Those of the model.

    Raises:
        NotAlikeError: If the marked layers have to be traced each by itself.
    """
    from torch._higher_order_ops.passes.inline_invoke_subgraph import inline_invoke_subgraph_nodes

    region = torch.ops.higher_order.invoke_subgraph
    found = Outlined(module, [], list(range(len(module.graph.find_nodes(op="placeholder")))))
    calls = _calls(module.graph)
    if not (calls or module.graph.find_nodes(op="call_function", target=region)):
        return found
    found = replace(found, module=_copied(module))
    graph = found.module.graph
    if marks is not None and calls:
        marks.check()
        _Outliner(found, marks).replace(_calls(graph))
    # Regions that are the model's own.
    inline_invoke_subgraph_nodes(found.module, graph.find_nodes(op="call_function", target=region))
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    found.module.recompile()
    return found


def _calls(graph: fx.Graph) -> list[fx.Node]:
    """Calls of marked layers, in order."""
    targets = (traced_call, another_call)
    return [node for node in graph.nodes if node.target in targets]


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node in module.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source
    return fx.GraphModule(module, graph)


class _Outliner:
    """Replaces the calls of marked layers in one graph of Dynamo."""

    def __init__(self, found: Outlined, marks: Marks) -> None:
        self._found = found
        self._module = found.module
        self._marks = marks
        placeholders = found.module.graph.find_nodes(op="placeholder")
        self._flat = {node: number for number, node in enumerate(placeholders)}
        self._templates: dict[int, _Template] = {}
        self._state: set[fx.Node] = set()
        self._taken: set[fx.Node] = set()

    def replace(self, calls: Sequence[fx.Node]) -> None:
        """Put opaque ops in place of calls, and take out inputs that only they have."""
        every = [_Given.of(call) for call in calls]
        of_layers = {*calls, *(given.region for given in every if given.region is not None)}
        state = {node for given in every for node in given.state if node in self._flat}
        self._state = {node for node in state if of_layers.issuperset(node.users)}
        for call in calls:
            given = _Given.of(call)  # as it is now: results of the calls before were replaced
            if given.results:
                self._templates[given.number] = self._template(given)
            template = self._templates[self._marks.first(given.number)]
            self._replace(call, given, template)
        if any(node.users for node in self._taken):
            raise NotAlikeError("a layer's weights are read outside of it")
        self._check_memory()
        for node in self._taken | self._state:
            if not node.users:
                self._found.kept.remove(self._flat[node])
                self._module.graph.erase_node(node)

    def _template(self, given: _Given) -> _Template:
        """What the region that was traced for a call gives other calls."""
        region = given.region
        if region is None:
            raise NotAlikeError("a layer returns what it did not compute")
        owned = self._marks.owned(given.number)
        weights = {id(entry.tensor): _Held(i) for i, entry in enumerate(owned)}
        operands: list[_Argument | _Held | fx.Node] = []
        for node in nodes_in(region.args[2:]):
            if node in given.arguments:
                operands.append(_Argument(given.arguments.index(node)))
                continue
            is_tensor = isinstance(node.meta["example_value"], Tensor)
            example = node.meta["grapharg"].example if node in self._flat else None
            weight = weights.get(id(example))
            if weight is not None:
                self._taken.add(node)
            elif self._marks.compares(example) or (is_tensor and node not in self._flat):
                raise NotAlikeError("a layer reads a tensor that another one may not")
            operands.append(node if weight is None else weight)
        graph, written = _traced(
            getattr(self._module, str(nodes_in(region.args)[0].target)), region
        )
        body = Body(graph, written, calling_module(region))
        return _Template(body, tuple(operands), given.pattern)

    def _replace(self, call: fx.Node, given: _Given, template: _Template) -> None:
        """Put the opaque op in place of one call."""
        if given.pattern != template.pattern:
            raise NotAlikeError("a layer is called with one tensor for two, or two for one")
        owned = self._marks.owned(given.number)
        operands: list[Weight | int | None] = []
        around: list[fx.Node] = []
        for source in template.operands:
            if isinstance(source, _Held):
                operands.append(owned[source.number])
                continue
            node = source if isinstance(source, fx.Node) else given.arguments[source.number]
            if node in self._state:
                if node in self._taken:
                    raise NotAlikeError("two layers have the same part of the cache")
                self._taken.add(node)
                operands.append(self._flat[node])
            else:
                around.append(node)
                operands.append(None)
        if any(isinstance(operands[position], Weight) for position in template.body.written):
            raise NotAlikeError("a layer writes to its weights")
        place = given.region or call
        tensors = [n for n in around if isinstance(n.meta["example_value"], Tensor)]
        sizes = [n for n in around if n not in tensors]
        made = BodyCall(template.body, tuple(operands), calling_module(place))
        graph = call.graph
        with graph.inserting_before(place):
            opaque = graph.call_function(call_op(), (tensors, sizes, len(self._found.calls)))
            opaque.meta = dict(place.meta)
            outputs = []
            for position, value in enumerate(made.outputs()):
                outputs.append(graph.call_function(operator.getitem, (opaque, position)))
                outputs[-1].meta["example_value"] = value
            written = made.written_around()
            for operand, output in zip(written, outputs, strict=False):
                before = operands[:operand].count(None)
                graph.call_method("copy_", (around[before], output))
        self._found.calls.append(made)
        results = outputs[len(written) :]
        for user in [user for user in place.users if user.target is operator.getitem]:
            user.replace_all_uses_with(results[cast(int, user.args[1])])
            graph.erase_node(user)
        if place.users:
            place.replace_all_uses_with(results[0])
        graph.erase_node(call)
        if place is not call:
            graph.erase_node(place)

    def _check_memory(self) -> None:
        """Refuse caches that share memory with anything else."""
        memory = {
            node: node.meta["grapharg"].example.untyped_storage()._cdata
            for node in self._flat
            if isinstance(node.meta["example_value"], Tensor)
        }
        counts = collections.Counter(memory.values())
        for node in self._state & self._taken:
            if counts[memory[node]] > 1:
                raise NotAlikeError("a part of the cache shares memory with another input")


@dataclass(frozen=True)
class _Given:
    """What a call of a marked layer has, in Dynamo's graph.

    Attributes:
        number: Which marked layer is called.
        arguments: Its tensors and symbolic integers, and the tensors of its part of the cache.
        state: Those of its part of the cache.
        results: What came out, if it was traced itself.
    """

    number: int
    arguments: list[fx.Node]
    state: list[fx.Node]
    results: list[fx.Node]

    @classmethod
    def of(cls, call: fx.Node) -> _Given:
        number, args, kwargs, state, *traced = call.args
        assert isinstance(number, int)
        return cls(number, _nodes((args, kwargs, state)), _nodes(state), _nodes(traced[1:]))

    @property
    def pattern(self) -> tuple[int, ...]:
        """Which arguments are one."""
        return tuple(map(self.arguments.index, self.arguments))

    @property
    def region(self) -> fx.Node | None:
        """The call of the region that gave the results; None if it did not give all of them."""
        origins = [r.args for r in self.results if r.target is operator.getitem]
        regions = [node for node, _ in origins]
        if len(origins) < len(self.results) or not origins:
            return None
        if origins != [(regions[0], position) for position in range(len(origins))]:
            return None
        return cast(fx.Node, regions[0])


def _traced(module: fx.GraphModule, call: fx.Node) -> tuple[fx.Graph, tuple[int, ...]]:
    """The functional form of a region, and which operands it writes."""
    operands = [node.meta["example_value"] for node in nodes_in(call.args[2:])]
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Callable[..., object]:
        found.append(gm)
        return make_boxed_func(lambda *flat: [])

    context = TracingContext(TracingContext.get().fake_mode)
    with tracing(context):
        aot_module_simplified(module, operands, fw_compiler=keep)
    metadata = context.fw_metadata
    assert metadata is not None
    (traced,) = found
    graph = traced.graph
    written = tuple(metadata.mutated_inp_runtime_indices)
    if (
        len(graph.find_nodes(op="placeholder")) != len(operands)
        or graph.find_nodes(op="get_attr")
        or any(depends_on_data(node.meta.get("val")) for node in graph.nodes)
        or not all(isinstance(node, fx.Node) for node in returned_nodes(graph))
        or any(not metadata.input_info[i].mutates_data for i in written)
        or any(info.mutates_metadata for info in metadata.input_info)
    ):
        raise NotAlikeError("a layer is not a function of tensors alone")
    return graph, written


def _nodes(values: object) -> list[fx.Node]:
    """The nodes among nested arguments, in order, each as often as it is there."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, fx.Node)]
