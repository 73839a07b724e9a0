"""What an expert does between its two projections, as text: `mul(silu(gate), up)`.

The text is a call of `FUNCTIONS`, with numbers and names of parts of the first projection's rows:

    rows        all of them, where there is no gate
    gate, up    their first and second half
    even, odd   their elements at even and odd places

`Recorded` writes such a text: it takes the place of the rows in the code of a model. That works
under Dynamo too, which then guards on the numbers that the code reads. Code that does anything else
than `FUNCTIONS` do ends in a TypeError or AttributeError.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FUNCTIONS", "PARTS", "SWIGLU", "Recorded", "apply_gate", "parts_of"]

SWIGLU = "mul(silu(gate), up)"
"""The gate of most models."""

PARTS = (("rows",), ("gate", "up"), ("even", "odd"))
"""Names that one text may use together."""

FUNCTIONS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "add": torch.add,
        "clamp": torch.clamp,
        "div": torch.div,
        "elu": F.elu,
        "exp": torch.exp,
        "gelu": F.gelu,
        "hardswish": F.hardswish,
        "hardtanh": F.hardtanh,
        "leaky_relu": F.leaky_relu,
        "mish": F.mish,
        "mul": torch.mul,
        "neg": torch.neg,
        "pow": torch.pow,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "softplus": F.softplus,
        "square": torch.square,
        "sub": torch.sub,
        "tanh": torch.tanh,
    }
)
"""Row-wise, element by element, and without state."""

_ALIASES = MappingProxyType({"clip": "clamp"})
_Parts = Mapping[str, Tensor]


def parts_of(text: str) -> tuple[str, ...]:
    """The one of `PARTS` that a text uses.

    Raises:
        ValueError: If the text is not one of this module.
    """
    return _parsed(text)[0]


def apply_gate(text: str, rows: Tensor) -> Tensor:
    """What a text says of rows.

    Args:
        text: See the module's docstring.
        rows: `[..., F]`, what the first projection gives.

    Returns:
        `[..., F]` without a gate, else `[..., F / 2]`.

    Raises:
        ValueError: If the text is not one of this module.
    """
    names, compute = _parsed(text)
    width = rows.shape[-1] // len(names)
    if names == ("even", "odd"):
        pair = (rows[..., ::2], rows[..., 1::2])
    else:
        pair = (rows[..., :width], rows[..., width:])
    return compute(dict(zip(names, pair if len(names) == 2 else (rows,), strict=True)))


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> tuple[tuple[str, ...], Callable[[_Parts], Tensor]]:
    try:
        body = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ValueError(f"{text!r} is no gate") from None
    used = {node.id for node in ast.walk(body) if isinstance(node, ast.Name)} - FUNCTIONS.keys()
    names = next((names for names in PARTS if used and used <= set(names)), None)
    if names is None:
        raise ValueError(f"{text!r} does not use one of {PARTS}")
    value = _compiled(body, text)
    return names, value  # type: ignore[return-value] # it uses a part, so it is a tensor


def _compiled(node: ast.expr, text: str) -> Callable[[_Parts], object]:
    if isinstance(node, ast.Name):
        name = node.id
        return lambda parts: parts[name]
    if not isinstance(node, ast.Call):
        try:
            constant = ast.literal_eval(node)
        except ValueError:
            raise ValueError(f"{text!r} has more than calls, names and constants") from None
        return lambda parts: constant
    function = FUNCTIONS.get(node.func.id) if isinstance(node.func, ast.Name) else None
    if function is None:
        raise ValueError(f"{text!r} calls something else than {', '.join(FUNCTIONS)}")
    values = [_compiled(argument, text) for argument in node.args]
    named = {str(given.arg): _compiled(given.value, text) for given in node.keywords}
    return lambda parts: function(
        *[value(parts) for value in values],
        **{name: value(parts) for name, value in named.items()},
    )


class Recorded:
    """Stands for rows, or what is computed from them, and has the text of it.

    Args:
        text: The text.
    """

    def __init__(self, text: str = "rows") -> None:
        self.text = text

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Recorded:
        return _called(func.__name__, args, kwargs or {})

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Recorded, Recorded]:
        """The two halves of the rows."""
        if self.text != "rows" or chunks != 2 or dim != -1:
            raise TypeError("no halves of rows")
        return Recorded("gate"), Recorded("up")

    def __getitem__(self, key: object) -> Recorded:
        for start, name in ((None, "even"), (0, "even"), (1, "odd")):
            if self.text == "rows" and key == (Ellipsis, slice(start, None, 2)):
                return Recorded(name)
        raise TypeError("no elements at even or odd places")

    def clamp(self, min: float | None = None, max: float | None = None) -> Recorded:  # noqa: A002
        """As `torch.clamp`."""
        return _called("clamp", (self, min, max), {})

    def sigmoid(self) -> Recorded:
        """As `torch.sigmoid`."""
        return _called("sigmoid", (self,), {})

    def __mul__(self, other: object) -> Recorded:
        return _called("mul", (self, other), {})

    __rmul__ = __mul__

    def __add__(self, other: object) -> Recorded:
        return _called("add", (self, other), {})

    __radd__ = __add__

    def __sub__(self, other: object) -> Recorded:
        return _called("sub", (self, other), {})

    def __truediv__(self, other: object) -> Recorded:
        return _called("div", (self, other), {})

    def __pow__(self, other: object) -> Recorded:
        return _called("pow", (self, other), {})

    def __neg__(self) -> Recorded:
        return _called("neg", (self,), {})


def _called(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Recorded:
    name = _ALIASES.get(name, name)
    if name not in FUNCTIONS:
        raise TypeError(f"{name} is none of the functions of a gate")
    given = [_text(value) for value in args]
    given += [f"{key}={_text(value)}" for key, value in kwargs.items() if key != "inplace"]
    return Recorded(f"{name}({', '.join(given)})")


def _text(value: object) -> str:
    if isinstance(value, Recorded):
        return value.text
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float) and value - value == 0:  # neither infinite nor NaN
        return repr(value)
    raise TypeError("a gate has an operand that is neither computed from the rows nor a number")
