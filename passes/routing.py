"""Which experts read a value, or give it: what says whether rows may move by their routes.

A row that moves to no rank that works on it is lost. So what experts read may come by routes if
nothing else reads it, and what is summed may go by routes if it is nothing else than what they
give.
"""

from __future__ import annotations

import torch
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.placement import Replicate, Shard
from rolemesh.compiler.ir.program import Program, tensor_type

__all__ = ["experts_that_give", "experts_that_read", "routing_fault"]

aten = torch.ops.aten

_RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default})


def experts_that_read(node: fx.Node) -> fx.Node | None:
    """Experts that alone read a value, as their rows.

    Args:
        node: The value.

    Returns:
        The first of them; all have the same ids. None if something else reads it.
    """
    readers = list(node.users)
    if not readers or any(reader.target is not dialect.EXPERTS for reader in readers):
        return None
    first = readers[0]
    for reader in readers:
        others = [operand for operand in reader.args[1:] if operand is node]
        if reader.args[0] is not node or others or _routes(reader) != _routes(first):
            return None
    return first


def experts_that_give(node: fx.Node) -> fx.Node | None:
    """Experts whose result a value is, rows of another shape at most; None if it is none."""
    while node.target in _RESHAPES:
        (source,) = (operand for operand in node.all_input_nodes if operand is node.args[0])
        if tensor_type(source).shape[-1] != tensor_type(node).shape[-1]:
            return None
        node = source
    return node if node.target is dialect.EXPERTS else None


def routing_fault(program: Program, node: fx.Node) -> str | None:
    """What is wrong with a dispatch or a combine; None if nothing is."""
    value, ids = node.args
    assert isinstance(value, fx.Node)
    assert isinstance(ids, fx.Node)
    dispatches = node.target is dialect.DISPATCH
    found = experts_that_read(node) if dispatches else experts_that_give(value)
    if found is None:
        return f"{'is read' if dispatches else 'sums what is given'} by other ops than experts"
    own = (ids, node.kwargs["axes"], node.kwargs["size"])
    if _routes(found) != own:
        return f"has other routes than %{found.name}"
    shard, axes = node.kwargs["shard"], node.kwargs["axes"]
    assert isinstance(axes, tuple)
    if len(axes) != 1 or not isinstance(shard, Shard):
        return "does not split tokens over one axis"
    if shard.dim >= (1 if dispatches else tensor_type(value).ndim - 1):
        return f"splits dim {shard.dim}, which does not count tokens"
    index = program.the_mesh.index(str(axes[0]))
    if not isinstance(program.layout(ids).placements[index], Replicate):
        return f"reads %{ids.name}, of which a rank has a part"
    return None


def _routes(experts: fx.Node) -> object:
    """What says which rows a rank works on."""
    return experts.args[1], experts.kwargs["axes"], experts.kwargs["size"]
