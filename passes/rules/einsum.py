"""Sharding rules written like einsums: `parse("b m k, b k n -> b m n", name)`.

A spec lists the tensor operands, `->`, and the results, each as its dims separated by spaces:

* a letter or a word is a factor, and equal names shard together;
* a name on the right is passed through; a name on the left only is summed away, so that a shard of
  it makes the results partial;
* `k!` says that a result may need all of `k`: it stays whole. Only a name with this mark may stand
  on the right alone;
* `(h d)` is one dim made of several factors, major to minor;
* `1` is a dim of extent one, `...` any number of dims, aligned at the right as in broadcasting.

A dim of extent one where others have more is broadcast, and holds no part of the factor.

Invariant: what does not depend on extents is worked out once, in `parse` or at the first call with
new numbers of dims. A later call only reads extents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.rule import DimFactors, Kind, OpCall, Rule
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.registry import RuleFunction

__all__ = ["parse"]

_DIM = re.compile(r"\s*(\([^()]*\)|\.\.\.|[A-Za-z_]\w*!?|1(?!\w))(?=[\s(]|$)")
_NAME = re.compile(r"[A-Za-z_]\w*!?")
_ELLIPSIS = ("...",)

_Dims = tuple[tuple[str, ...], ...]
"""The dims of one tensor as names; a dim without names has extent one."""


def parse(
    spec: str, name: str, *, linear: Sequence[tuple[bool, ...]] | None = None
) -> RuleFunction:
    """The rule function that a spec describes.

    A summed name in two or more operands makes the op a contraction, and that is taken to be linear
    in each operand that has one. So an op that does something else to the sum (an activation, a
    bias) must mark the name: `m k!, n k!, n -> m n`.

    Args:
        spec: For example `b m k, b k n -> b m n`; see the module docstring.
        name: The op, for messages.
        linear: Patterns of partial operands, in place of those of a contraction; see `Rule.linear`.

    Returns:
        A function from a call to its rule. It raises RM022 for a call that does not fit the spec.

    Raises:
        RolemeshError: RM022 for a malformed spec.
    """
    reader = _Spec(spec, name)
    left, arrow, right = spec.partition("->")
    if not arrow or "->" in right:
        reader.fail(
            "a spec has one '->'",
            "operands stand on its left and results on its right",
            "write for example 'b m k, b k n -> b m n'",
        )
    operands = tuple(reader.dims(text) for text in left.split(","))
    results = tuple(reader.dims(text) for text in right.split(","))
    return reader.function(operands, results, None if linear is None else tuple(linear))


@dataclass(frozen=True, slots=True)
class _Form:
    """A spec for operands and results with given numbers of dims: factors are numbered."""

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    operands: tuple[DimFactors, ...]
    results: tuple[DimFactors, ...]
    linear: tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, slots=True)
class _Spec:
    """A spec's text with its op, and everything that may be wrong with it."""

    text: str
    op: str

    def fail(self, what: str, why: str, fix: str) -> NoReturn:
        raise RolemeshError(
            "RM022", what=what, where=f"rule of {self.op}: {self.text!r}", why=why, fix=fix
        )

    def dims(self, text: str) -> _Dims:
        """Read one tensor's dims."""
        found: list[tuple[str, ...]] = []
        position, end = 0, len(text.rstrip())
        while position < end:
            token = _DIM.match(text, position, end)
            if token is None:
                self.fail(
                    f"cannot read {text[position:].strip()!r}",
                    "a dim is a name, a name with '!', '(a b)', '1' or '...'",
                    "separate dims by spaces and tensors by commas",
                )
            position = token.end()
            found.append(self.names(token[1]))
        used = [name.rstrip("!") for names in found for name in names]
        for name in used:
            if used.count(name) > 1:
                self.fail(
                    f"{name!r} stands twice in {text.strip()!r}",
                    "a shard of both dims would hold only the blocks on the diagonal",
                    f"use two names and mark them with '!': {name}! {name}2!",
                )
        return tuple(found)

    def names(self, token: str) -> tuple[str, ...]:
        """Names in one dim."""
        if token == "1":
            return ()
        if not token.startswith("("):
            return (token,)
        names = tuple(token[1:-1].split())
        if not names or not all(_NAME.fullmatch(name) for name in names):
            self.fail(
                f"cannot read the group {token!r}",
                "a group lists the names that make up one dim",
                "write for example '(heads d)'",
            )
        return names

    def function(
        self,
        operands: tuple[_Dims, ...],
        results: tuple[_Dims, ...],
        linear: tuple[tuple[bool, ...], ...] | None,
    ) -> RuleFunction:
        """The rule function; it numbers the factors anew for every combination of dim counts."""
        tensors = (*operands, *results)
        # Numbered here already, so that a bad spec fails where it is written, not at a call.
        written = tuple([len(dims) for dims in tensors])
        forms = {written: self.form(operands, results, linear, written)}
        if any(_ELLIPSIS in dims for dims in tensors):
            forms.clear()

        def rule(call: OpCall) -> Rule:
            ranks = tuple([len(value.shape) for value in call.operands + call.results])
            form = forms.get(ranks)
            if form is None or len(form.operands) != len(call.operands):
                self.check_counts("operand", operands, call.operands)
                self.check_counts("result", results, call.results)
                form = forms[ranks] = self.form(operands, results, linear, ranks)
            return _bind(self, form, call)

        return rule

    def form(
        self,
        operands: tuple[_Dims, ...],
        results: tuple[_Dims, ...],
        linear: tuple[tuple[bool, ...], ...] | None,
        ranks: tuple[int, ...],
    ) -> _Form:
        """Number the factors and decide what each allows."""
        tensors = [
            _expand(dims, rank) for dims, rank in zip((*operands, *results), ranks, strict=True)
        ]
        left, right = tensors[: len(operands)], tensors[len(operands) :]
        marked = {name[:-1] for name in _flat(tensors) if name.endswith("!")}
        passed = {name.rstrip("!") for name in _flat(right)}
        numbers: dict[str, int] = {}
        kinds: list[Kind] = []
        for name in (name.rstrip("!") for name in _flat(left)):
            if name not in numbers:
                numbers[name] = len(kinds)
                kind = Kind.PASS if name in passed else Kind.REDUCE
                kinds.append(Kind.REPLICATE if name in marked else kind)
        for name in (name.rstrip("!") for name in _flat(right)):
            if name not in numbers:
                if name not in marked:
                    self.fail(
                        f"{name!r} is on the right only",
                        "no operand says how to shard it",
                        f"write {name}! to keep the dim whole, or name it on the left too",
                    )
                numbers[name] = len(kinds)
                kinds.append(Kind.REPLICATE)
        numbered = tuple(
            tuple(tuple(numbers[name.rstrip("!")] for name in names) for names in dims)
            for dims in tensors
        )
        return _Form(
            names=tuple(numbers),
            kinds=tuple(kinds),
            operands=numbered[: len(operands)],
            results=numbered[len(operands) :],
            linear=_contraction(numbered[: len(operands)], kinds) if linear is None else linear,
        )

    def check_counts(
        self, what: str, specs: tuple[_Dims, ...], values: tuple[TensorType, ...]
    ) -> None:
        """Raise unless there are as many tensors, each with as many dims, as the spec says."""
        if len(specs) != len(values):
            self.fail(
                f"the spec has {len(specs)} {what}s, the call has {len(values)}",
                f"every tensor {what} needs its dims",
                "list the tensors in argument order, separated by commas",
            )
        for index, (dims, value) in enumerate(zip(specs, values, strict=True)):
            open_ended = _ELLIPSIS in dims
            least = len(dims) - open_ended
            if value.ndim < least or (value.ndim > least and not open_ended):
                self.fail(
                    f"{what} {index} has {value.ndim} dims, the spec gives it {least}",
                    f"the call has {value} there",
                    "name every dim, or write '...' for any number of them",
                )


def _flat(tensors: Sequence[_Dims]) -> list[str]:
    return [name for dims in tensors for names in dims for name in names]


def _expand(dims: _Dims, rank: int) -> _Dims:
    """Dims with `...` written out, numbered from the right, as broadcasting aligns them."""
    if _ELLIPSIS not in dims:
        return dims
    at = dims.index(_ELLIPSIS)
    count = rank - len(dims) + 1
    return (*dims[:at], *((f"...{i}",) for i in reversed(range(count))), *dims[at + 1 :])


def _contraction(
    operands: tuple[DimFactors, ...], kinds: list[Kind]
) -> tuple[tuple[bool, ...], ...]:
    """One pattern for each operand with a summed factor that another operand has as well."""
    held = [{factor for factors in dims for factor in factors} for dims in operands]
    shared = {
        factor
        for factor, kind in enumerate(kinds)
        if kind is Kind.REDUCE and sum(factor in factors for factors in held) > 1
    }
    terms = [index for index, factors in enumerate(held) if factors & shared]
    return tuple(tuple(index == term for index in range(len(operands))) for term in terms)


def _bind(spec: _Spec, form: _Form, call: OpCall) -> Rule:
    """The rule of one call whose tensors have the form's numbers of dims."""
    sizes = [-1] * len(form.names)
    for tensors, values in ((form.operands, call.operands), (form.results, call.results)):
        for dims, value in zip(tensors, values, strict=True):
            for factors, extent in zip(dims, value.shape, strict=True):
                if len(factors) != 1 or sizes[factors[0]] not in (-1, extent):
                    return _bind_all(spec, form, call)
                sizes[factors[0]] = extent
    return Rule(tuple(sizes), form.kinds, form.operands, form.results, form.linear)


def _bind_all(spec: _Spec, form: _Form, call: OpCall) -> Rule:
    """As `_bind`, for calls with broadcast dims, groups, dims of extent one, or a mistake."""
    sizes = _sizes(spec, form, call)

    def present(dims: DimFactors, value: TensorType, broadcasts: bool) -> DimFactors:
        found: list[tuple[int, ...]] = []
        for factors, extent in zip(dims, value.shape, strict=True):
            size = math.prod(sizes[factor] for factor in factors)
            if extent == size:
                found.append(factors)
            elif extent == 1 and broadcasts:
                found.append(())
            else:
                names = " ".join(form.names[factor] for factor in factors) or "1"
                spec.fail(
                    f"{names!r} is {size} and {extent} in one call",
                    f"the call has a {value}, and equal names have equal extents",
                    "use another name, or '!' names if the dims differ",
                )
        return tuple(found)

    operands = zip(form.operands, call.operands, strict=True)
    results = zip(form.results, call.results, strict=True)
    return Rule(
        sizes=tuple(sizes),
        kinds=form.kinds,
        operands=tuple([present(dims, value, True) for dims, value in operands]),
        results=tuple([present(dims, value, False) for dims, value in results]),
        linear=form.linear,
    )


def _sizes(spec: _Spec, form: _Form, call: OpCall) -> list[int]:
    """Extents of all factors: from dims of their own, then from groups with one unknown."""
    sizes = [-1] * len(form.names)
    groups: list[tuple[tuple[int, ...], int]] = []
    for dims, value in zip(
        (*form.operands, *form.results), (*call.operands, *call.results), strict=True
    ):
        for factors, extent in zip(dims, value.shape, strict=True):
            if len(factors) == 1:
                if sizes[factors[0]] in (-1, 1):
                    sizes[factors[0]] = extent
            elif factors:
                groups.append((factors, extent))
    groups.sort(key=lambda group: -group[1])  # a group of extent one may be a broadcast dim
    for _ in groups:
        for factors, extent in groups:
            unknown = [factor for factor in factors if sizes[factor] < 0]
            known = math.prod(sizes[factor] for factor in factors if sizes[factor] >= 0)
            if len(unknown) == 1 and known and extent % known == 0:
                sizes[unknown[0]] = extent // known
    if -1 in sizes:
        name = form.names[sizes.index(-1)]
        spec.fail(
            f"the extent of {name!r} is not known",
            "it is only in groups with another unknown, or the group does not divide",
            f"give {name} a dim of its own somewhere",
        )
    return sizes
