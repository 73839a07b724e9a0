"""Plain data as text that is the same in every process: what keys of the cache are made of.

Invariants:

* Equal values have equal texts in every process, and unequal ones have unequal texts.
* A value of a type that is not listed here is refused: a key never leaves out what it cannot say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import EllipsisType

import torch

__all__ = ["NotCacheableError", "digest", "plain_text"]


class NotCacheableError(Exception):
    """Something decides the result that a key cannot say, so that nothing is cached."""


_WORDS = (torch.dtype, torch.device, torch.layout, torch.memory_format, EllipsisType)


def plain_text(value: object) -> str:
    """A value as text.

    Args:
        value: None, numbers, strings, torch's dtypes and the like, and containers, enums and
            dataclasses of those.

    Raises:
        NotCacheableError: For a value of another type.
    """
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes():
            return f"{type(value).__name__}:{value!r}"
        case Enum():
            return f"{type(value).__qualname__}.{value.name}"
        case tuple() | list():
            name = "tuple" if isinstance(value, tuple) else "list"
            return f"{name}({','.join(map(plain_text, value))})"
        case set() | frozenset():
            return f"set({','.join(sorted(map(plain_text, value)))})"
        case Mapping():
            items = sorted(f"{plain_text(key)}={plain_text(item)}" for key, item in value.items())
            return f"map({','.join(items)})"
        case slice():
            return f"slice{plain_text((value.start, value.stop, value.step))}"
    if isinstance(value, _WORDS):
        return f"{type(value).__name__}:{value}"
    if is_dataclass(value) and not isinstance(value, type):
        items = [
            f"{field.name}={plain_text(getattr(value, field.name))}" for field in fields(value)
        ]
        return f"{type(value).__qualname__}({','.join(items)})"
    raise NotCacheableError(f"{value!r} ({type(value).__name__}) is no plain data")


def digest(*parts: str) -> str:
    """SHA-256 of texts, in hexadecimal digits."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()
