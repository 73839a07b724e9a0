"""Compose: norms and rotations of a model that uses composite ops become composite ops as well.

Libraries of models have interfaces for attention and for experts, and none for the norms and
rotations that their modules write out in ATen (`transformers` has one that needs the package
`kernels` when its models are imported). So a model that was asked to use composite ops, and has one
of attention or experts, gets the others by their patterns (`rolemesh.passes.recognise`). Other
models keep their ops.

A pattern with an inner value that anything else needs is left alone. A composite op has the name,
the type and the origin of the last node of its pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.node import Argument

from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.program import Program, tensor_types
from rolemesh.passes.patterns import is_call, users_of
from rolemesh.passes.recognise import (
    ENDS_OF_NORMS,
    ENDS_OF_ROTATIONS,
    find_norm,
    find_rotation,
)

__all__ = ["Compose", "uses_composite_ops"]

_ASKED_FOR = frozenset(
    {"rolemesh::attention", "rolemesh::sparse_attention", "rolemesh::experts"},
)


@dataclass(frozen=True)
class _Found:
    """A composite op and the nodes that only it stands for."""

    target: torch._ops.OpOverload
    args: tuple[Argument, ...]
    inner: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Compose:
    """The pass; see the module docstring."""

    name = "compose"
    requires = "a canonicalised Program without layouts"
    ensures = "norms and rotations are composite ops"

    def apply(self, program: Program) -> Program:
        """The program over a graph of composite ops, with the same inputs and outputs."""
        found = {node: match for node in program.ops if (match := _match(node)) is not None}
        return program.after(self.name, graph=_rewritten(program.graph, found))


def uses_composite_ops(program: Program) -> bool:
    """Whether a captured model has a composite op of attention or of experts."""
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _ASKED_FOR
        for node in program.ops
    )


def _match(node: fx.Node) -> _Found | None:
    if len(tensor_types(node)) != 1:
        return None
    found = None
    if is_call(node, *ENDS_OF_NORMS):
        norm = find_norm(node)
        if norm is not None:
            args = (norm.x, norm.gamma, norm.epsilon, norm.rounded)
            found = _Found(torch.ops.rolemesh.rms_norm.default, args, norm.inner)
    if found is None and is_call(node, *ENDS_OF_ROTATIONS):
        turned = find_rotation(node)
        if turned is not None:
            operands = (turned.x, turned.cos, turned.sin, turned.step == 2)
            found = _Found(torch.ops.rolemesh.rotary.default, operands, turned.inner)
    if found is None:
        return None
    within = {node, *found.inner}
    closed = all(within.issuperset(users_of(inner)) for inner in found.inner)
    return found if closed else None


def _rewritten(graph: fx.Graph, found: dict[fx.Node, _Found]) -> fx.Graph:
    """A copy of a graph with composite ops, without the nodes that nothing needs any more."""
    live: set[fx.Node] = set()
    pending = [graph.output_node()]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            match = found.get(node)
            needed = node.all_input_nodes if match is None else match.args
            pending.extend(value for value in needed if isinstance(value, fx.Node))
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "placeholder" and node not in live:
            continue
        match = found.get(node)
        if match is None:
            values[node] = copy_node(copy, node, values.__getitem__)
        else:
            args = fx.map_arg(match.args, values.__getitem__)
            values[node] = add_call(copy, match.target, args, name=node.name)
            values[node].meta.update(node.meta)
    return copy
