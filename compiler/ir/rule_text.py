"""Sharding rules and choices as text, in the form of OpenXLA Shardy's `sdy.op_sharding_rule`.

`([i, k], [k, j])->([i, j]) {i=26, k=72, j=64} reduce={k}`: a letter per factor, lists of letters
for the dims of operands and results, the extent of each factor, and what is not freely split.
"""

from __future__ import annotations

from string import ascii_lowercase

from rolemesh.compiler.ir.rule import (
    Choice,
    DimFactors,
    JoinSegments,
    Kind,
    Linear,
    Lookup,
    Route,
    Rule,
    Split,
    SplitSegments,
    TakeSegments,
)

__all__ = ["choice_text", "factor_name", "rule_text"]

_LETTERS = ascii_lowercase[8:] + ascii_lowercase[:8]
"""From `i` on, as in formulas."""


def factor_name(factor: int) -> str:
    """The letter of a factor; with a number from the 27th on."""
    number, letter = divmod(factor, len(_LETTERS))
    return _LETTERS[letter] + (str(number) if number else "")


def rule_text(rule: Rule) -> str:
    """A rule as text; see the module docstring."""
    operands = ", ".join(_dims(dims) for dims in rule.operands)
    results = ", ".join(_dims(dims) for dims in rule.results)
    sizes = ", ".join(f"{factor_name(i)}={size}" for i, size in enumerate(rule.sizes))
    text = f"({operands})->({results}) {{{sizes}}}"
    for kind in (Kind.REDUCE, Kind.REPLICATE, Kind.PERMUTE):
        names = [factor_name(i) for i, found in enumerate(rule.kinds) if found is kind]
        if names:
            text += f" {kind.value}={{{', '.join(names)}}}"
    return text


def _dims(dims: DimFactors) -> str:
    return f"[{', '.join(''.join(map(factor_name, factors)) or '1' for factors in dims)}]"


def choice_text(rule: Rule, choice: Choice) -> str:
    """What a choice does, with the letters of the rule's factors."""
    match choice:
        case Split(factor, outer, size):
            name, extent = factor_name(factor), rule.sizes[factor]
            if outer == 1 and size == extent:
                return f"split {name}"
            return f"split {name} seen as [{outer}, {size}, {extent // (outer * size)}]"
        case SplitSegments(factor, segments):
            return f"split {len(segments)} segments of {factor_name(factor)}"
        case TakeSegments(source):
            return f"take segments apart: {source}"
        case JoinSegments(target):
            return f"join segments: {target}"
        case Route(key, factor, _, _):
            return f"route rows of {factor_name(factor)} by %{key}"
        case Lookup(factor, _, _, key):
            return f"look up rows of {factor_name(factor)} by %{key}"
        case Linear(pattern, op):
            pending = [str(i) for i, is_pending in enumerate(rule.linear[pattern]) if is_pending]
            return f"pass a pending {op} of operand {' and '.join(pending)}"
    return "whole"
