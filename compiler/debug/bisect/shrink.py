"""Delta debugging: the smallest part of something that still fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["shrink"]

_T = TypeVar("_T")


def shrink(items: Sequence[_T], fails: Callable[[Sequence[_T]], bool]) -> list[_T]:
    """Items of which none can be left out without the failure going away.

    The algorithm ddmin of A. Zeller and R. Hildebrandt, "Simplifying and isolating failure-inducing
    input", IEEE Transactions on Software Engineering 28(2), 2002. It tries at most a number of
    subsets that is quadratic in the items, and about linear where few of them matter.

    Args:
        items: All of them, which fail. Their order is kept.
        fails: Whether some of them fail.
    """
    left, parts = list(items), 2
    while len(left) >= 2:
        size = -(-len(left) // parts)
        pieces = [left[start : start + size] for start in range(0, len(left), size)]
        rests = [[x for other in pieces if other is not piece for x in other] for piece in pieces]
        smaller = next((piece for piece in pieces if fails(piece)), None)
        if smaller is not None:
            left, parts = smaller, 2
            continue
        smaller = next((rest for rest in rests if fails(rest)), None) if len(pieces) > 2 else None
        if smaller is not None:
            left, parts = smaller, max(parts - 1, 2)
            continue
        if parts >= len(left):
            break
        parts = min(len(left), 2 * parts)
    return left if len(left) != 1 or not fails([]) else []
