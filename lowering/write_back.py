"""New values of mutated inputs, written into those inputs by the graph itself.

In a functional graph the new value of a cache is a result, made from a copy of the old one. Here a
graph ends with a copy of each such result into its input, and no longer returns it: a compiler
drops that copy, and the first one too, where the new value is the old one with some rows written.
For a graph that runs op by op, `write_in_place` does that.

Invariants:

* A graph computes the same values; only outputs that are new values of inputs are not returned.
* What a graph returns lies in memory of its own, and not in that of an input.
* A new value is not read from memory that has been overwritten by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

__all__ = ["copy_back", "write_early", "write_in_place"]

_aten = torch.ops.aten


def copy_back(graph: fx.Graph, mutated: Mapping[int, int]) -> list[int]:
    """End a graph with a copy of each new value into its input, and return only the others.

    A new value that is something else too (a result, or another input's value) is returned as well,
    and for the caller to copy: no compiler is relied on to see that the order matters.

    Args:
        graph: A graph; changed.
        mutated: By index of an output that is the new value of an input, the index of that input.

    Returns:
        Indices of the outputs that the graph still returns.
    """
    inputs, end = graph.find_nodes(op="placeholder"), graph.output_node()
    results, given = _results(graph), _sharing(inputs)
    kept: list[int] = []
    copies: list[tuple[fx.Node, fx.Node]] = []
    with graph.inserting_before(end):
        for index, value in enumerate(results):
            target = inputs[mutated[index]] if index in mutated else None
            if not isinstance(value, fx.Node) or target is None:
                kept.append(index)
            elif value is target:
                continue
            elif _is_apart(results, index, target, given):
                copies.append((target, value))
                continue
            else:
                kept.append(index)
            if isinstance(value, fx.Node) and value in given:
                copy = results[index] = graph.call_function(_aten.clone.default, (value,))
                copy.meta.update(value.meta)
        for target, value in copies:
            done = graph.call_function(_aten.copy_.default, (target, value))
            done.meta.update(target.meta)
            done.meta["origin"] = value.meta.get("origin")
    end.args = (tuple(results[index] for index in kept),)
    return kept


def write_early(graph: fx.Graph) -> None:
    """Move each copy into an input behind the last op that reads what was there.

    Args:
        graph: A flat graph; changed.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    for write in graph.find_nodes(op="call_function", target=_aten.copy_.default):
        base, value = cast(Sequence[fx.Node], write.args)
        readers = [user for held in _sharing([base]) for user in held.users if user is not write]
        last = max([value, *readers], key=place.__getitem__)
        last.append(write)


def write_in_place(graph: fx.Graph, mutated: Mapping[int, int]) -> None:
    """Let ops that write some rows of a mutated input write them to its memory.

    An op stays as it is if anything after it reads what was there before.

    Args:
        graph: A graph that runs op by op; changed.
        mutated: As for `copy_back`, which comes next.
    """
    inputs, results = graph.find_nodes(op="placeholder"), _results(graph)
    given = _sharing(inputs)
    place = {node: index for index, node in enumerate(graph.nodes)}
    for output, position in mutated.items():
        base, writes = inputs[position], _writes(results[output], inputs[position])
        if not _is_apart(results, output, base, given):
            continue
        while writes and _reads_last(writes[0], base, place):
            base = _in_place(graph, writes.pop(0), place)
            if not writes:
                results[output] = inputs[position]
    graph.output_node().args = (tuple(results),)


def _is_apart(
    results: Sequence[fx.node.Argument], index: int, target: fx.Node, given: set[fx.Node]
) -> bool:
    """Whether a new value of `target` is nothing else: no input, and no part of another output."""
    value = results[index]
    if not isinstance(value, fx.Node) or value in given:
        return False
    others = {*results[:index], *results[index + 1 :]}
    return others.isdisjoint(_sharing([*_writes(value, target), value]))


def _results(graph: fx.Graph) -> list[fx.node.Argument]:
    found = graph.output_node().args[0]
    assert isinstance(found, tuple | list)
    return list(found)


def _writes(value: object, base: fx.Node) -> list[fx.Node]:
    """The writes of rows that make `value` out of `base`, in order; none if other ops do."""
    found: list[fx.Node] = []
    while isinstance(value, fx.Node) and value is not base:
        if value.target not in _IN_PLACE:
            return []
        found.insert(0, value)
        value = value.args[0]
    return found


def _reads_last(write: fx.Node, base: fx.Node, place: Mapping[fx.Node, int]) -> bool:
    """Whether nothing from `write` on reads the memory of `base`, but `write` as its base."""
    rest: list[fx.Node] = []
    fx.map_arg((write.args[1:], write.kwargs), rest.append)
    return base not in rest and all(
        place[user] < place[write] or (user is write and held is base)
        for held in _sharing([base])
        for user in held.users
    )


def _in_place(graph: fx.Graph, write: fx.Node, place: dict[fx.Node, int]) -> fx.Node:
    """Let a write of rows change its base; the node that holds the new value."""
    assert isinstance(write.target, OpOverload)
    target = _IN_PLACE[write.target]
    if target is not _aten.copy_.default:
        write.target = target
        return write
    base, rows, *where = write.args
    assert isinstance(base, fx.Node)
    with graph.inserting_before(write):
        part = graph.call_function(_aten.slice.Tensor, (base, *where), write.kwargs)
        done = graph.call_function(target, (part, rows))
    part.meta["origin"] = done.meta["origin"] = write.meta.get("origin")
    place[part] = place[done] = place[write]
    write.replace_all_uses_with(base)
    graph.erase_node(write)
    done.name = write.name
    return base


def _sharing(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes, and those after them whose values may share their memory."""
    found = set(nodes)
    pending = list(nodes)
    while pending:
        held = pending.pop()
        for user in held.users:
            if user not in found and _may_share(user, held):
                found.add(user)
                pending.append(user)
    return found


def _may_share(user: fx.Node, operand: fx.Node) -> bool:
    """Whether a result of `user` may lie in the memory of one of its operands."""
    target = user.target
    if user.op == "output":
        return False
    if not isinstance(target, OpOverload):
        return True  # a function of `lowering.mesh_ops`, or one that picks one of several values
    if "unsafe" in target._schema.name or target is torch.ops._c10d_functional.wait_tensor.default:
        return True
    arguments = target._schema.arguments
    given = [*zip((a for a in arguments if not a.kwarg_only), user.args, strict=False)]
    named = {argument.name: argument for argument in arguments}
    given += [(named[name], value) for name, value in user.kwargs.items()]
    return any(
        argument.alias_info is not None and (value is operand or isinstance(value, list | tuple))
        for argument, value in given
    )


_IN_PLACE: Mapping[object, OpOverload] = MappingProxyType(
    {
        _aten.index_copy.default: _aten.index_copy_.default,
        _aten.index_put.default: _aten.index_put_.default,
        _aten.scatter.src: _aten.scatter_.src,
        _aten.scatter.value: _aten.scatter_.value,
        _aten.slice_scatter.default: _aten.copy_.default,
    }
)
"""Ops that write some rows -> what writes them to memory; `copy_` takes a view of those rows."""
