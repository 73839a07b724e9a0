"""A GE graph as plain data, checked.

Invariants of a `Graph`:

* Names are unique; every edge comes from an output that exists; there is no cycle.
* `nodes` is in a legal order, as close to the given one as the edges allow.
* There is one NetOutput; Data ops are numbered 0, 1, ...; a Const holds its value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.ops.table import Attributes

__all__ = [
    "DATA_TYPES",
    "SOURCE_TYPES",
    "Edge",
    "Graph",
    "Node",
    "TensorDesc",
    "dtype_name",
    "malformed",
]

DATA_TYPES = ("Data", "RefData")
"""Types of the ops that stand for a graph's inputs."""

SOURCE_TYPES = (*DATA_TYPES, "Const", "ConstPlaceHolder")
"""Types of the ops that have a value before anything runs."""


class Edge(NamedTuple):
    """One output of one node."""

    producer: str
    output: int


@dataclass(frozen=True)
class TensorDesc:
    """What a graph says about a tensor.

    Attributes:
        name: Name of the input or output in the op's definition.
        dtype: Data type; None where torch has none, or the graph says none.
        shape: Shape, -1 for a dynamic dim; None if even the rank is unknown. Only those of Data,
            Const and NetOutput mean something.
        fx_name: Which result of which fx node it is, as `NODE-TARGET.OUTPUT.INDEX`; may be empty.
        described: Whether torchair has set the data type from the fx node's value. On other tensors
            it is a default without meaning.
        numel: Number of elements of the fx node's value; None if unknown.
    """

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None = ()
    fx_name: str = ""
    described: bool = False
    numel: int | None = None

    def admits(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` has this data type and shape."""
        return tensor.dtype == self.dtype and (
            self.shape is None
            or (
                tensor.ndim == len(self.shape)
                and all(
                    want in (-1, got) for want, got in zip(self.shape, tensor.shape, strict=True)
                )
            )
        )

    def __str__(self) -> str:
        dims = "any shape" if self.shape is None else [("?" if d < 0 else d) for d in self.shape]
        return f"{dtype_name(self.dtype)} {str(dims).replace(chr(39), '')}"


@dataclass(frozen=True, eq=False)
class Node:
    """One op of a graph.

    Attributes:
        name: Its name.
        type: Its op type.
        inputs: For each input where it comes from; None for an unfed one.
        input_descs: For each input its descriptor, whose name is the input's.
        controls: Names of nodes that must have run before.
        outputs: Descriptors of its outputs.
        attributes: Its attributes, but for those whose names start with an underscore.
        value: Value of a Const.
    """

    name: str
    type: str
    inputs: tuple[Edge | None, ...] = ()
    input_descs: tuple[TensorDesc, ...] = ()
    controls: tuple[str, ...] = ()
    outputs: tuple[TensorDesc, ...] = ()
    attributes: Attributes = field(default_factory=lambda: Attributes({}))
    value: torch.Tensor | None = None

    @property
    def needs(self) -> list[str]:
        """Names of all nodes that must have run before."""
        return [*(edge.producer for edge in self.inputs if edge is not None), *self.controls]


@dataclass(frozen=True, eq=False)
class Graph:
    """A GE graph; see the module's docstring.

    Attributes:
        name: Its name.
        nodes: Nodes by name.
        data: The Data and RefData nodes by index.
        net_output: The NetOutput node; its inputs are the graph's results.
    """

    name: str
    nodes: Mapping[str, Node]
    data: tuple[Node, ...]
    net_output: Node

    @classmethod
    def of(cls, name: str, nodes: Iterable[Node]) -> Graph:
        """A graph of these nodes.

        Raises:
            RolemeshError: RM027 if they are not a valid graph.
        """
        named: dict[str, Node] = {}
        for node in nodes:
            if node.name in named:
                raise malformed(
                    f"two ops are called {node.name!r}",
                    f"{named[node.name].type} and {node.type}",
                    "edges name the op that they come from",
                )
            named[node.name] = node
        for node in named.values():
            _check_edges(node, named)
        return cls(
            name,
            MappingProxyType(_ordered(named)),
            _data(named.values()),
            _net_output(named.values()),
        )

    def describe(self, node: Node) -> str:
        """Type and name of a node, and the fx node that it was converted from or for."""
        origin = self.origin(node)
        return f"{node.type} {node.name!r}" + (f", {origin}" if origin else "")

    def origin(self, node: Node) -> str:
        """The fx node that a node computes, or the nearest one that needs it, or that it needs."""
        users: dict[str, list[str]] = {}
        for user in self.nodes.values():
            for name in user.needs:
                users.setdefault(name, []).append(user.name)
        return self._nearest(node, "for", lambda found: users.get(found.name, ())) or self._nearest(
            node, "after", lambda found: found.needs
        )

    def _nearest(self, node: Node, word: str, neighbours: Callable[[Node], Iterable[str]]) -> str:
        seen, queue = {node.name}, deque([node])
        while queue:
            found = queue.popleft()
            named = next((desc.fx_name for desc in found.outputs if desc.fx_name), "")
            if named:
                name, _, target = named.partition(".OUTPUT.")[0].partition("-")
                return f"{'of' if found is node else word} fx node {name} ({target})"
            for neighbour in neighbours(found):
                if neighbour not in seen:
                    seen.add(neighbour)
                    queue.append(self.nodes[neighbour])
        return ""


def malformed(what: str, where: str, why: str) -> RolemeshError:
    """RM027 with the fix that all of them share."""
    return RolemeshError(
        "RM027",
        what=what,
        where=where,
        why=why,
        fix="convert the program again; a graph that torchair made for rolemesh is valid",
    )


def dtype_name(dtype: torch.dtype | None) -> str:
    """`float32` for torch.float32."""
    return "no torch dtype" if dtype is None else str(dtype).removeprefix("torch.")


def _check_edges(node: Node, nodes: Mapping[str, Node]) -> None:
    where = f"{node.type} {node.name!r}"
    for name in node.needs:
        if name not in nodes:
            raise malformed(f"an edge comes from {name!r}, which does not exist", where, "")
    for edge in node.inputs:
        if edge is not None and edge.output >= len(nodes[edge.producer].outputs):
            raise malformed(
                f"an edge comes from output {edge.output} of {edge.producer!r}",
                where,
                f"{nodes[edge.producer].type} {edge.producer!r} has "
                f"{len(nodes[edge.producer].outputs)} outputs",
            )


def _ordered(nodes: Mapping[str, Node]) -> dict[str, Node]:
    """The nodes in the given order, but each one after all that it needs.

    A depth-first search, so that a node that is listed too late moves up to its first user, and no
    user moves down behind ops that came after it.
    """
    done: dict[str, Node] = {}
    for start in nodes:
        path = [(start, iter(nodes[start].needs))]
        open_nodes = {start: None}
        while path and start not in done:
            name, needs = path[-1]
            need = next((need for need in needs if need not in done), None)
            if need is None:
                path.pop()
                del open_nodes[name]
                done[name] = nodes[name]
            elif need in open_nodes:
                names = list(open_nodes)
                raise malformed(
                    "ops form a cycle",
                    " needs ".join(repr(name) for name in [*names[names.index(need) :], need]),
                    "none of them can run first",
                )
            else:
                open_nodes[need] = None
                path.append((need, iter(nodes[need].needs)))
    return done


def _data(nodes: Iterable[Node]) -> tuple[Node, ...]:
    found: dict[int, Node] = {}
    for node in nodes:
        if node.type not in DATA_TYPES:
            continue
        where = f"{node.type} {node.name!r}"
        if "index" not in node.attributes:
            raise malformed("an input has no index", where, "its attribute index is missing")
        index = _index(node)
        if index in found:
            raise malformed(
                f"two inputs have index {index}", f"{found[index].name!r} and {node.name!r}", ""
            )
        if len(node.outputs) != 1 or node.outputs[0].dtype is None:
            raise malformed(
                "an input is not described",
                where,
                "a Data op has one output, whose data type torch must know",
            )
        found[index] = node
    if sorted(found) != list(range(len(found))):
        raise malformed(
            f"inputs have the indices {sorted(found)}",
            ", ".join(repr(found[index].name) for index in sorted(found)),
            "they must be numbered from 0 without holes",
        )
    return tuple(found[index] for index in range(len(found)))


def _index(node: Node) -> int:
    try:
        return node.attributes.int("index")
    except (TypeError, ValueError) as error:
        raise malformed(
            "an input's index is no number", f"{node.type} {node.name!r}", ""
        ) from error


def _net_output(nodes: Iterable[Node]) -> Node:
    found = [node for node in nodes if node.type == "NetOutput"]
    if len(found) != 1:
        raise malformed(
            f"a graph has {len(found)} NetOutput ops instead of one",
            ", ".join(repr(node.name) for node in found),
            "its inputs are the graph's results",
        )
    (node,) = found
    for position, (edge, desc) in enumerate(zip(node.inputs, node.input_descs, strict=True)):
        if edge is None or desc.dtype is None:
            raise malformed(
                f"result {position} is not fed, or its data type is not known",
                f"NetOutput {node.name!r}",
                "",
            )
    return node
