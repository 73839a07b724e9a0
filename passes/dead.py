"""Ops that a rewrite leaves without a reader: they would run for nothing."""

from __future__ import annotations

from torch import fx

from rolemesh.compiler.ir.layout import Layout

__all__ = ["drop_dead"]


def drop_dead(graph: fx.Graph, layouts: dict[fx.Node, tuple[Layout, ...]]) -> None:
    """Remove ops that nothing reads from a graph under construction, and their layouts."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
            layouts.pop(node, None)
