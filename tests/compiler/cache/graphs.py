"""Dynamo graphs for tests, and the cache as a backend of `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tests.models import forget_compiled
from torch import fx

from rolemesh.compiler.cache import captured as module
from rolemesh.compiler.cache.captured import capture_cached
from rolemesh.compiler.cache.folder import CacheFolder
from rolemesh.compiler.cache.graph_key import graph_key
from rolemesh.compiler.cache.text import NotCacheableError
from rolemesh.compiler.capture.entry import reference_executor
from rolemesh.compiler.capture.sources import current_frame, input_names, placeholder_sources

__all__ = ["Recorder", "keys_of"]


def keys_of(
    function: Callable[..., object], *args: object, dynamic: bool | None = None
) -> list[str | None]:
    """The keys of the graphs that Dynamo makes of a call; None for one that has none."""
    found: list[str | None] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        names = input_names(placeholder_sources(gm.graph), inputs, current_frame())
        try:
            found.append(graph_key(gm, inputs, names))
        except NotCacheableError:
            found.append(None)
        return gm.forward

    forget_compiled()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return found


@dataclass
class Recorder:
    """A backend that captures through the cache, and counts.

    Attributes:
        path: The cache's folder.
        traced: Graphs that AOTAutograd traced.
        keys: Keys of all graphs.
    """

    path: Path
    traced: int = 0
    keys: list[str | None] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[..., object]:
        original = module.capture

        def counted(*args: object, **kwargs: object) -> object:
            self.traced += 1
            return original(*args, **kwargs)  # type: ignore[arg-type]

        module.capture = counted  # type: ignore[assignment]
        try:
            folder = CacheFolder(self.path)
            _, compiled, key = capture_cached(folder, gm, inputs, reference_executor)
        finally:
            module.capture = original
        self.keys.append(key)
        return compiled

    def run(
        self, function: Callable[..., object], *args: object, dynamic: bool | None = False
    ) -> object:
        """Compile a function as a new process does, and call it without gradients."""
        forget_compiled()
        with torch.no_grad():
            return torch.compile(function, backend=self, dynamic=dynamic)(*args)
