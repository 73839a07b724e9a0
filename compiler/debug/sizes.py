"""Sizes of a recorded stage as numbers; the symbolic ones at the values they were captured with.

A size is written as an integer or as a formula over the program's symbols, such as
`2*FloorDiv(T + 3, 4)` (see `compiler.ir.serial_values`). This reads such text without torch.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from rolemesh.compiler.dump.reader import Stage

__all__ = ["itemsize", "sizes_of"]

_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, Callable[[int, int], int]] = {
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
}


def itemsize(dtype: str) -> int:
    """Bytes of an element, from the name of its dtype: `bfloat16`, `bool`, `float8_e4m3fn`."""
    if dtype == "bool":
        return 1
    digits = dtype.partition("_")[0].lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) // 8


def sizes_of(stage: Stage) -> Callable[[int | str], int]:
    """What gives the value of a size of a stage.

    Args:
        stage: The stage, whose symbols have the hints of its head.

    Returns:
        A function from a size as it is written to a number; it raises ValueError for what is no
        formula over the symbols.
    """
    values = {entry["name"]: int(entry["hint"]) for entry in stage.head.get("symbols", ())}

    def size(text: int | str) -> int:
        if isinstance(text, int):
            return text
        return _value(ast.parse(text, mode="eval").body, values)

    return size


def _value(tree: ast.expr, values: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name) and tree.id in values:
        return values[tree.id]
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return -_value(tree.operand, values)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        sides = _value(tree.left, values), _value(tree.right, values)
        return _OPERATORS[type(tree.op)](*sides)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        function = _FUNCTIONS.get(tree.func.id)
        if function is not None and tree.args:
            first, *rest = (_value(arg, values) for arg in tree.args)
            for other in rest:
                first = function(first, other)
            return first
    raise ValueError(f"{ast.unparse(tree)!r} is no formula over the sizes of this program")
