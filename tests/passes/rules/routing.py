"""Routed values in the rule harness: which rows are whose, by the definition in the dialect."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Partial, Placement, Routed, Shard, ceil_div
from rolemesh.compiler.ir.rule import Choice, Lookup, Route, Rule
from rolemesh.lowering import chunks

__all__ = ["Owners", "grouped", "owned_rows", "take"]


def owned_rows(
    picks: torch.Tensor, by: str, rows: int, size: int, parts: int, position: int
) -> torch.Tensor:
    """`mesh.owned_rows` on rank `position` of `parts`."""
    count = ceil_div(size, parts)
    first = min(position * count, size)
    end = min(first + count, size)
    if by == "ids":
        ids = torch.where(picks < 0, picks + size, picks)
        return (ids >= first) & (ids < end)
    ends = [0, *picks.tolist()]
    row = torch.arange(rows)
    return (row >= ends[first]) & (row < ends[end])


def take(
    table: torch.Tensor, ids: torch.Tensor, dim: int, size: int, position: int, fill: float | None
) -> torch.Tensor:
    """`mesh.take` on rank `position`; `fill`, or any entry, in rows of entries on other ranks."""
    held = table.shape[dim]
    own = torch.where(ids < 0, ids + size, ids) - position * held
    owned = (own >= 0) & (own < held)
    rows = table.index_select(dim, own.clamp(0, held - 1).reshape(-1))
    rows = rows.reshape(*table.shape[:dim], *ids.shape, *table.shape[dim + 1 :])
    if fill is None:
        return rows
    owned = owned.reshape(*ids.shape, *([1] * (table.ndim - dim - 1)))
    return torch.where(owned, rows, torch.full((), fill, dtype=table.dtype))


def grouped(
    sums: bool, operands: Sequence[torch.Tensor], parts: int, position: int
) -> tuple[torch.Tensor, ...]:
    """`mesh.grouped_sums` or `mesh.grouped_backward` on one rank, expert by expert.

    Rows of other ranks are NaN in the gradient of x: whoever reads them must see it.
    """
    x, w, offs, grad = (operands[0].mT, None, operands[2], operands[1]) if sums else operands
    count = ceil_div(len(offs), parts)
    of_w = torch.zeros(count, x.shape[1], grad.shape[1], dtype=x.dtype)
    of_x = torch.full_like(x, float("nan"))
    ends = [0, *offs.tolist()]
    for held in range(count):
        expert = position * count + held
        if expert < len(offs):
            rows = slice(ends[expert], ends[expert + 1])
            of_w[held] = x[rows].mT @ grad[rows]
            if w is not None:
                of_x[rows] = grad[rows] @ w[held].mT
    return (of_w,) if sums else (of_x, of_w)


class Owners:
    """Which rows of routed values each rank of a mesh has, for one call and its choices.

    Args:
        rule: The rule of the call.
        choices: One choice per mesh axis.
        mesh: The mesh.
        operands: The whole operands.
    """

    def __init__(
        self, rule: Rule, choices: Sequence[Choice], mesh: Mesh, operands: Sequence[torch.Tensor]
    ) -> None:
        self.rule = rule
        self.choices = choices
        self.mesh = mesh
        self.operands = operands

    def rows(self, axis: int, rank: int, size: int) -> torch.Tensor:
        """Whether each of the `size` units of the factor routed on `axis` is on `rank`."""
        mesh, choice, select = self.mesh, self.choices[axis], self.rule.select
        if isinstance(choice, Route):  # any assignment will do
            return torch.arange(size) * 7 % 5 % mesh.sizes[axis] == mesh.coordinate(rank)[axis]
        assert isinstance(choice, Lookup)
        assert select is not None
        parts, position = 1, 0
        for other, found in enumerate(self.choices):
            if isinstance(found, Lookup):
                parts *= mesh.sizes[other]
                position = position * mesh.sizes[other] + mesh.coordinate(rank)[other]
        entries = self.rule.sizes[select.factor]
        picks = self.operands[select.operand]
        return owned_rows(picks, select.by, size, entries, parts, position)

    def apply(
        self, values: Sequence[torch.Tensor], layout: Layout, shape: Sequence[int], fill: float
    ) -> list[torch.Tensor]:
        """Local tensors with `fill` in all routed rows that are not the rank's own."""
        found = list(values)
        for axis, routed in enumerate(layout.placements):
            if not isinstance(routed, Routed):
                continue
            inner = shape[routed.dim] // (routed.outer * routed.size)
            cuts: list[Placement] = [
                Shard(0, p.outer, p.size)
                if isinstance(p, Shard) and p.dim == routed.dim
                else REPLICATE
                for p in layout.placements
            ]
            for rank, value in enumerate(found):
                rows = self.rows(axis, rank, routed.size)
                rows = rows.repeat(routed.outer).repeat_interleave(inner)
                owned = chunks.scatter(rows, Layout(tuple(cuts)), self.mesh)[rank]
                owned = owned.reshape(-1, *([1] * (value.ndim - routed.dim - 1)))
                found[rank] = torch.where(owned, value, torch.full((), fill, dtype=value.dtype))
        return found

    def masked(
        self, values: Sequence[torch.Tensor], layout: Layout, shape: Sequence[int]
    ) -> tuple[list[torch.Tensor], Layout]:
        """`mesh.mask_rows` on every routed axis, after which the value is partial there."""
        placements = [Partial() if isinstance(p, Routed) else p for p in layout.placements]
        return self.apply(values, layout, shape, 0), Layout(tuple(placements))
