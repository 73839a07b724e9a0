"""Forms of AOTAutograd's graph with sizes that depend on data, rewritten to ones with fixed sizes.

A Program has no sizes that depend on data. Some models have them on the way only: what they compute
has a fixed size, and an equal form without them exists. `FORMS` lists those forms; a form is tried
at each node that it names and gives the node that takes its place, or None.

Invariants: values stay the same; a graph without such sizes is not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from rolemesh.compiler.capture.data_slices import slice_at_an_offset
from rolemesh.compiler.capture.editing import depends_on_data, evaluated, number_at, tensor_value
from rolemesh.compiler.capture.leading_rows import rows_in_front
from rolemesh.compiler.capture.masked_rows import rows_of_a_mask
from rolemesh.compiler.capture.ragged import products_of_ragged_pieces

__all__ = ["FORMS", "fix_sizes"]

aten = torch.ops.aten

FORMS: Mapping[OpOverload, Callable[[fx.Node], fx.Node | None]] = MappingProxyType(
    {
        aten.cat.default: products_of_ragged_pieces,
        aten.index_put.default: rows_of_a_mask,
        aten.masked_scatter.default: rows_in_front,
        aten.slice.Tensor: slice_at_an_offset,
    }
)
"""Op at the end of a form -> its rewrite."""


def fix_sizes(graph: fx.Graph) -> None:
    """Rewrite all forms that `FORMS` knows, in place.

    Args:
        graph: AOTAutograd's graph.
    """
    if not any(depends_on_data(node.meta.get("val")) for node in graph.nodes):
        return
    changed: set[fx.Node] = set()
    stale: set[fx.Node] = set()
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        form = FORMS.get(node.target)
        fixed = None if form is None else form(node)
        if fixed is not None:
            stale |= _now_known(graph, tensor_value(node), tensor_value(fixed))
            node.replace_all_uses_with(fixed)
            changed.add(fixed)
            continue
        if changed.intersection(node.all_input_nodes):
            stale.add(node)
        if node in stale and not _takes_data(node):
            # Sizes of later values that were sums of data-dependent ones are plain now.
            node.meta["val"] = evaluated(node.target, node.args, node.kwargs)
            changed.add(node)
    if changed:
        _drop_dead(graph)


def _now_known(graph: fx.Graph, old: Tensor, new: Tensor) -> set[fx.Node]:
    """Give plain values to numbers that turn out to be plain, such as the sum of all pieces' sizes.

    Returns:
        The nodes that take them.
    """
    sizes: Iterable[tuple[int | torch.SymInt, int]] = zip(old.shape, new.shape, strict=True)
    known = {
        before.node.expr: after
        for before, after in sizes
        if isinstance(before, torch.SymInt) and depends_on_data(before)
    }
    takers: set[fx.Node] = set()
    for node in graph.nodes if known else ():
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt) or value.node.expr not in known:
            continue
        plain = number_at(node, known[value.node.expr])
        if plain is not None:
            takers |= set(node.users)
            _put_in_place_of(node, plain)
    return takers


def _put_in_place_of(node: fx.Node, number: int | fx.Node) -> None:
    def value(operand: fx.Node) -> int | fx.Node:
        return number if operand is node else operand

    for user in list(node.users):
        user.args = fx.map_arg(user.args, value)
        user.kwargs = fx.map_arg(user.kwargs, value)


def _takes_data(node: fx.Node) -> bool:
    """Whether a node takes a number that depends on data."""
    values = [operand.meta.get("val") for operand in node.all_input_nodes]
    return any(not isinstance(value, Tensor) and depends_on_data(value) for value in values)


def _drop_dead(graph: fx.Graph) -> None:
    """Remove assertions, which keep the numbers alive that they are about, and what is dead."""
    for node in graph.find_nodes(op="call_function", target=aten._assert_scalar.default):
        graph.erase_node(node)
    graph.eliminate_dead_code()
