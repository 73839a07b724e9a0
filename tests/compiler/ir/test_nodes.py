"""Nodes added by us make the same graphs as those that torch adds."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from rolemesh.compiler.ir.nodes import add_call, copy_node

aten = torch.ops.aten

NAMES = [
    "mul",
    "mul",
    "mul_3",
    "mul",
    "max",
    "x_1_2",
    "x_1",
    "9",
    "a b",
    "_",
    "_7",
    "lambda",
    "mul_3",
]
"""Names that are free, taken, numbered, none in Python, or Python's own."""


def ours(graph: fx.Graph, name: str | None, *args: object) -> fx.Node:
    return add_call(graph, aten.mul.Tensor, args, {"out": [args[0], None]}, name)


def torchs(graph: fx.Graph, name: str | None, *args: object) -> fx.Node:
    kwargs: dict[str, fx.node.Argument] = {"out": [args[0], None]}  # type: ignore[list-item]
    return graph.create_node("call_function", aten.mul.Tensor, args, kwargs, name)  # type: ignore[arg-type]


def made(add: Callable[..., fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    value = x
    for name in (*NAMES, None, None):
        value = add(graph, name, x, value)
    with graph.inserting_before(value):
        first = add(graph, "early", x, 2)
    part = graph.call_function(operator.getitem, (first, slice(x, None)))  # type: ignore[arg-type]
    part.meta["type"] = "f32[2]"
    graph.output((value, part))
    return graph


def told(graph: fx.Graph) -> object:
    """All that a graph says of itself."""
    graph.lint()
    of_target = graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    names = graph._graph_namespace
    return (
        [(n.name, n.op, n.target, str(n.args), str(n.kwargs), n.meta) for n in graph.nodes],
        [[user.name for user in node.users] for node in graph.nodes],
        [node.name for node in of_target],
        len(graph.nodes),
        names._used_names,
        dict(names._base_count),
        [graph.create_node("placeholder", name, name=name).name for name in NAMES],
    )


def test_a_call_is_added_as_torch_adds_it() -> None:
    assert told(made(ours)) == told(made(torchs))


def test_a_node_is_copied_as_torch_copies_it() -> None:
    source = made(torchs)
    copies = []
    for copy in (copy_node, lambda graph, node, values: graph.node_copy(node, values)):
        graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in source.nodes:
            values[node] = copy(graph, node, values.__getitem__)
        copies.append(told(graph))
        assert all(values[node].meta is not node.meta for node in source.nodes)
    assert copies[0] == copies[1]
