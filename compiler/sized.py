"""Which compiled program serves a call whose sizes are symbols.

A symbolic program serves every size that meets what was assumed when it was made. Passes assume
nothing of most models. Targets that trace the ranks' graphs tell apart only sizes of which a rank
has one element from those of which it has more. So one program serves all calls, or one more; only
where an assumption of the passes fails does a call get a program made for its sizes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import sympy

from rolemesh.compiler.ir.program import Program

__all__ = ["Sized", "SizedPrograms", "Values"]


Values = Mapping[sympy.Symbol, int]
"""The value of every symbol of a Program's sizes in one call."""


class Sized(Protocol):
    """A compiled program."""

    def serves(self, values: Values) -> bool:
        """Whether it is right for these values of the symbols of its sizes."""


_S = TypeVar("_S", bound=Sized)


_MOST_SIZES = 4096
"""Sizes whose program is remembered."""


class SizedPrograms(Generic[_S]):
    """Compiled programs of one captured Program and phase.

    Args:
        captured: The captured Program.
        compile_program: Shards and compiles the captured Program, or it at plain sizes, by an
            example of the values of its symbols.
    """

    def __init__(self, captured: Program, compile_program: Callable[[Program, Values], _S]) -> None:
        self._captured = captured
        self._compile = compile_program
        self._symbolic: list[_S] = []
        self._plain: dict[tuple[int, ...], _S] = {}
        self._serving: dict[tuple[int, ...], _S] = {}

    def __len__(self) -> int:
        """How many programs were compiled."""
        return len(self._symbolic) + len(self._plain)

    @property
    def first(self) -> _S:
        """The program that was compiled first."""
        return next(iter((*self._symbolic, *self._plain.values())))

    def at(self, values: Values) -> _S:
        """The program for these values of the symbols, compiled if need be."""
        key = tuple(values.values())
        found = self._serving.get(key)
        if found is None:
            if len(self._serving) == _MOST_SIZES:
                self._serving.clear()
            found = self._serving[key] = self._find(values)
        return found

    def _find(self, values: Values) -> _S:
        for made in self._symbolic:
            if made.serves(values):
                return made
        if not self._symbolic or self._captured.fits(values):
            made = self._compile(self._captured, values)
            if made.serves(values):  # making the first one may have assumed what is not so
                self._symbolic.append(made)
                return made
        key = tuple(values.values())
        if key not in self._plain:
            self._plain[key] = self._compile(self._captured.at(values), {})
        return self._plain[key]
