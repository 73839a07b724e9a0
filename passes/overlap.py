"""Whether the choices of several mesh axes at one op get in each other's way.

Axes are independent but for the factors that they split: two axes need digits of a factor of their
own, or split it jointly where the op can do that. Routed rows must not be cut within a row, and a
factor that is cut in segments is cut by one axis, and has no routed rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from rolemesh.compiler.ir.rule import (
    Choice,
    JoinSegments,
    Lookup,
    Route,
    Rule,
    Split,
    SplitSegments,
    TakeSegments,
)

__all__ = ["overlap"]

_SEGMENTS = SplitSegments | TakeSegments | JoinSegments


def overlap(rule: Rule, earlier: Sequence[tuple[Choice, int]], choice: Choice, ranks: int) -> bool:
    """Whether an axis would claim digits that earlier axes have, or a joint split the op forbids.

    Args:
        rule: The op's rule.
        earlier: The choices of earlier axes with their ranks.
        choice: The choice of this axis.
        ranks: Its ranks.
    """
    others = [other for other, _ in earlier]
    if any(isinstance(c, _SEGMENTS) for c in (choice, *others)) and (
        any(isinstance(c, Lookup | Route) for c in (choice, *others))
        or any(
            _near(rule, choice) & _parted(rule, other) or _near(rule, other) & _parted(rule, choice)
            for other in others
        )
    ):
        return True
    if isinstance(choice, Lookup):  # rows of a table are found on one axis
        return any(isinstance(other, Lookup) for other in others)
    return isinstance(choice, Split | Route) and _digits_overlap(rule, earlier, choice, ranks)


def _digits_overlap(
    rule: Rule, earlier: Sequence[tuple[Choice, int]], choice: Split | Route, ranks: int
) -> bool:
    claims: dict[Split, int] = {}
    routes: list[Route] = []
    for other, count in (*earlier, (choice, ranks)):
        if isinstance(other, Split) and other.factor == choice.factor:
            claims[other] = claims.get(other, 1) * count
        elif isinstance(other, Route) and other.factor == choice.factor:
            routes.append(other)
    if any(_cuts_rows(split, count, route) for split, count in claims.items() for route in routes):
        return True
    if isinstance(choice, Route):
        return False
    if claims[choice] > ranks and rule.reduction == "avg" and choice.size % claims[choice]:
        return True  # an average needs even chunks
    if choice.factor in rule.joint and len(claims) > 1:
        return True
    taken = 1
    for split in sorted(claims):
        if split.outer % taken:
            return True
        taken = split.outer * (claims[split] if split.size % claims[split] == 0 else split.size)
    return False


def _parted(rule: Rule, choice: Choice) -> set[int]:
    """Factors that a choice splits."""
    if isinstance(choice, TakeSegments):
        return set(rule.operands[0][choice.source.dim])
    if isinstance(choice, JoinSegments):
        dim = choice.target.dim
        return {f for dims in (*rule.operands, *rule.results) for f in dims[dim]}
    return {choice.factor} if isinstance(choice, Split | SplitSegments | Route) else set()


def _near(rule: Rule, choice: Choice) -> set[int]:
    """Factors that share a dim with one that a choice splits in segments."""
    if not isinstance(choice, _SEGMENTS):
        return set()
    parted = _parted(rule, choice)
    dims = [set(factors) for dims in (*rule.operands, *rule.results) for factors in dims]
    return parted.union(*(factors for factors in dims if factors & parted))


def _cuts_rows(split: Split, ranks: int, route: Route) -> bool:
    """Whether chunks of a factor end within a row of it that one rank has valid."""
    even = split.size % ranks == 0
    if split.outer >= route.outer * route.size:
        return split.outer % (route.outer * route.size) != 0
    if split.outer < route.outer:
        return route.outer % (split.outer * (ranks if even else split.size)) != 0
    rows, rest = divmod(route.outer * route.size, split.outer)
    return bool(rest or (rows % split.size and not (even and rows % ranks == 0)))
