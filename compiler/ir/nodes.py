"""Adding nodes to graphs, at the rate that passes over deep models need.

A model of 61 layers is 19,000 nodes, and most passes make each of them anew. `Graph.create_node`
and `Graph.node_copy` search the arguments they are given for symbolic numbers of torch, which
Programs do not have, and match every name against patterns: that takes longer than all the rest.
Here a node is added as they add it, but for that: the graph is the same, its names too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx
from torch.fx.graph import _illegal_names
from torch.fx.node import Argument, Target

__all__ = ["add_call", "copy_node"]


def add_call(
    graph: fx.Graph,
    target: Target,
    args: tuple[object, ...] = (),
    kwargs: Mapping[str, object] | None = None,
    name: str | None = None,
) -> fx.Node:
    """A new node where a graph inserts, by default at its end, that calls a function.

    Args:
        graph: The graph; of no module yet.
        target: The function.
        args: Positional arguments: nodes of the graph, plain values, and lists of them.
        kwargs: Keyword arguments.
        name: What to call it, if that is free; by default it is named after the function.
    """
    named = graph._target_to_str(target) if name is None else name
    return _added(graph, "call_function", target, named, args, dict(kwargs) if kwargs else {})


def copy_node(graph: fx.Graph, node: fx.Node, values: Callable[[fx.Node], Argument]) -> fx.Node:
    """A copy of a node of another graph where a graph inserts, with its metadata.

    Args:
        graph: The graph; of no module yet.
        node: The other graph's node.
        values: Gives the new value of each node that it reads.
    """
    args, kwargs = node.args, node.kwargs
    new = _added(
        graph,
        node.op,
        node.target,
        node.name,
        fx.map_arg(args, values) if args else args,
        fx.map_arg(kwargs, values) if kwargs else kwargs,
        node.type,
    )
    new.meta.update(node.meta)
    return new


def _added(
    graph: fx.Graph,
    op: str,
    target: Any,
    name: str,
    args: Any,
    kwargs: Any,
    type_expr: object = None,
) -> fx.Node:
    """What `Graph.create_node` does, for arguments without symbolic numbers."""
    names = graph._graph_namespace
    used = names._used_names
    if name in used or name in _illegal_names or not name.isidentifier():
        name = names.create_name(name, None)
    else:
        used.add(name)
        base, _, number = name.rpartition("_")
        if number.isdigit() and base:
            names._base_count[base] = int(number)
        else:
            names._base_count.setdefault(name, 0)
    node = fx.Node(graph, name, op, target, args, kwargs, type_expr)
    names._obj_to_name[node] = name
    graph._insert(node)
    graph._find_nodes_lookup_table.table[op, target if op == "call_function" else None][node] = None
    graph._len += 1
    return node
