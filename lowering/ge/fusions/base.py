"""The form of a fusion, and what fusions read graphs with.

A fusion looks at one node at a time, as the last of a pattern. Where the pattern is there, it says
which nodes it gives the values of, which nodes nothing else may need, and how to make the fused op.
`rewrite` does the rest.

Invariants of a rewritten graph:

* Each output has the same shape and dtype, and the same value but for rounding.
* Nothing is computed twice: a pattern with an inner value that another op needs is left alone.
* No sizes that are symbols have been compared in a way that would fix them.
* A new node has `meta["val"]`, and the `meta["origin"]` of the output it stands for, with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from rolemesh.compiler.ir.program import origin
from rolemesh.passes.patterns import is_call, users_of

__all__ = [
    "Emitter",
    "Found",
    "Fusion",
    "Setting",
    "rewrite",
]


@dataclass(frozen=True)
class Setting:
    """What fusions of one graph go by.

    Attributes:
        group_name: The name of a communicator, as ops of GE take it, by the group's name in
            torch.distributed.
        within_limits: Leave a pattern alone whose sizes are not among those that the fused op's
            documentation gives. Dtypes must be among them always.
    """

    group_name: Callable[[str], str]
    within_limits: bool = True


class Emitter:
    """Adds nodes with values before one node.

    Args:
        graph: The graph.
        anchor: The node that new ones go before, and whose origin they take.
        reason: Why they are there.
    """

    def __init__(self, graph: fx.Graph, anchor: fx.Node, reason: str) -> None:
        self.graph = graph
        self.anchor = anchor
        self.origin = replace(origin(anchor), reason=reason)

    def __call__(self, target: OpOverload, *args: object, **kwargs: object) -> fx.Node:
        """A call of an op; its arguments may be nodes."""
        return self._node(target, args, kwargs, target._schema.name.partition("::")[2])

    def part(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results of a new node."""
        return self._node(operator.getitem, (node, index), {}, f"{node.name}_{index}")

    def traced(self, function: Callable[..., Tensor], *operands: fx.Node) -> fx.Node:
        """What a function of tensors computes, as nodes of flat ATen.

        Args:
            function: The function.
            *operands: Its arguments.
        """
        values = [operand.meta["val"] for operand in operands]
        with _fake_mode(self.anchor), torch.no_grad():
            made = make_fx(function)(*values)
        here = dict(zip(made.graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in made.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), here.__getitem__)
                here[node] = self._node(node.target, args, kwargs, node.name)
        result = made.graph.output_node().args[0]
        assert isinstance(result, fx.Node)
        return here[result]

    def shared(self, operand: fx.Node, target: OpOverload, *args: object) -> fx.Node:
        """A call that other places may share: right after its operand, or one that is there.

        Args:
            operand: The operand.
            target: The op.
            *args: All arguments, the operand among them.
        """
        for user in operand.users:
            same_call = is_call(user, target) and user.args == args and not user.kwargs
            if same_call and user < self.anchor:
                return user
        name = target._schema.name.partition("::")[2]
        inputs = self.graph.find_nodes(op="placeholder")
        return self._node(target, args, {}, name, after=max(operand, *inputs))

    def _node(
        self,
        target: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        name: str,
        after: fx.Node | None = None,
    ) -> fx.Node:
        graph = self.graph
        place = graph.inserting_after(after) if after else graph.inserting_before(self.anchor)
        with place:
            node = graph.create_node("call_function", target, args, dict(kwargs), name)  # type: ignore[arg-type]
        values, options = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        with _fake_mode(self.anchor):
            node.meta["val"] = target(*values, **options)
        node.meta["origin"] = self.origin
        return node


@dataclass(frozen=True)
class Found:
    """A place where a fused op can stand.

    Attributes:
        outputs: The nodes whose values the op gives, in the order of the graph. Everything that the
            op needs comes before the first.
        inner: Nodes that only these outputs need. Nodes that would be dead afterwards anyway need
            not be named.
        emit: Makes the op: one node for each output.
    """

    outputs: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]
    emit: Callable[[Emitter], Sequence[fx.Node]]


@dataclass(frozen=True)
class Fusion:
    """A pass over one rank's flat graph.

    Attributes:
        op: The fused op that it makes.
        ends: Targets of the last node of its patterns.
        find: Tells whether a node is the last of a pattern.
    """

    op: OpOverload
    ends: frozenset[object]
    find: Callable[[fx.Node, Setting], Found | None]

    @property
    def name(self) -> str:
        """The name of the op, without its namespace."""
        return str(self.op._schema.name).partition("::")[2]


def rewrite(graph: fx.Graph, fusion: Fusion, setting: Setting) -> int:
    """Fuse wherever the pattern is.

    Args:
        graph: A flat graph whose nodes have `meta["val"]`; changed.
        fusion: What to fuse.
        setting: What to go by.

    Returns:
        The number of rewrites.
    """
    done = 0
    for node in list(graph.nodes):
        if node._erased or not is_call(node, *fusion.ends):
            continue
        found = fusion.find(node, setting)
        if found is None or not _is_closed(found):
            continue
        made = found.emit(Emitter(graph, found.outputs[0], f"fused {fusion.name}"))
        for old, new in zip(found.outputs, made, strict=True):
            old.replace_all_uses_with(new)
        _erase_dead(graph, found.outputs)
        done += 1
    return done


def _is_closed(found: Found) -> bool:
    within = {*found.outputs, *found.inner}
    return all(within.issuperset(users_of(node)) for node in found.inner)


def _erase_dead(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that nothing needs, and what only they needed."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or node.op != "call_function" or users_of(node):
            continue
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            continue
        for unused in list(node.users):
            graph.erase_node(unused)
        pending.extend(node.all_input_nodes)
        graph.erase_node(node)


def _fake_mode(node: fx.Node) -> torch._subclasses.FakeTensorMode:
    value = node.meta["val"]
    return (value[0] if isinstance(value, tuple | list) else value).fake_mode
