"""Whole values as the ranks hold them, and back, for every layout; and how far ranks are off.

`lowering.chunks` does this for layouts that say where each element is. Two say less, and a debugger
meets both: of a pending reduction (`Partial`) any operands will do, and of routed rows (`Routed`)
the value of the ids says which rank holds which.

Invariant: `gap` looks at nothing that a rank must not read. Pads, rows of other ranks and values of
other owners do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rolemesh.compiler.command.compare import difference
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Partial, Routed
from rolemesh.lowering import chunks
from rolemesh.lowering.mesh_ops import owned_rows

__all__ = ["EQUAL", "Gap", "Picks", "gap", "pick_names", "place", "reassemble", "tensor_gap"]

Picks = Callable[[str], torch.Tensor]
"""The whole value of a node, by name: of ids, which say where routed rows are."""

_SHARES = (1.5, -0.5)
"""Of a pending sum, what the first ranks hold; the others hold nothing. Not all in one place, so
that an op that is not linear shows."""


@dataclass(frozen=True)
class Gap:
    """How far a value is from the single device's.

    Attributes:
        max_abs: The largest absolute difference; infinite if shapes differ, or one side alone is
            NaN.
        max_rel: The same relative to the largest finite magnitude on the single device.
        equal: Whether it is within the tolerance.
        ranks: Ranks whose own part differs, if it is not equal; empty on a single device.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    equal: bool = True
    ranks: tuple[int, ...] = ()


EQUAL = Gap()


def pick_names(layout: Layout) -> list[str]:
    """Names of the values that say where the rows of a layout are; of most layouts there are none.

    A name is that of a node in the decided Program.
    """
    return [p.key.split(":")[1] for p in layout.placements if isinstance(p, Routed)]


def place(
    whole: torch.Tensor, layout: Layout, mesh: Mesh, picks: Picks, *, poison: bool
) -> list[torch.Tensor]:
    """Each rank's local tensor of a value.

    Args:
        whole: The value.
        layout: Its layout, of plain sizes.
        mesh: The mesh.
        picks: Values of ids.
        poison: Fill float pads, and rows and values of other ranks, with NaN.
    """
    locals_ = []
    scattered = _placed(layout)
    for rank in range(mesh.size):
        value = whole
        for axis, placement in enumerate(layout.placements):
            index, parts = mesh.coordinate(rank)[axis], mesh.sizes[axis]
            if isinstance(placement, Partial):
                value = _share(value, placement.op, index, parts)
            elif isinstance(placement, Routed) and poison:
                owned = _rows(placement, value, picks, index, parts)
                value = _unless(value, owned)
        local = chunks.scatter_one(value, scattered, mesh, rank)
        if poison and not chunks.holds(layout, mesh, rank):
            local = _unless(local, torch.zeros((), dtype=torch.bool))
        locals_.append(local)
    return chunks.poison_pads(locals_, scattered, mesh) if poison else locals_


def reassemble(
    locals_: Sequence[torch.Tensor], layout: Layout, shape: Sequence[int], mesh: Mesh, picks: Picks
) -> torch.Tensor:
    """The whole value of logical `shape` from what the ranks hold.

    Raises:
        ValueError: If the local tensors do not make up that shape.
    """
    for axis, placement in enumerate(layout.placements):
        if not isinstance(placement, Routed):
            continue
        whole: torch.Tensor | None = None
        for index in range(mesh.sizes[axis]):
            as_if = [locals_[rank] for rank in _neighbours(mesh, axis, index)]
            value = reassemble(as_if, layout.replace(axis, REPLICATE), shape, mesh, picks)
            owned = _rows(placement, value, picks, index, mesh.sizes[axis])
            whole = value if whole is None else torch.where(owned, value, whole)
        assert whole is not None
        return whole
    return chunks.assemble(locals_, layout, shape, mesh)


def gap(
    want: torch.Tensor,
    locals_: Sequence[object],
    layout: Layout,
    mesh: Mesh,
    picks: Picks,
    tolerance: float,
    rank: int | None = None,
) -> Gap:
    """How far the ranks' value is from the single device's: whole, and each rank's own part.

    Args:
        want: The value on the single device.
        locals_: What the ranks hold.
        layout: Their layout, of plain sizes.
        mesh: The mesh.
        picks: Values of ids.
        tolerance: As in `difference`.
        rank: The only rank to look at; None for all of them together.
    """
    shape = layout.local_shape(want.shape, mesh)
    wrong = [
        number
        for number, local in enumerate(locals_)
        if not isinstance(local, torch.Tensor)
        or tuple(local.shape) != shape
        or local.dtype != want.dtype
    ]
    if wrong:
        return Gap(math.inf, math.inf, False, tuple(wrong))
    tensors = [local for local in locals_ if isinstance(local, torch.Tensor)]
    parts = dict(_parts(want, tensors, layout, mesh, picks, tolerance))
    if rank is not None:
        return parts.get(rank, EQUAL)
    try:
        whole = reassemble(tensors, layout, want.shape, mesh, picks)
    except ValueError:
        return Gap(math.inf, math.inf, False, tuple(range(mesh.size)))
    found = [tensor_gap(want, whole, tolerance), *parts.values()]
    equal = all(one.equal for one in found)
    ranks = tuple(number for number, one in parts.items() if not one.equal)
    return Gap(
        max(one.max_abs for one in found),
        max(one.max_rel for one in found),
        equal,
        () if equal else ranks or tuple(range(mesh.size)),
    )


def tensor_gap(want: torch.Tensor, got: object, tolerance: float) -> Gap:
    """How far one tensor is from another."""
    given = {"": got} if isinstance(got, torch.Tensor) else {}
    found = difference({"": want}, given, tolerance)
    if found.max_abs in (0.0, math.inf):
        return Gap(found.max_abs, found.max_abs, found.equal)
    values = want.to(torch.float64)
    finite = values[values.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return Gap(found.max_abs, found.max_abs / scale if scale else math.inf, found.equal)


def _parts(
    want: torch.Tensor,
    locals_: Sequence[torch.Tensor],
    layout: Layout,
    mesh: Mesh,
    picks: Picks,
    tolerance: float,
) -> Iterator[tuple[int, Gap]]:
    """How far each rank is off in its own part, where the layout says what that is.

    A rank's part is compared as part of the whole, so that all are measured by one magnitude.
    """
    if any(isinstance(placement, Partial) for placement in layout.placements):
        return
    expected = place(want, layout, mesh, picks, poison=False)
    if all(map(torch.equal, expected, locals_)):
        return
    real = place(torch.ones(want.shape), layout, mesh, picks, poison=True)
    for rank, (mine, right, local) in enumerate(zip(real, expected, locals_, strict=True)):
        counts = ~mine.isnan()
        off = counts & (right != local) & ~((right != right) & (local != local))
        if bool(off.any()):
            yield rank, _as_part(want, right[counts], local[counts], tolerance)


def _as_part(want: torch.Tensor, right: torch.Tensor, got: torch.Tensor, tolerance: float) -> Gap:
    """The gap of some elements of a tensor; a largest difference is measured by all of it."""
    if want.dtype.itemsize < 4:
        return tensor_gap(right, got, tolerance)  # root mean squares: of these elements alone
    flat = want.reshape(-1)
    return tensor_gap(torch.cat([flat, right]), torch.cat([flat, got]), tolerance)


def _placed(layout: Layout) -> Layout:
    """The layout without what says nothing of where an element is."""
    placements = (REPLICATE if isinstance(p, Partial | Routed) else p for p in layout.placements)
    return Layout(tuple(placements))


def _share(value: torch.Tensor, op: str, index: int, parts: int) -> torch.Tensor:
    """One rank's operand of a pending reduction."""
    if op in ("max", "min") or parts == 1:
        return value
    times = parts if op == "avg" else 1
    if not value.is_floating_point():
        return value if index == 0 else torch.zeros_like(value)
    share = _SHARES[index] * times if index < len(_SHARES) else 0.0
    alone = float(times) if index == 0 else 0.0  # an infinity is in one place, or it would be NaN
    return torch.where(value.isfinite(), value * share, value * alone if index == 0 else 0.0)


def _rows(
    placement: Routed, value: torch.Tensor, picks: Picks, index: int, parts: int
) -> torch.Tensor:
    """Which rows of a whole routed value one rank holds, of a shape that broadcasts to it."""
    by, name, size = placement.key.split(":")
    owned = owned_rows(
        picks(name).reshape(-1),
        by=by,
        rows=placement.size,
        size=int(size),
        parts=parts,
        index=index,
    )
    extent = value.shape[placement.dim]
    inner = extent // (placement.outer * placement.size) if extent else 1
    owned = owned.repeat_interleave(inner).repeat(placement.outer)
    return owned.reshape(-1, *[1] * (value.ndim - placement.dim - 1))


def _unless(value: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    """A value with NaN where it is not owned; of integers and booleans, unchanged."""
    return torch.where(owned, value, math.nan) if value.is_floating_point() else value


def _neighbours(mesh: Mesh, axis: int, index: int) -> list[int]:
    """For each rank, the rank at position `index` of an axis and else at its place."""
    ranks = {mesh.coordinate(rank): rank for rank in range(mesh.size)}
    moved = [list(mesh.coordinate(rank)) for rank in range(mesh.size)]
    for coordinate in moved:
        coordinate[axis] = index
    return [ranks[tuple(coordinate)] for coordinate in moved]
