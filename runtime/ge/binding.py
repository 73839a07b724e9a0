"""Which inputs of a GE node are which parameters of its op's function.

Checked here, before anything runs: all op types and inputs are known, and required inputs are fed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.graph import Edge, Graph, Node, malformed
from rolemesh.runtime.ge.ops.table import Function, Op, Result

__all__ = ["Argument", "Binding", "bind_nodes"]

Argument = Edge | tuple[Edge, ...] | None
"""Where an argument comes from: an edge, several for a list of tensors, or the default."""


@dataclass(frozen=True)
class Binding:
    """A node together with what its op computes.

    Attributes:
        node: The node.
        op: What its type computes.
        names: The parameters of its function.
        defaults: For each parameter, its default.
        function: The function, taking all inputs by position.
        arguments: For each parameter, where it comes from.
    """

    node: Node
    op: Op
    names: tuple[str, ...]
    defaults: tuple[object, ...]
    function: Function
    arguments: tuple[Argument, ...]

    def edges(self, *names: str) -> tuple[Edge, ...]:
        """The edges that feed some of the inputs."""
        found: list[Edge] = []
        for name, argument in zip(self.names, self.arguments, strict=True):
            if name in names and argument is not None:
                found.extend([argument] if isinstance(argument, Edge) else argument)
        return tuple(found)

    @property
    def written(self) -> dict[int, Edge]:
        """By output, the input that it is, for a ref op."""
        found: dict[int, Edge] = {}
        for output, name in self.op.writes.items():
            for offset, edge in enumerate(self.edges(name)):
                found[output + offset] = edge
        return found


def bind_nodes(graph: Graph, nodes: Iterable[Node], ops: Mapping[str, Op]) -> list[Binding]:
    """Bind nodes to the ops of a table.

    Args:
        graph: The graph that the nodes are in.
        nodes: The nodes that will run.
        ops: What op types compute.

    Raises:
        RolemeshError: RM028 naming all op types, and inputs of ops, that are not in the table;
            RM027 if a required input is not fed or a list of inputs has holes.
    """
    nodes = list(nodes)
    _refuse_unknown(graph, nodes, ops)
    forms: dict[str, tuple[tuple[str, ...], tuple[object, ...], Function]] = {}
    bindings = []
    for node in nodes:
        op = ops[node.type]
        if op.type not in forms:
            forms[op.type] = _form(op)
        names, defaults, function = forms[op.type]
        arguments = tuple(_argument(graph, node, op, name) for name in names)
        bindings.append(Binding(node, op, names, defaults, function, arguments))
    return bindings


def _form(op: Op) -> tuple[tuple[str, ...], tuple[object, ...], Function]:
    """The inputs of an op, their defaults, and its function, taking them by position."""
    function = op.function
    parameters = inspect.signature(function).parameters
    names = op.inputs
    defaults = tuple(parameters[name].default for name in names)
    keywords = [p.name for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    if not keywords:
        return names, defaults, function
    count = len(parameters) - len(keywords)

    def call(*arguments: object) -> Result:
        return function(*arguments[:count], **dict(zip(keywords, arguments[count:], strict=True)))

    return names, defaults, call


def _argument(graph: Graph, node: Node, op: Op, name: str) -> Argument:
    if name not in op.dynamic:
        for edge, desc in zip(node.inputs, node.input_descs, strict=True):
            if desc.name == name and edge is not None:
                return edge
        if name in op.required:
            raise malformed(
                f"input {name!r} is not fed",
                graph.describe(node),
                f"it has the inputs {_fed(node)}",
            )
        return None
    found: dict[int, Edge] = {}
    for edge, desc in zip(node.inputs, node.input_descs, strict=True):
        if _parameter(op, desc.name) == name and edge is not None:
            found[int(desc.name[len(name) :])] = edge
    if sorted(found) != list(range(len(found))):
        raise malformed(
            f"the list of inputs {name!r} has holes",
            graph.describe(node),
            f"it has the inputs {_fed(node)}",
        )
    return tuple(found[index] for index in range(len(found)))


def _parameter(op: Op, name: str) -> str | None:
    """The parameter that takes the input `name`: itself, or for `x0`, `x1`, ... the list `x`."""
    if name in (*op.required, *op.optional) and name not in op.dynamic:
        return name
    lists = [x for x in op.dynamic if name.startswith(x) and name[len(x) :].isdecimal()]
    return max(lists, key=len, default=None)


def _fed(node: Node) -> str:
    pairs = zip(node.inputs, node.input_descs, strict=True)
    return ", ".join(desc.name for edge, desc in pairs if edge is not None) or "none"


def _refuse_unknown(graph: Graph, nodes: Iterable[Node], ops: Mapping[str, Op]) -> None:
    unknown: dict[str, Node] = {}
    for node in nodes:
        op = ops.get(node.type)
        if op is None:
            unknown.setdefault(node.type, node)
            continue
        for edge, desc in zip(node.inputs, node.input_descs, strict=True):
            if edge is not None and _parameter(op, desc.name) is None:
                unknown.setdefault(f"{node.type} with input {desc.name}", node)
    if unknown:
        raise RolemeshError(
            "RM028",
            what="the reference executor has no semantics for: " + ", ".join(sorted(unknown)),
            where="\n".join(graph.describe(unknown[name]) for name in sorted(unknown)),
            why="it runs the op types in rolemesh.runtime.ge.ops",
            fix="run the graph on a device, or add the op to one of those tables",
        )
