"""Access paths: how a value is reached from a variable, as text, and read again from a value.

    past_key_values.layers[0].keys

Nothing of a text is run: it is taken apart, and only attributes and constant keys are followed.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["AccessPath", "Step", "access_path"]


class Step(NamedTuple):
    """One step of an access path: `.keys` or `[0]`."""

    attribute: bool
    key: object

    def __str__(self) -> str:
        return f".{self.key}" if self.attribute else f"[{self.key!r}]"


class AccessPath(NamedTuple):
    """An access path: a variable and the steps from it."""

    root: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return self.root + "".join(map(str, self.steps))

    def read(self, variables: Mapping[str, object]) -> object:
        """The value at the end of the path.

        Raises:
            LookupError: If it is not there.
        """
        try:
            value: Any = variables[self.root]
            for attribute, key in self.steps:
                value = getattr(value, str(key)) if attribute else value[key]
        except (AttributeError, TypeError, LookupError) as error:
            raise LookupError(f"there is no {self}") from error
        return value


@functools.lru_cache(maxsize=1 << 13)
def access_path(text: str) -> AccessPath | None:
    """The path that a text says; None if it says something else.

    Args:
        text: A variable and steps from it. The variable may be written as Dynamo does, as an item
            of the locals `L` or the globals `G`.
    """
    try:
        expression = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    steps: list[Step] = []
    while True:
        match expression:
            case ast.Subscript(ast.Name("L" | "G"), ast.Constant(str() as root)):
                return AccessPath(root, tuple(reversed(steps)))
            case ast.Subscript(base, ast.Constant(key)):
                steps.append(Step(False, key))
            case ast.Call(
                ast.Attribute(ast.Name("dict"), "__getitem__"), [base, ast.Constant(key)]
            ):
                steps.append(Step(False, key))
            case ast.Call(ast.Attribute(base, "size"), []):
                steps.append(Step(True, "shape"))
            case ast.Attribute(base, name):
                steps.append(Step(True, name))
            case ast.Name(root):
                return AccessPath(root, tuple(reversed(steps)))
            case _:
                return None
        expression = base
