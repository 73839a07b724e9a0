"""Sink: casts and selections move before the collective whose result alone they read.

What is thrown away after a collective need not be received. A pass of this kind leaves the values
as they are, so only what every element goes through unchanged may move:

| after a collective | becomes | which collectives |
|---|---|---|
| some positions of the gathered dim | each rank's of them, zero elsewhere, summed | all_gather |
| a part of another dim | the same part, before | all_gather, all_reduce |
| a cast to a smaller dtype | the same cast, before | all_gather, all_to_all |

and a cast to a larger dtype just before an all_gather or an all_to_all moves behind it. No cast
moves across a reduction: that would sum in another precision.

The first is what a language model does that is asked for its last logits: with tokens split over
ranks, a rank receives one row instead of all, and the ranks need not know whose it is. A sum with
zeros is exact, but for a negative zero, which becomes a positive one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import is_bundle
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.placement import Partial, Replicate, Shard
from rolemesh.compiler.ir.program import Program, origin, tensor_type
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.compiler.ir.traffic import received_bytes
from rolemesh.passes.dead import drop_dead

__all__ = ["Sink"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Sink:
    """The pass; see the module docstring."""

    name = "sink"
    requires = "a partitioned graph"
    ensures = "no collective moves what a selection or a cast right behind it throws away"

    def apply(self, program: Program) -> Program:
        """The program with smaller collectives; unchanged if there is nothing to move."""
        history = program.history
        while plans := _plans(program):
            program = _Rewrite(program, plans).run(self.name)
        return replace(program, history=(*history, self.name))


@dataclass(frozen=True)
class _Plan:
    """What becomes of a collective and of the ops that read it.

    Attributes:
        collective: The collective; it goes.
        users: Readers that each become a smaller collective; empty where a cast moves behind.
    """

    collective: fx.Node
    users: tuple[fx.Node, ...]
    emit: Callable[[_Rewrite, fx.Node, fx.Node], fx.Node]


def _plans(program: Program) -> dict[fx.Node, _Plan]:
    """For each node that is rewritten, how: a collective's readers, or a collective itself."""
    found: dict[fx.Node, _Plan] = {}
    for node in program.ops:
        if node.target not in _KINDS or is_bundle(node) or node in found:
            continue
        if not all(isinstance(p, _PLAIN) for p in program.layout(_source(node)).placements):
            continue  # segments and groups of ranks are cut by what their axis says alone
        for kind in (_rows, _parts, _casts, _cast_before):
            plan = kind(program, node)
            if plan is not None:
                found |= dict.fromkeys(plan.users or (node,), plan)
                break
    return found


_PLAIN = (Replicate, Partial, Shard)
_KINDS = frozenset({dialect.ALL_GATHER, dialect.ALL_REDUCE, dialect.ALL_TO_ALL})


def _rows(program: Program, node: fx.Node) -> _Plan | None:
    """Positions of the gathered dim, for all readers."""
    shard, axes = node.kwargs.get("shard"), node.kwargs["axes"]
    assert isinstance(axes, tuple)
    users, value = tuple(node.users), tensor_type(node)
    if node.target is not dialect.ALL_GATHER or not isinstance(shard, Shard) or len(axes) > 1:
        return None
    ranks = program.the_mesh.axis_size(str(axes[0]))
    source = _source(node)
    cut = program.layout(source).local_shape(value.shape, program.the_mesh)
    chunks = shard.outer == 1 and (shard.size == value.shape[shard.dim] or shard.size % ranks == 0)
    picks = [pick for pick in map(_picked, users) if pick is not None and pick.dim == shard.dim]
    if not chunks or not users or len(picks) < len(users):
        return None
    if program.layout(node).shards_of(shard.dim):
        return None
    local = math.prod(cut)
    kept = sum(local // cut[shard.dim] * pick.length for pick in picks)
    if received_bytes("all_reduce", kept, ranks) >= received_bytes("all_gather", local, ranks):
        return None
    return _Plan(node, users, _emit_rows)


def _emit_rows(new: _Rewrite, node: fx.Node, user: fx.Node) -> fx.Node:
    program, pick = new.program, _picked(user)
    shard, axes = node.kwargs["shard"], node.kwargs["axes"]
    assert isinstance(shard, Shard)
    assert isinstance(axes, tuple)
    assert pick is not None
    value = tensor_type(node)
    layout = program.layout(node).replace(program.the_mesh.index(str(axes[0])), Partial())
    shape = (*value.shape[: pick.dim], pick.length, *value.shape[pick.dim + 1 :])
    kept = new.add(
        dialect.KEEP,
        (new.values[_source(node)],),
        {
            "dim": pick.dim,
            "start": pick.start,
            "length": pick.length,
            "size": value.shape[pick.dim],
            "axes": axes,
        },
        TensorType(shape, value.dtype),
        layout,
        node,
        f"{user.name}_kept" if pick.drops else user.name,
        "" if pick.drops else user.name,
        f"%{user.name} reads no other positions",
    )
    if pick.drops:
        args = (kept, pick.dim, 0)
        layout = _without(layout, pick.dim)
        kept = new.add(aten.select.int, args, {}, tensor_type(user), layout, user, user.name)
    kwargs, kind, whole = {"op": "sum", "axes": axes}, tensor_type(user), program.layout(user)
    return new.add(dialect.ALL_REDUCE, (kept,), kwargs, kind, whole, node, "", user.name)


def _parts(program: Program, node: fx.Node) -> _Plan | None:
    """Parts of a dim that the collective leaves as it is, for all readers."""
    shard, users = node.kwargs.get("shard"), tuple(node.users)
    if node.target is dialect.ALL_TO_ALL or not users:
        return None
    if node.target is dialect.ALL_GATHER and not isinstance(shard, Shard):
        return None
    kept = 0
    for user in users:
        pick = _picked(user)
        if pick is None or (isinstance(shard, Shard) and pick.dim == shard.dim):
            return None
        if program.layout(node).shards_of(pick.dim):
            return None
        kept += math.prod(tensor_type(user).shape)
    return _Plan(node, users, _emit_part) if kept < math.prod(tensor_type(node).shape) else None


def _emit_part(new: _Rewrite, node: fx.Node, user: fx.Node) -> fx.Node:
    program, pick = new.program, _picked(user)
    assert pick is not None
    source, kwargs = _source(node), dict(node.kwargs)
    before, shard = program.layout(source), kwargs.get("shard")
    if pick.drops:
        before = _without(before, pick.dim)
        if isinstance(shard, Shard) and shard.dim > pick.dim:
            kwargs["shard"] = shard._replace(dim=shard.dim - 1)
    args = (new.values[source], *user.args[1:])
    part = new.add(user.target, args, dict(user.kwargs), tensor_type(user), before, user, user.name)
    whole = program.layout(user)
    return new.add(node.target, (part,), kwargs, tensor_type(user), whole, node, "", user.name)


def _casts(program: Program, node: fx.Node) -> _Plan | None:
    """Casts to a smaller dtype, for all readers."""
    users = tuple(node.users)
    size = tensor_type(node).dtype.itemsize
    if node.target is dialect.ALL_REDUCE or not users or not all(map(_is_cast, users)):
        return None
    smaller = sum(tensor_type(user).dtype.itemsize for user in users) < size
    return _Plan(node, users, _emit_cast) if smaller else None


def _emit_cast(new: _Rewrite, node: fx.Node, user: fx.Node) -> fx.Node:
    program, source, kind = new.program, _source(node), tensor_type(user)
    args = (new.values[source],)
    cast = new.add(
        user.target, args, dict(user.kwargs), kind, program.layout(source), user, user.name
    )
    whole = program.layout(user)
    return new.add(node.target, (cast,), dict(node.kwargs), kind, whole, node, "", user.name)


def _cast_before(program: Program, node: fx.Node) -> _Plan | None:
    """A cast to a larger dtype just before."""
    cast = _source(node)
    if node.target is dialect.ALL_REDUCE or not _is_cast(cast):
        return None
    smaller = tensor_type(_source(cast)).dtype.itemsize < tensor_type(cast).dtype.itemsize
    return _Plan(node, (), _emit_behind) if smaller else None


def _emit_behind(new: _Rewrite, node: fx.Node, user: fx.Node) -> fx.Node:
    cast = _source(node)
    small, layout = _source(cast), new.program.layout(node)
    args, kwargs = (new.values[small],), dict(node.kwargs)
    kind = tensor_type(small)
    moved = new.add(node.target, args, kwargs, kind, layout, node, node.name, small.name)
    name = f"{cast.name}_whole"
    kwargs, kind = dict(cast.kwargs), tensor_type(node)
    return new.add(cast.target, (moved,), kwargs, kind, layout, cast, name, cast.name)


@dataclass(frozen=True)
class _Pick:
    """Positions `[start, start + length)` of a dim; `drops` if the dim goes."""

    dim: int
    start: int
    length: int
    drops: bool = False


def _picked(node: fx.Node) -> _Pick | None:
    """What a slice or a select of its first operand takes; None for other ops."""
    if node.target not in (aten.slice.Tensor, aten.select.int) or node.kwargs:
        return None
    source = tensor_type(_source(node)).shape
    dim, start = (*node.args[1:], 0, 0)[:2]
    assert isinstance(dim, int)
    dim %= len(source)
    first = 0 if start is None else start
    if not isinstance(first, int):
        return None
    first = first + source[dim] if first < 0 else first
    if node.target is aten.select.int:
        return _Pick(dim, first, 1, drops=True)
    step = node.args[4] if len(node.args) > 4 else 1
    return _Pick(dim, first, tensor_type(node).shape[dim]) if step == 1 else None


def _is_cast(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _without(layout: Layout, dim: int) -> Layout:
    """The layout of a value without a dim that no axis splits."""
    return Layout(
        tuple(
            p._replace(dim=p.dim - 1) if isinstance(p, Shard) and p.dim > dim else p
            for p in layout.placements
        )
    )


class _Rewrite:
    """The new graph of one round."""

    def __init__(self, program: Program, plans: dict[fx.Node, _Plan]) -> None:
        self.program = program
        self.plans = plans
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}

    def run(self, name: str) -> Program:
        gone = {plan.collective for plan in self.plans.values() if plan.users}
        for node in self.program.graph.nodes:
            plan = self.plans.get(node)
            if plan is not None:
                self.values[node] = plan.emit(self, plan.collective, node)
            elif node not in gone:
                new = self.values[node] = copy_node(self.graph, node, self.values.__getitem__)
                if node in self.program.layouts:
                    self.layouts[new] = self.program.layouts[node]
        drop_dead(self.graph, self.layouts)
        return self.program.after(name, graph=self.graph, layouts=self.layouts)

    def add(
        self,
        target: object,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        kind: TensorType,
        layout: Layout,
        like: fx.Node,
        name: str,
        value: str = "",
        reason: str = "",
    ) -> fx.Node:
        """A node with the origin of `like`, but for the value that it brings, and the reason."""
        new = add_call(self.graph, target, args, kwargs, name or None)  # type: ignore[arg-type]
        where = origin(like)
        if value:
            readers = next(n for n in self.program.graph.nodes if n.name == value).users
            where = replace(where, value=value, user=next(iter(readers)).name)
        new.meta["origin"] = replace(where, reason=reason or where.reason)
        new.meta["type"] = kind
        self.layouts[new] = (layout,)
        return new
