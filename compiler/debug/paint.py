"""Layouts in colour: every mesh axis has one, and what is split over an axis has its colour.

The usual names of axes have fixed colours, so that `tp` looks the same in every run. Other axes
take the colours that are left, in mesh order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import cycle

__all__ = ["Painter"]

_CODES = (36, 33, 35, 32, 34, 96, 93, 95, 92, 94)
"""SGR codes: cyan, yellow, magenta, green, blue, and each of them bright. Red is left to errors."""
_NAMED = dict(zip(("tp", "dp", "ep", "pp", "cp", "sp"), _CODES, strict=False))
_BOLD, _DIM = 1, 2
_GREEN, _RED = 32, 31


class Painter:
    """Paints text for a mesh.

    Args:
        axes: Names of the mesh's axes.
        on: Whether to paint at all; if not, every method gives the text back.
    """

    def __init__(self, axes: Iterable[str], on: bool) -> None:
        self._on = on
        names = list(axes)
        taken = [_NAMED[name] for name in names if name in _NAMED]
        free = cycle([code for code in _CODES if code not in taken])
        self._codes = {name: _NAMED.get(name) or next(free) for name in names}
        axis = "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"
        # `16@tp`, `(2*T)@dp/tp`, `owner(2)@tp`, `routed(...)@tp`, and `+sum(tp)`.
        self._split = re.compile(
            rf"(?P<what>[\w*+]*(?:\([^()\[\]]*\))?)@(?P<axes>(?:{axis})(?:/(?:{axis}|\d+))*)\b"
            rf"|(?P<pending>[+\w]+\()(?P<axis>{axis})\)"
        )

    def axis(self, name: str, text: str | None = None) -> str:
        """An axis's name, or text about it."""
        return self._sgr(self._codes[name], name if text is None else text)

    def kind(self, text: str) -> str:
        """A type with its layout, such as `f32[2, 13@tp, 64]`."""
        return self._split.sub(self._found, text) if self._on else text

    def bold(self, text: str) -> str:
        """What the eye should find first."""
        return self._sgr(_BOLD, text)

    def dim(self, text: str) -> str:
        """What is there to look up."""
        return self._sgr(_DIM, text)

    def added(self, text: str) -> str:
        """What only the second of two things has."""
        return self._sgr(_GREEN, text)

    def removed(self, text: str) -> str:
        """What only the first of two things has."""
        return self._sgr(_RED, text)

    def _found(self, match: re.Match[str]) -> str:
        if match["axis"]:
            return self.axis(match["axis"], match[0])
        first, *others = match["axes"].split("/")
        parts = [self.axis(first, f"{match['what']}@{first}")]
        parts += [self.axis(name, name) if name in self._codes else name for name in others]
        return "/".join(parts)

    def _sgr(self, code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._on and text else text
