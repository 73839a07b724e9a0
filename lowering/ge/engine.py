"""What stands behind torchair's native boundary: an engine that runs GE graphs.

With CANN, torchair's own native modules hand graphs to the device, and nothing here is used.
Without it, `lowering.ge.native` takes their place and hands each graph to the engine in force.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Engine", "Executable", "LoadedGraph", "engine_in_force", "running_on"]


@dataclass(frozen=True)
class LoadedGraph:
    """A GE graph as torchair hands it over.

    Attributes:
        name: Name torchair gave the graph.
        model: Serialized `ModelDef`; its first graph is the graph.
        options: Compile options, such as `ge.exec.outputReuseMemIndexes`.
        placements: For each input, 0 for host and 1 for device memory.
        output_dtypes: For each output, its `torchair.ge.DataType` number.
        on_device: Whether the graph is meant for the NPU rather than for the host.
        input_shapes: For each input, its shape; -1 is a dynamic dim.
        output_shapes: For each output, likewise.
    """

    name: str
    model: bytes
    options: Mapping[str, str]
    placements: tuple[int, ...]
    output_dtypes: tuple[int, ...]
    on_device: bool
    input_shapes: tuple[tuple[int, ...], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()


class Executable(Protocol):
    """A GE graph that is ready to run."""

    def run(
        self, inputs: Sequence[torch.Tensor], assigned: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor]:
        """Run once.

        Args:
            inputs: One tensor per Data op, by its index. Ops that write to Data change them.
            assigned: For each output the tensor that takes it, or None; empty if there are none.

        Returns:
            One tensor per NetOutput input; the assigned one where there is one.
        """


class Engine(Protocol):
    """Makes graphs ready to run."""

    def load(self, graph: LoadedGraph) -> Executable:
        """Check a graph and prepare it.

        Raises:
            RolemeshError: RM027 for a malformed graph, RM028 for ops that the engine does not know.
        """


_ENGINE: ContextVar[Engine | None] = ContextVar("rolemesh_ge_engine", default=None)


@contextmanager
def running_on(engine: Engine) -> Iterator[None]:
    """Let graphs that torchair compiles and runs inside the block run on `engine`."""
    token = _ENGINE.set(engine)
    try:
        yield
    finally:
        _ENGINE.reset(token)


def engine_in_force() -> Engine:
    """The engine of the present context.

    Raises:
        RolemeshError: RM025 if there is none.
    """
    engine = _ENGINE.get()
    if engine is None:
        raise RolemeshError(
            "RM025",
            what="no engine runs GE graphs here",
            where="torchair without CANN",
            why="the graph was converted on a machine without an NPU and is called directly",
            fix="run it through rolemesh (target ge), or inside rolemesh's reference_engine()",
        )
    return engine
