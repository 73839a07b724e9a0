"""The keys or the values of an attention: which axes of what they are made of are batch and heads.

Invariant: every piece of a side has a row for each key of the batch, for all heads or for each; an
expansion has the batch on the side of its source and the heads on that of its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from rolemesh.passes.expansions import Axes, Operand, Piece, Placed, read_operand
from rolemesh.passes.rules.registry import Rules

__all__ = ["Side", "read_side"]


@dataclass(frozen=True)
class Side:
    """The keys or the values of an attention.

    Attributes:
        operand: What they are made of.
        axes: Its axes.
        batch: Axes of the batch.
        heads: Axes of the heads that expansions have columns for.
        group: Axes of query heads that share a key head.
        keys: Axes of the keys.
    """

    operand: Operand
    axes: Axes
    batch: tuple[int, ...]
    heads: tuple[int, ...]
    group: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Extents of batch, heads, group and keys."""
        batch, heads, group, keys = (
            self.axes.extent(axes) for axes in (self.batch, self.heads, self.group, self.keys)
        )
        return batch, heads, group, keys

    def is_shared(self, piece: Piece) -> bool:
        """Whether heads share what a piece comes from."""
        return not _axes_of(piece.source, self.axes) & {*self.heads}

    def width(self, piece: Piece) -> int:
        """Features of a piece as the cache has them."""
        if piece.expansion is None:
            return piece.length
        return self.axes.extent(self.axes.flat((piece.expansion.latent,)))

    def flops(self, rows: int, seen: int) -> int:
        """Operations of the re-associated side.

        Args:
            rows: Query rows over batch and all heads.
            seen: Keys that a query sees.
        """
        total = 0
        for piece in self.operand.pieces:
            total += 2 * rows * seen * self.width(piece)
            if piece.expansion is not None:
                total += 2 * rows * piece.length * self.width(piece)
        return total


def read_side(
    value: fx.Node, outer: Sequence[int], keys: int, feature: int, rules: Rules
) -> Side | None:
    """The side that an operand is.

    Args:
        value: The operand.
        outer: Its dims of batch and heads.
        keys: Its dim of keys.
        feature: Its dim of features.
        rules: Sharding rules.

    Returns:
        None if none of its features is expanded, or axes lie otherwise than attention has them.
    """
    axes = Axes()
    operand = read_operand(value, feature, rules, axes)
    if operand is None or not operand.products:
        return None
    lead = axes.flat([axis for dim in outer for axis in operand.dims[dim]])
    rows = axes.flat(operand.dims[keys])
    expanded = next(piece for piece in operand.pieces if piece.expansion is not None)
    batch = tuple(axis for axis in lead if axis in _axes_of(expanded.source, axes))
    heads = tuple(axis for axis in lead if axis in _columns(expanded, axes))
    side = Side(operand, axes, batch, heads, lead[len(batch) + len(heads) :], rows)
    if lead != (*batch, *heads, *side.group):
        return None
    return side if all(_fits(side, piece) for piece in operand.pieces) else None


def _fits(side: Side, piece: Piece) -> bool:
    """Whether a piece has a row for each key of the batch, for all heads or for each."""
    axes = side.axes
    dims = _axes_of(piece.source, axes)
    rows = {*side.batch, *side.keys}
    feature = set(axes.flat((piece.feature,)))
    if piece.expansion is None:
        shared = dims == rows | feature
        return shared or dims == rows | feature | {*side.heads}
    latent = axes.flat((piece.expansion.latent,))
    columns = _columns(piece, axes) | set(latent)
    weight = _axes_of(piece.expansion.weight, axes)
    return dims == rows | set(latent) and weight == columns == {*side.heads, *feature, *latent}


def _axes_of(placed: Placed, axes: Axes) -> set[int]:
    return {axis for dim in placed.dims for axis in axes.flat(dim)}


def _columns(piece: Piece, axes: Axes) -> set[int]:
    """Axes of the columns of a piece's weight."""
    assert piece.expansion is not None
    return _axes_of(piece.expansion.weight, axes) - set(axes.flat((piece.expansion.latent,)))
