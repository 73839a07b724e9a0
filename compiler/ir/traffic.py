"""Bytes that a collective brings to a rank: one convention for the cost model and for measuring.

The counts are those of the ring algorithms, which reach the lower bound for bandwidth (Patarasuk
and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Arithmetic
is plain, so sizes may be integers or sympy expressions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

if TYPE_CHECKING:
    import sympy

__all__ = ["received_bytes"]


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
