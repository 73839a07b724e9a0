"""The one function that finds the collectives between two layouts.

`steps(source, target)` gives mesh ops that take a value from one layout to the other, one axis at a
time. Cheap steps come first: cutting, then reducing into a shard, then exchanging shards, then
gathering. Axes that split one factor jointly and unevenly move together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Replicate,
    Routed,
    Segmented,
    Shard,
    same_placement,
)

__all__ = ["Step", "steps"]


@dataclass(frozen=True)
class Step:
    """One mesh op on the way.

    Attributes:
        op: The op; None where the layout changes but no rank has anything to do.
        kwargs: Its keyword arguments.
        layout: The layout after it.
        routed: For `mask_rows`, the routed placement that it resolves, and its axis.
    """

    op: MeshOp | None
    kwargs: Mapping[str, object]
    layout: Layout
    routed: tuple[int, Routed] | None = None


def steps(source: Layout, target: Layout, shape: Sequence[int], mesh: Mesh) -> tuple[Step, ...]:
    """Mesh ops that take a value of logical `shape` from `source` to `target`.

    Raises:
        RolemeshError: RM016 if no collectives give the target (a whole value made partial).
    """
    return _steps(source, target, tuple(shape), mesh)


@lru_cache(maxsize=16384)
def _steps(source: Layout, target: Layout, shape: tuple[int, ...], mesh: Mesh) -> tuple[Step, ...]:
    goal = target.canonical(mesh)
    current = _respelled(source.canonical(mesh), goal, shape, mesh)
    found: list[Step] = []
    while not current.same(goal, shape, mesh):
        step = (
            _mask(current, goal, mesh)
            or _joint(current, goal, shape, mesh)
            or _best(current, goal, shape, mesh)
        )
        if step is None:
            raise RolemeshError(
                "RM016",
                what=f"no collectives lead from {source.placements} to {target.placements}",
                where=f"a value of shape {list(shape)} on mesh {mesh}",
                why="a value that every rank holds whole cannot become a pending sum",
                fix="report this: propagation must not ask for it",
            )
        found.append(step)
        current = _respelled(step.layout, goal, shape, mesh)
    return tuple(found)


def _respelled(current: Layout, goal: Layout, shape: tuple[int, ...], mesh: Mesh) -> Layout:
    """Shards that are the goal's, but for their units, written as the goal writes them.

    Digits of other axes may lie within those units.
    """
    for index, (have, want) in enumerate(zip(current.placements, goal.placements, strict=True)):
        if have != want and same_placement(have, want, shape, mesh.sizes[index]):
            renamed = current.replace(index, want)
            if _valid(renamed, current, shape, mesh):
                current = renamed
    return current


def _mask(current: Layout, goal: Layout, mesh: Mesh) -> Step | None:
    """Rows that only one rank has valid become a sum once the others' are zero.

    Segments need not follow the rows that are marked, so a dim of segments is gathered first.
    """
    for index, (have, want) in enumerate(zip(current.placements, goal.placements, strict=True)):
        if isinstance(have, Routed) and have != want:
            for axis, other in enumerate(current.placements):
                if isinstance(other, Segmented) and other.dim == have.dim:
                    return _single(current, axis, REPLICATE, mesh)
            return Step(
                dialect.MASK_ROWS,
                _args(dim=have.dim, outer=current.local_outer(have.dim, have.outer, mesh)),
                current.replace(index, Partial()),
                (index, have),
            )
    return None


def _joint(current: Layout, goal: Layout, shape: tuple[int, ...], mesh: Mesh) -> Step | None:
    """Gather, or cut, axes that split one factor jointly and unevenly: they move together."""
    for index in range(len(mesh.names)):
        axes = current.joint_axes(index)
        if len(axes) > 1 and (
            goal.joint_axes(index) != axes or goal.placements[index] != current.placements[index]
        ):
            after = current
            for axis in axes:
                after = after.replace(axis, REPLICATE)
            shard = current.local_shard(index, mesh)
            return Step(
                dialect.ALL_GATHER,
                _args(shard=shard, axes=_names(axes, mesh)),
                after,
            )
    for index in range(len(mesh.names)):
        axes = goal.joint_axes(index)
        if len(axes) == 1 or current.joint_axes(index) == axes:
            continue
        waiting = [axis for axis in axes if not isinstance(current.placements[axis], Replicate)]
        if waiting:
            return _single(current, waiting[-1], REPLICATE, mesh)
        after = current
        for axis in axes:
            after = after.replace(axis, goal.placements[axis])
        if after.joint_axes(index) != axes or not _fits(after, shape, mesh):
            in_the_way = [
                axis
                for axis, placement in enumerate(current.placements)
                if isinstance(placement, Shard | Segmented) and placement != goal.placements[axis]
            ]
            return _single(current, in_the_way[-1], REPLICATE, mesh)
        shard = after.local_shard(index, mesh)
        return Step(dialect.SHARD, _args(shard=shard, axes=_names(axes, mesh)), after)
    return None


def _best(current: Layout, goal: Layout, shape: tuple[int, ...], mesh: Mesh) -> Step | None:
    pending = [
        index
        for index, ranks in enumerate(mesh.sizes)
        if not same_placement(current.placements[index], goal.placements[index], shape, ranks)
    ]
    candidates = []
    for index in pending:
        want = goal.placements[index]
        if _valid(current.replace(index, want), current, shape, mesh):
            step = _single(current, index, want, mesh)
            if step is not None:
                candidates.append((_order(step), step))
    if candidates:
        return min(candidates, key=lambda entry: entry[0])[1]
    for index in pending:  # digits are in each other's way: gather one of them first
        if isinstance(current.placements[index], Shard | Segmented | Partial):
            return _single(current, index, REPLICATE, mesh)
    return None


_ORDER = (
    dialect.SHARD,
    dialect.PART,
    dialect.REDUCE_SCATTER,
    dialect.ALL_TO_ALL,
    dialect.ALL_GATHER,
    dialect.BROADCAST,
    dialect.ALL_REDUCE,
    None,  # last, so that a value's layout says what its ranks hold
)


def _order(step: Step) -> int:
    return _ORDER.index(step.op)


def _single(current: Layout, index: int, want: Placement, mesh: Mesh) -> Step | None:
    """The step that takes one axis to `want`, or on the way to it."""
    have = current.placements[index]
    after = current.replace(index, want)
    names = (mesh.names[index],)
    if isinstance(have, Replicate):
        if isinstance(want, Shard | Segmented):
            return Step(
                dialect.SHARD, _args(shard=after.local_shard(index, mesh), axes=names), after
            )
        return None if isinstance(want, Partial) else Step(None, _args(), after)
    whole = current.replace(index, REPLICATE)
    if isinstance(have, Owner):
        return Step(dialect.BROADCAST, _args(owner=have.rank, axes=names), whole)
    if isinstance(have, Partial):
        if isinstance(want, Shard):
            shard = after.local_shard(index, mesh)
            return Step(dialect.REDUCE_SCATTER, _args(op=have.op, shard=shard, axes=names), after)
        return Step(dialect.ALL_REDUCE, _args(op=have.op, axes=names), whole)
    if not isinstance(have, Shard | Segmented):
        return None
    if isinstance(have, Segmented) and isinstance(want, Shard):
        parts = have.parts(want, sum(have.lengths), mesh.sizes[index])
        if parts:
            cut = Shard(have.dim, want.outer, parts)
            return Step(dialect.PART, _args(shard=cut, axes=names), after)
    if isinstance(have, Shard) and isinstance(want, Shard) and want.dim != have.dim:
        return Step(
            dialect.ALL_TO_ALL,
            _args(
                split=after.local_shard(index, mesh),
                concat=current.local_shard(index, mesh),
                axes=names,
            ),
            after,
        )
    return Step(
        dialect.ALL_GATHER, _args(shard=current.local_shard(index, mesh), axes=names), whole
    )


def _valid(layout: Layout, before: Layout, shape: tuple[int, ...], mesh: Mesh) -> bool:
    """Whether the axes' digits do not overlap, and no axis has joined another one by accident."""
    if len(mesh.names) == 1:
        return True
    if any(layout.joint_axes(i) != before.joint_axes(i) for i in range(len(mesh.names))):
        return False
    return _fits(layout, shape, mesh)


def _fits(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> bool:
    try:
        layout.check(shape, mesh)
    except RolemeshError:
        return False
    return True


def _names(axes: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    return tuple(mesh.names[axis] for axis in axes)


def _args(**kwargs: object) -> Mapping[str, object]:
    return MappingProxyType(kwargs)
