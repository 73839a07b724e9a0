"""Numbers of bytes as arguments and in text."""

from __future__ import annotations

import argparse
import re

__all__ = ["byte_count", "byte_text"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000 ** (n + 1) for n, prefix in enumerate("kMGT")}
_UNITS |= {f"{prefix}iB": 1024 ** (n + 1) for n, prefix in enumerate("KMGT")}


def byte_count(text: str) -> int:
    """A number of bytes given as an argument: 1000000, 256MiB, 5GB."""
    found = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in _UNITS or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text} is no number of bytes, such as 256MiB or 5GB")
    return int(found[1]) * _UNITS[found[2]]


def byte_text(count: int) -> str:
    """A number of bytes for people: 12.3 MB."""
    for unit in ("TB", "GB", "MB", "kB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.1f} {unit}"
    return f"{count} B"
