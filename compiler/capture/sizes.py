"""Symbolic sizes of a captured graph: from torch's `SymInt`s to the `Dim`s of a Program.

Symbols get names that read well: `B` and `T` for the dims of the first ids, `[B, T]`, and `s0`,
`s1` and so on for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch

from rolemesh.compiler.ir.dims import Scope

__all__ = ["CapturedSizes"]

_IDS = (torch.int64, torch.int32)


class CapturedSizes:
    """The symbols met while one graph is copied.

    Attributes:
        scope: Their scope; None as long as all sizes are plain.
    """

    def __init__(self) -> None:
        self.scope: Scope | None = None
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self._names: dict[sympy.Symbol, str] = {}
        self._shaped: set[sympy.Symbol] = set()

    def name_symbols(self, inputs: Sequence[tuple[object, bool]]) -> None:
        """Choose names, before sizes are asked for.

        Args:
            inputs: The value of each input of the graph, and whether it is an argument of the call.
        """
        for value, is_argument in inputs:
            if not isinstance(value, torch.Tensor):
                continue
            for dim, size in enumerate(value.shape):
                symbol = _symbol(size)
                if symbol is None:
                    continue
                self._shaped.add(symbol)
                if is_argument and value.ndim == 2 and value.dtype in _IDS:
                    name = "BT"[dim]
                    if name not in self._names.values():
                        self._names.setdefault(symbol, name)

    def size(self, size: torch.SymInt) -> int:
        """The size of a Program that a backed `SymInt` stands for."""
        formula = size.node.expr
        if formula.is_Integer:
            return int(formula)
        for symbol in sorted(formula.free_symbols, key=str):
            if symbol not in self._symbols:
                self._add(symbol, size)
        assert self.scope is not None
        return self.scope.size(sympy.expand(formula.xreplace(self._symbols)))

    def found_in(self, value: object, index: int) -> None:
        """Remember that input `index` of the Program has, or is, `value`: a place of symbols."""
        assert isinstance(value, torch.Tensor | torch.SymInt)
        places = enumerate(value.shape) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in places:
            symbol = _symbol(size)
            if symbol is not None and self.scope is not None:
                self.scope.sources.setdefault(self._symbols[symbol], (index, dim))

    def is_read_from(self, value: torch.SymInt) -> bool:
        """Whether an integer input is the one place where a run can read its symbol."""
        symbol = _symbol(value)
        return symbol is not None and symbol not in self._shaped

    def _add(self, symbol: sympy.Symbol, size: torch.SymInt) -> None:
        if self.scope is None:
            self.scope = Scope()
        shape_env = size.node.shape_env
        bounds = shape_env.var_to_range[symbol]
        name = self._names.get(symbol, f"s{len(self._symbols)}")
        lower, upper = (
            int(end) if end.is_Integer else None for end in (bounds.lower, bounds.upper)
        )
        made = self.scope.symbol(name, shape_env.optimization_hint(symbol), lower, upper)
        self._symbols[symbol] = made.formula


def _symbol(size: object) -> sympy.Symbol | None:
    """The symbol that a size is, if it is just that."""
    if not isinstance(size, torch.SymInt):
        return None
    formula = size.node.expr
    return formula if isinstance(formula, sympy.Symbol) else None
