"""Rules as one line each: a table of expectations reads as the specification of a family."""

from __future__ import annotations

import dataclasses

from rolemesh.compiler.ir.rule import DimFactors, Kind, Rule

__all__ = ["rule_line"]

_MARKS = {Kind.PASS: "", Kind.REDUCE: "+", Kind.REPLICATE: "!", Kind.PERMUTE: "~"}


def rule_line(rule: Rule) -> str:
    """A rule as one line, for example `a b+, b+ c -> a c | linear 10 01`.

    Factors are letters in order of appearance, marked `+` for a reduction, `!` for replication and
    `~` for a permutation; `(a b)` is a dim of two factors, `1` a dim without any; `_` an operand
    that is not read.
    """
    letters: dict[int, str] = {}

    def factor_text(factor: int) -> str:
        letter = letters.setdefault(factor, chr(ord("a") + len(letters)))
        return letter + _MARKS[rule.kinds[factor]]

    def tensor_text(dims: DimFactors) -> str:
        parts = []
        for factors in dims:
            names = [factor_text(factor) for factor in factors]
            parts.append(
                "1" if not names else names[0] if len(names) == 1 else f"({' '.join(names)})"
            )
        return " ".join(parts) or "."

    operands = [
        "_" if index in rule.unread else tensor_text(dims)
        for index, dims in enumerate(rule.operands)
    ]
    text = f"{', '.join(operands)} -> {', '.join(tensor_text(dims) for dims in rule.results)}"
    if rule.reduction != "sum":
        text += f" | {rule.reduction}"
    if rule.linear:
        patterns = ("".join(str(int(flag)) for flag in pattern) for pattern in rule.linear)
        text += f" | linear {' '.join(patterns)}"
    if rule.select is not None:
        factor, operand, by, dim, follows, _ = dataclasses.astuple(rule.select)
        text += f" | select {letters[factor]} by {by} {operand}"
        text += f" to dim {dim}" if dim >= 0 else ""
        text += f" with {' '.join(map(str, follows))}" if follows else ""
    return text.strip()
