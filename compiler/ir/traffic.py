"""Bytes that a collective brings to a rank: one convention for the cost model and for measuring.

The counts are those of the ring algorithms, which reach the lower bound for bandwidth (Patarasuk
and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Arithmetic
is plain, so sizes may be integers or sympy expressions.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import sympy

__all__ = ["expected_share", "received_bytes"]


@overload
def received_bytes(op: str, wire_input_bytes: int, parts: int) -> float: ...


@overload
def received_bytes(
    op: str, wire_input_bytes: sympy.Expr, parts: int | sympy.Expr
) -> sympy.Expr: ...


def received_bytes(
    op: str, wire_input_bytes: int | sympy.Expr, parts: int | sympy.Expr
) -> float | sympy.Expr:
    """Bytes each rank receives in one collective.

    | op | wire input of a rank | received |
    |---|---|---|
    | `all_gather` | its chunk, n bytes | (p - 1) n |
    | `reduce_scatter` | p chunks, n bytes together | (p - 1) n / p |
    | `all_to_all` | p blocks, n bytes together | (p - 1) n / p |
    | `all_reduce` | n bytes | 2 (p - 1) n / p |
    | `broadcast` | n bytes, the owner's | n on a rank that is not the owner |

    Args:
        op: Name of the collective in the mesh dialect.
        wire_input_bytes: Bytes of the tensor that one rank puts in, pads included.
        parts: Ranks p of the group; a symbol stands for two or more.

    Returns:
        The bytes; an int where the division leaves no remainder.

    Raises:
        ValueError: If `op` is not a collective.
    """
    if op == "all_gather":
        return (parts - 1) * wire_input_bytes
    if op in ("reduce_scatter", "all_to_all"):
        return _divide((parts - 1) * wire_input_bytes, parts)
    if op == "all_reduce":
        return _divide(2 * (parts - 1) * wire_input_bytes, parts)
    if op == "broadcast":
        if not isinstance(parts, int):
            return wire_input_bytes
        return wire_input_bytes if parts > 1 else 0 * wire_input_bytes
    raise ValueError(f"{op!r} is not a collective")


def _divide(size: int | sympy.Expr, parts: int | sympy.Expr) -> float | sympy.Expr:
    if isinstance(size, int) and isinstance(parts, int) and size % parts == 0:
        return size // parts
    return size / parts


def expected_share(choices: int, experts: int, parts: int) -> Fraction:
    """The share of tokens that have an expert on a rank, if all experts are equally likely.

    With h of the E experts on a rank, a token with k of them has none there with probability
    C(E - h, k) / C(E, k). Of ranks with different h the mean counts.

    Args:
        choices: Experts k of a token, all different.
        experts: Experts E, in chunks of `ceil(E / p)`.
        parts: Ranks p.

    Returns:
        The share, to three digits.
    """
    units = -(-experts // parts)
    held = [max(0, min(units, experts - index * units)) for index in range(parts)]
    ways = math.comb(experts, choices)
    share = sum(ways - math.comb(experts - h, choices) for h in held) / (ways * parts)
    return Fraction(round(1000 * share), 1000)
