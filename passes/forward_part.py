"""The forward part of a Program that computes gradients.

What a weight or an input is to a model is read off what the model does with it. The backward part
would only blur that: it reads the same weights and tokens once more, for other ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import fx
from torch.fx.node import Argument

from rolemesh.compiler.ir.nodes import copy_node
from rolemesh.compiler.ir.program import Program

__all__ = ["forward_part"]


def forward_part(program: Program) -> tuple[Program, Mapping[fx.Node, fx.Node]]:
    """What a Program computes besides gradients.

    Args:
        program: A canonicalised Program.

    Returns:
        A Program of the same inputs without gradients among its outputs, and the node of
        `program` for each of its nodes. For a Program without gradients that is itself.
    """
    if not program.is_joint:
        return program, {node: node for node in program.graph.nodes}
    kept = [i for i, output in enumerate(program.outputs) if output.gradient_of is None]
    values = [program.results[i] for i in kept]
    pending = [value for value in values if isinstance(value, fx.Node)]
    needed: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = copy_node(graph, node, copies.__getitem__)
    graph.output(fx.map_arg(cast(Argument, tuple(values)), copies.__getitem__))
    outputs = tuple(program.outputs[i] for i in kept)
    part = replace(program, graph=graph, outputs=outputs)
    return part, {copy: node for node, copy in copies.items()}
