"""What a pass is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rolemesh.compiler.ir.program import Program

__all__ = ["Pass", "collection_paused"]


class Pass(Protocol):
    """A function from Program to Program; a frozen dataclass whose fields are its options.

    A pass never changes the Program it is given, nor its graph; the new Program may share the
    graph if the pass did not need another one. It adds nodes by `rolemesh.compiler.ir.nodes`.
    """

    @property
    def name(self) -> str:
        """Name in histories and on the command line."""
        ...

    @property
    def requires(self) -> str:
        """What must hold of the Program given, in words for the developer of passes."""
        ...

    @property
    def ensures(self) -> str:
        """What holds of the Program returned, in the same words."""
        ...

    def apply(self, program: Program) -> Program:
        """The new Program, with this pass in its history."""
        ...


@contextmanager
def collection_paused() -> Iterator[None]:
    """Run passes without garbage collection.

    Graphs are many small objects that refer to each other and stay alive. Every collection while
    one is built walks all of them and frees nothing, so that time would grow faster than the graph.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
