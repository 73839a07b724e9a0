"""Guards on symbolic sizes that tracing added, as text, and taken again in another process.

A symbol is written as `n` and the number of the input that has its value: `Ne(n3, 1)`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from rolemesh.compiler.cache.text import NotCacheableError
from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.serial_values import decode_assumption, decode_size

__all__ = ["decode_guard", "encode_guards", "take_guards"]

_EQUALITIES = {"Eq": sympy.Eq, "Ne": sympy.Ne}


def encode_guards(guards: Sequence[sympy.Basic], inputs: Sequence[object]) -> list[str]:
    """Guards as text.

    Raises:
        NotCacheableError: For a guard that cannot be read back as it is.
    """
    numbers = _numbers(inputs)
    scope = _scope(inputs)
    renamed = {symbol: _symbol(scope, index) for symbol, index in numbers.items()}
    found = []
    for guard in guards:
        relation = guard.xreplace(renamed)
        text = str(relation)
        try:
            same = decode_guard(text, scope) == relation
        except ValueError:
            same = False
        if not same:
            raise NotCacheableError(f"tracing guards on {guard}")
        found.append(text)
    return found


def take_guards(texts: Sequence[str], inputs: Sequence[object]) -> bool:
    """Guard as another process did, if the guards hold for these inputs.

    Args:
        texts: What `encode_guards` gave.
        inputs: The inputs of the graph in this process.

    Returns:
        Whether they hold; if not, nothing is guarded on.

    Raises:
        ValueError: If a text is no guard.
    """
    if not texts:
        return True
    scope = _scope(inputs)
    relations = [decode_guard(text, scope) for text in texts]
    sizes = {_symbol(scope, index): inputs[index] for index in _numbers(inputs).values()}
    hints = {symbol: scope.hints[symbol] for symbol in sizes}
    if any(relation.subs(hints) != sympy.true for relation in relations):
        return False
    for relation in relations:
        if relation != sympy.true:
            bool(sympy_interp(PythonReferenceAnalysis, sizes, relation))
    return True


def _numbers(inputs: Sequence[object]) -> dict[sympy.Symbol, int]:
    """The number of the input that is each symbol."""
    found: dict[sympy.Symbol, int] = {}
    for index, value in enumerate(inputs):
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            found.setdefault(value.node.expr, index)
    return found


def _scope(inputs: Sequence[object]) -> Scope:
    scope = Scope()
    for symbol, index in _numbers(inputs).items():
        value = inputs[index]
        assert isinstance(value, torch.SymInt)
        env = value.node.shape_env
        assert isinstance(env, ShapeEnv)
        scope.symbol(f"n{index}", env.optimization_hint(symbol), 1 if symbol.is_positive else None)
    return scope


def _symbol(scope: Scope, index: int) -> sympy.Symbol:
    return next(symbol for symbol in scope.hints if str(symbol) == f"n{index}")


def decode_guard(text: str, scope: Scope) -> sympy.Basic:
    """The relation that a text says, over the symbols of a scope.

    Raises:
        ValueError: If it says none.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no guard") from error
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        equality = _EQUALITIES.get(tree.func.id)
        if equality is not None and len(tree.args) == 2:
            sides = [decode_size(ast.unparse(side), scope) for side in tree.args]
            return equality(*(side.formula if isinstance(side, Dim) else side for side in sides))
    return decode_assumption(text, scope)
