"""The value of a formula in B, T and the mesh axes, as a stage's file has it for a collective.

Such text is sympy's: `8*B*(tp - 1)*ceiling(T/tp)`. It is read here without importing sympy, and
without running what a file says: names, integers, `+ - * / **`, `ceiling` and `floor`, no more.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

__all__ = ["evaluate", "total"]

_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: lambda base, power: Fraction(base**power),
}
_FUNCTIONS: Mapping[str, Callable[[Fraction], int]] = {"ceiling": math.ceil, "floor": math.floor}


def evaluate(formula: str, sizes: Mapping[str, int]) -> Fraction:
    """The value of a formula, exact.

    Args:
        formula: The formula.
        sizes: The value of every name in it.

    Raises:
        ValueError: If it is none, or names what has no value.
    """
    try:
        return _value(ast.parse(formula, mode="eval").body, sizes)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"{formula!r} has no value: {error}") from error


def total(formulas: Iterable[str]) -> str:
    """The sum of formulas, those that differ in a factor only as one: `240*B*(tp - 1) + 8*T`."""
    factors: dict[str, int] = {}
    for formula in formulas:
        factor, rest = _split(formula)
        factors[rest] = factors.get(rest, 0) + factor
    return " + ".join(_times(factor, rest) for rest, factor in factors.items()) or "0"


def _split(formula: str) -> tuple[int, str]:
    """The integer that a product starts with, and the rest."""
    if formula.isdecimal():
        return int(formula), "1"
    found = re.match(r"(\d+)\*(?!\*)", formula)
    tree = ast.parse(formula, mode="eval").body
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult | ast.Div):
        tree = tree.left
    if found is None or not isinstance(tree, ast.Constant):
        return 1, formula
    return int(found[1]), formula[found.end() :]


def _times(factor: int, rest: str) -> str:
    if factor == 1 or rest == "1":
        return rest if factor == 1 else str(factor)
    tree = ast.parse(rest, mode="eval").body
    is_sum = isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add | ast.Sub)
    return f"{factor}*({rest})" if is_sum else f"{factor}*{rest}"


def _value(tree: ast.expr, sizes: Mapping[str, int]) -> Fraction:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return Fraction(tree.value)
    if isinstance(tree, ast.Name) and tree.id in sizes:
        return Fraction(sizes[tree.id])
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, sizes)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        sides = _value(tree.left, sizes), _value(tree.right, sizes)
        return _OPERATORS[type(tree.op)](*sides)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and len(tree.args) == 1:
        function = _FUNCTIONS.get(tree.func.id)
        if function is not None:
            return Fraction(function(_value(tree.args[0], sizes)))
    raise ValueError(f"{ast.unparse(tree)!r} is no formula over {', '.join(sizes) or 'no sizes'}")
