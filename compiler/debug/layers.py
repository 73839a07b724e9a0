"""Module paths as tools show them: the layer a path is in, and like layers as one.

A layer's number is the first component of a path that is a number, as everywhere in rolemesh.
"""

from __future__ import annotations

import re

__all__ = ["folded", "layer_of"]

_LAYER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


def layer_of(module: str) -> int | None:
    """The number of the layer that a module is in; None outside of all layers."""
    found = _LAYER.search(module)
    return int(found[0]) if found else None


def folded(module: str) -> str:
    """The path with every number as `*`, so that like layers and experts have one."""
    return _LAYER.sub("*", module)
