"""A Dynamo backend that captures graphs and runs them as captured."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rolemesh.compiler.capture.entry import Captured
from rolemesh.compiler.capture.graph import capture

__all__ = ["capturing"]


def capturing(into: list[Captured]) -> Callable[..., Callable[..., object]]:
    """The backend; each graph that it captures is appended to `into`."""

    def backend(gm: torch.fx.GraphModule, inputs: list[object]) -> Callable[..., object]:
        captured, compiled = capture(gm, inputs)
        into.append(captured)
        return compiled

    return backend
