"""Symbolic sizes: integers whose value is not known before the program runs.

A `Dim` is an `int` with a formula over symbols, such as `2*T`, so that rules and passes handle it
with plain operators. Its integer value is a *hint*, the value at the example that was traced; only
costs may depend on it. Arithmetic gives formulas; a formula without symbols is a plain integer.

* `==` compares formulas: a symbolic size equals only what it equals for every value. So nothing
  specialises a size by accident, and a size that is not known to divide is treated as uneven.
  `bool` is `!= 0`, thus always true: what is always zero is the plain integer 0.
* `<` and `>` are decided by the ranges of the symbols where these suffice. Else the hint decides,
  and the scope records the *assumption*; `Scope.holds` says whether given values meet all of them,
  so that a program is never run for sizes it was not made for.

Whatever takes a plain integer (`range`, a list's length, a torch call) would silently get the hint:
a Program with symbolic sizes is bound to values (`concrete`) or to nodes that compute them before
it runs.

Formulas are sympy expressions with torch's `FloorDiv` and `Mod`, as in `torch.SymInt`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import TypeAlias, TypeVar, cast

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

__all__ = ["Dim", "Scope", "concrete", "evaluator", "gcd", "replaced"]

_T = TypeVar("_T")
_LARGEST = 1 << 40  # of any size; then sums and products of a few sizes are still machine integers
Formula: TypeAlias = "sympy.Expr"


class Scope:
    """The symbols of one captured graph, and what was assumed about them.

    Attributes:
        hints: The value of each symbol in the traced example.
        ranges: The range of each symbol.
        sources: Where a run reads each symbol: the input, and its dim; None for the value of an
            integer input.
        assumptions: What decisions relied on, in order of appearance.
    """

    def __init__(self) -> None:
        self.sources: dict[sympy.Symbol, tuple[int, int | None]] = {}
        self.hints: dict[sympy.Symbol, int] = {}
        self.ranges: dict[sympy.Symbol, ValueRanges[sympy.Expr]] = {}
        self.assumptions: dict[sympy.Basic, None] = {}
        self._sizes: dict[Formula, int] = {}
        self._results: dict[tuple[str, object, object], int] = {}
        self._truths: dict[tuple[str, Formula], bool] = {}

    def symbol(self, name: str, hint: int, lower: int | None = 2, upper: int | None = None) -> Dim:
        """A new symbol.

        Args:
            name: Unique in this scope.
            hint: Its value in the traced example.
            lower: Smallest value it takes; None for no limit.
            upper: Largest value; None for no limit.
        """
        made = sympy.Symbol(
            name, integer=True, positive=True if lower is not None and lower > 0 else None
        )
        if any(str(known) == name for known in self.hints):
            raise ValueError(f"symbol {name} exists")
        self.hints[made] = hint
        self.ranges[made] = ValueRanges(
            -_LARGEST if lower is None else lower, _LARGEST if upper is None else upper
        )
        size = self.size(made)
        assert isinstance(size, Dim)
        return size

    def size(self, formula: Formula) -> int:
        """The size that a formula over this scope's symbols stands for."""
        found = self._sizes.get(formula)
        if found is None:
            found = int(formula) if formula.is_Integer else Dim._make(formula, self)
            self._sizes[formula] = found
        return found

    def values(self, inputs: Sequence[torch.Tensor]) -> dict[sympy.Symbol, int]:
        """The value of every symbol for the inputs of a run, of logical shapes."""
        return {
            symbol: int(inputs[index].item()) if dim is None else inputs[index].shape[dim]
            for symbol, (index, dim) in self.sources.items()
        }

    def value(self, formula: Formula, values: Mapping[sympy.Symbol, int]) -> int:
        """A formula's value for given values of the symbols."""
        return _evaluated(formula, values)

    def holds(self, values: Mapping[sympy.Symbol, int]) -> bool:
        """Whether these values are in range, and everything that was assumed is true of them."""
        return all(
            self.ranges[symbol].lower <= value <= self.ranges[symbol].upper
            for symbol, value in values.items()
        ) and all(assumption.subs(values) == sympy.true for assumption in self.assumptions)

    def apply(self, name: str, function: Callable[..., Formula], *operands: int) -> int:
        """The size that `function` of formulas gives; remembered, as models repeat themselves.

        Raises:
            ValueError: If an operand is of another scope.
        """
        if any(isinstance(size, Dim) and size.scope is not self for size in operands):
            raise ValueError(f"{operands[0]} and {operands[-1]} are sizes of two different graphs")
        formulas = [x.formula if isinstance(x, Dim) else sympy.Integer(x) for x in operands]
        key = (name, formulas[0], formulas[-1])
        found = self._results.get(key)
        if found is None:
            found = self._results[key] = self.size(_result(function, *formulas))
        return found

    def positive(self, formula: Formula, hint: int) -> bool:
        """Whether a formula is above zero: proven, or assumed as in the traced example."""
        key = (">", formula)
        found = self._truths.get(key)
        if found is None:
            ranges = [(symbol, self.ranges[symbol]) for symbol in formula.free_symbols]
            found = _sign(formula, frozenset(ranges))
            if found is None:
                found = hint > 0
                relation = formula > 0 if found else formula <= 0
                self.assumptions.setdefault(relation)
            self._truths[key] = found
        return found


def _evaluated(formula: Formula, values: Mapping[sympy.Symbol, int]) -> int:
    """A formula's value, without the formulas that `subs` makes on its way."""
    if formula.is_Symbol:
        return values[formula]
    if formula.is_Integer:
        return int(formula)
    parts = [_evaluated(part, values) for part in formula.args]
    if formula.is_Add:
        return sum(parts)
    if formula.is_Mul:
        return math.prod(parts)
    if formula.is_Pow:
        return int(parts[0] ** parts[1])
    if isinstance(formula, FloorDiv):
        return parts[0] // parts[1]
    if isinstance(formula, Mod | PythonMod):
        return parts[0] % parts[1]
    return int(formula.func(*parts))


@lru_cache(maxsize=65536)
def _result(function: Callable[..., Formula], *formulas: Formula) -> Formula:
    """What `function` of formulas gives; graphs have many formulas in common."""
    return sympy.expand(function(*formulas))


@lru_cache(maxsize=65536)
def _sign(
    formula: Formula, ranges: frozenset[tuple[sympy.Symbol, ValueRanges[sympy.Expr]]]
) -> bool | None:
    """Whether a formula is always above zero (True), never (False), or neither is known."""
    # Rounding division by its real bounds, so that what is left is a polynomial; and its factors,
    # because intervals do not see that `B*T - T` has its terms in common.
    for form in (sympy.expand, sympy.factor):
        if bound_sympy(form(_rounded(formula, low=True)), dict(ranges)).lower > 0:
            return True
        if bound_sympy(form(_rounded(formula, low=False)), dict(ranges)).upper <= 0:
            return False
    return None


def _rounded(formula: Formula, low: bool) -> Formula:
    """A formula with each term that has one `FloorDiv` replaced by a real bound of it."""
    terms = []
    for term in sympy.Add.make_args(formula):
        factor, rest = term.as_coeff_Mul()
        if isinstance(rest, FloorDiv) and rest.args[1].is_Integer and rest.args[1] > 0:
            base, divisor = rest.args
            if (factor > 0) == low:
                base = base - divisor + 1
            terms.append(factor * base / divisor)
        else:
            terms.append(term)
    return sympy.Add(*terms)


class Dim(int):
    """A symbolic size; see the module docstring.

    Attributes:
        formula: The size as a function of the scope's symbols.
        scope: Where the symbols are from.
    """

    formula: Formula
    scope: Scope

    @classmethod
    def _make(cls, formula: Formula, scope: Scope) -> Dim:
        size = int.__new__(cls, _evaluated(formula, scope.hints))
        size.formula = formula
        size.scope = scope
        return size

    @property
    def hint(self) -> int:
        """Its value in the traced example."""
        return int.__int__(self)

    # ---- identity: by formula --------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Dim)
            and self.scope is other.scope
            and bool(self.formula == other.formula)
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.formula)

    def __repr__(self) -> str:
        return str(self.formula)

    __str__ = __repr__

    def __copy__(self) -> Dim:
        return self

    def __deepcopy__(self, memo: object) -> Dim:
        return self

    def __reduce__(self) -> str:
        raise TypeError(f"symbolic size {self} belongs to one process; make it concrete first")

    # ---- order: by range, else by hint with an assumption ----------------------------------------

    def __gt__(self, other: float) -> bool:
        return self._exceeds(self, other)

    def __lt__(self, other: float) -> bool:
        return self._exceeds(other, self)

    def __ge__(self, other: float) -> bool:
        return not self._exceeds(other, self)

    def __le__(self, other: float) -> bool:
        return not self._exceeds(self, other)

    def __bool__(self) -> bool:
        return True  # as `!= 0`: a remainder that is not known to be zero is one

    def _exceeds(self, left: int | float, right: int | float) -> bool:
        if isinstance(left, float) or isinstance(right, float):
            return float(left) > float(right)
        difference = left - right
        if isinstance(difference, Dim):
            return self.scope.positive(difference.formula, difference.hint)
        return difference > 0

    # ---- arithmetic ------------------------------------------------------------------------------

    def __add__(self, other: int) -> int:
        return self._with("+", operator.add, self, other)

    def __sub__(self, other: int) -> int:
        return self._with("-", operator.sub, self, other)

    def __mul__(self, other: int) -> int:
        return self._with("*", operator.mul, self, other)

    def __floordiv__(self, other: int) -> int:
        return self._with("//", _divided, self, other)

    def __mod__(self, other: int) -> int:
        return self._with("%", _modulo, self, other)

    def __radd__(self, other: int) -> int:
        return self._with("+", operator.add, other, self)

    def __rsub__(self, other: int) -> int:
        return self._with("-", operator.sub, other, self)

    def __rmul__(self, other: int) -> int:
        return self._with("*", operator.mul, other, self)

    def __rfloordiv__(self, other: int) -> int:
        return self._with("//", _divided, other, self)

    def __rmod__(self, other: int) -> int:
        return self._with("%", _modulo, other, self)

    def __divmod__(self, other: int) -> tuple[int, int]:
        return self // other, self % other

    def __rdivmod__(self, other: int) -> tuple[int, int]:
        return other // self, other % self

    # `int` has overloads by literal exponents, with results such as `Literal[1]`.
    def __pow__(self, other: int, modulo: None = None) -> int:  # type: ignore[override]
        if type(other) is not int or other < 0 or modulo is not None:
            return self._refuse()
        return self.scope.size(self.formula**other)

    def __neg__(self) -> int:
        return self * -1

    def __pos__(self) -> int:
        return self

    def __abs__(self) -> int:
        return self if self > 0 else -self

    def _refuse(self, other: object = None, modulo: object = None) -> int:
        """Of an operator without a formula; that of `int` would take the hint."""
        raise TypeError(f"symbolic size {self} has no such operator")

    __rpow__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __invert__ = _refuse

    def _with(self, name: str, function: Callable[..., Formula], left: int, right: int) -> int:
        if isinstance(left, float) or isinstance(right, float):  # a cost
            return cast("int", _FLOAT[name](float(left), float(right)))
        if not isinstance(left, int) or not isinstance(right, int):
            return NotImplemented
        return self.scope.apply(name, function, left, right)


_FLOAT: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
        "//": operator.floordiv,
        "%": operator.mod,
    }
)
"""The same operators on numbers."""


def _divided(size: Formula, divisor: Formula) -> Formula:
    """The quotient rounded down; exact where every term is a multiple."""
    exact = _exact_quotient(size, divisor)
    return FloorDiv(size, divisor) if exact is None else exact


def _modulo(size: Formula, divisor: Formula) -> Formula:
    """The remainder; zero where every term is a multiple."""
    if _exact_quotient(size, divisor) is not None:
        return sympy.Integer(0)
    return (Mod if size.is_nonnegative else PythonMod)(size, divisor)


def _exact_quotient(size: Formula, divisor: Formula) -> Formula | None:
    """The quotient if it is a polynomial with integer coefficients."""
    if divisor.is_Integer:
        terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(size)]
        if any(not factor.is_Integer or factor % divisor != 0 for factor, _ in terms):
            return None
        return sympy.Add(*[factor // divisor * rest for factor, rest in terms])
    quotient = sympy.expand(sympy.cancel(sympy.Mul(size, sympy.Pow(divisor, -1))))
    whole = quotient.is_polynomial(*quotient.free_symbols) and all(
        term.as_coeff_Mul()[0].is_Integer for term in sympy.Add.make_args(quotient)
    )
    return quotient if whole else None


def gcd(*sizes: int) -> int:
    """A common divisor for every value of the symbols; the greatest one for plain integers.

    For symbolic sizes, that of the formulas as polynomials with integer coefficients, where a
    division that rounds counts as a symbol of its own.
    """
    scope = next((size.scope for size in sizes if isinstance(size, Dim)), None)
    if scope is None:
        return math.gcd(*sizes)
    found = 0
    for size in sizes:
        found = scope.apply("gcd", sympy.gcd, found, size)
    return found


def concrete(value: _T, values: Mapping[sympy.Symbol, int]) -> _T:
    """A structure of tuples, lists and dicts with every symbolic size in it as a plain integer.

    Args:
        value: The structure; what is not a symbolic size stays as it is.
        values: The value of every symbol.
    """
    return replaced(value, evaluator(values))


def evaluator(values: Mapping[sympy.Symbol, int]) -> Callable[[Dim], int]:
    """What a symbolic size is for these values; each formula is worked out once."""
    known: dict[Formula, int] = {}

    def evaluate(size: Dim) -> int:
        found = known.get(size.formula)
        if found is None:
            found = known[size.formula] = size.scope.value(size.formula, values)
        return found

    return evaluate


def replaced(value: _T, function: Callable[[Dim], object]) -> _T:
    """A structure of tuples, lists, dicts and slices with `function` of every symbolic size."""
    return cast("_T", _replaced(value, function))


def _replaced(value: object, function: Callable[[Dim], object]) -> object:
    if isinstance(value, Dim):
        return function(value)
    if isinstance(value, tuple):
        items = [_replaced(item, function) for item in value]
        kind: Callable[..., object] = type(value)
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, list):
        return [_replaced(item, function) for item in value]
    if isinstance(value, dict):
        return {key: _replaced(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_replaced(part, function) for part in (value.start, value.stop, value.step)))
    return value
