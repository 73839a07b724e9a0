"""What collectives and arithmetic cost: the one function that prices a reshard, and its table.

Prices are in bytes received per rank, so that with the default table a price is a number of bytes
that can be checked against a formula. Another table makes one collective dearer than another, adds
a fixed price per call, or changes what arithmetic is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

from rolemesh.compiler.ir.placement import (
    Owner,
    Partial,
    Placement,
    Routed,
    Segmented,
    Shard,
    ceil_div,
    same_placement,
)

__all__ = ["CostTable", "reshard_cost"]


@dataclass(frozen=True)
class CostTable:
    """Prices by collective, as multiples of the bytes received per rank.

    Attributes:
        all_gather: Price of a byte received in an all_gather.
        reduce_scatter: The same for reduce_scatter.
        all_to_all: The same for all_to_all.
        all_reduce: The same for all_reduce, which receives twice the bytes of a reduce_scatter.
        broadcast: The same for broadcast.
        routed: Where rows move by their routes, price of a byte of those that a rank works on: its
            own ones too, for they are sorted with the others.
        routing: Fixed price of moving rows by their routes, in bytes: the host finds the routes.
        call: Fixed price of one collective, in bytes.
        flops_per_byte: Multiply-adds times two that take as long as one byte received.
        memory: Price of a byte written by an op; breaks ties between equal programs.
    """

    all_gather: float = 1.0
    reduce_scatter: float = 1.0
    all_to_all: float = 1.0
    all_reduce: float = 1.0
    broadcast: float = 1.0
    routed: float = 1.1
    routing: float = float(1 << 20)
    call: float = 0.0
    flops_per_byte: float = 2000.0
    memory: float = 1e-3


def reshard_cost(
    source: Placement, target: Placement | None, nbytes: float, ranks: int, table: CostTable
) -> float:
    """Price of taking a value from one placement to another on one axis.

    Args:
        source: Placement the value has.
        target: Placement it needs; None if it is not read.
        nbytes: Bytes of the value before this axis splits it.
        ranks: Ranks of the axis.
        table: Prices.

    Returns:
        The price in bytes; infinite if no sequence of collectives gives it (a whole value is never
        made partial: it would be counted once per rank).
    """
    if target is None or source == target:
        return 0.0
    if isinstance(target, Partial):
        free = isinstance(source, Routed) and target.op == "sum"
        return 0.0 if free else float("inf")
    fraction = (ranks - 1) / ranks
    if isinstance(source, Shard):
        if isinstance(target, Shard) and target.dim != source.dim:
            moved = _padded(_padded(nbytes, source, ranks), target, ranks)
            return table.call + table.all_to_all * moved * fraction / ranks
        if isinstance(target, Shard) and _same_digit(source, target, ranks):
            return 0.0
        return table.call + table.all_gather * _padded(nbytes, source, ranks) * fraction
    if isinstance(source, Segmented):
        if same_placement(source, target, (), ranks):
            return 0.0
        if isinstance(target, Shard) and source.parts(target, sum(source.lengths), ranks):
            return 0.0
        held = sum(source.held(ranks)) * ranks / sum(source.lengths)
        return table.call + table.all_gather * nbytes * held * fraction
    if isinstance(source, Partial | Routed):
        if isinstance(target, Shard):
            return table.call + table.reduce_scatter * _padded(nbytes, target, ranks) * fraction
        return table.call + table.all_reduce * 2 * nbytes * fraction
    return table.call + table.broadcast * nbytes if isinstance(source, Owner) else 0.0


def _padded(nbytes: float, shard: Shard, ranks: int) -> float:
    """Bytes of all chunks of a value of `nbytes`, pads included."""
    if shard.size % ranks == 0:
        return nbytes
    return nbytes * ceil_div(shard.size, ranks) * ranks / shard.size


def _same_digit(a: Shard, b: Shard, ranks: int) -> bool:
    return a.outer == b.outer and a.size % ranks == 0 and b.size % ranks == 0
