"""The engine that runs GE graphs where there is no NPU."""

from __future__ import annotations

from rolemesh.lowering.ge.engine import LoadedGraph
from rolemesh.runtime.ge.communicator import Communicator
from rolemesh.runtime.ge.executor import Executor, Observer
from rolemesh.runtime.ge.graph import Graph, dtype_name, malformed
from rolemesh.runtime.ge.ops.all import OPS
from rolemesh.runtime.ge.ops.table import GE_DTYPES
from rolemesh.runtime.ge.parse import parse_graph

__all__ = ["ReferenceEngine"]


class ReferenceEngine:
    """Makes GE graphs ready to run on CPU tensors; an `Engine` of `lowering.ge.engine`.

    A graph keeps the communicator of the engine that it was loaded with.

    Args:
        communicator: Makes the exchanges of collectives; None if graphs have none.
        seed: See `Executor`.
        check: See `Executor`.
        observe: See `Executor`.
    """

    def __init__(
        self,
        communicator: Communicator | None = None,
        seed: int | None = None,
        check: bool = True,
        observe: Observer | None = None,
    ) -> None:
        self.communicator = communicator
        self.seed = seed
        self.check = check
        self.observe = observe

    def load(self, graph: LoadedGraph) -> Executor:
        """Check a graph and prepare it.

        Raises:
            RolemeshError: RM027 for a malformed graph, RM028 for ops that the engine does not know,
                RM030 for collectives without a communicator.
        """
        parsed = parse_graph(graph.model)
        _check_interface(parsed, graph)
        return Executor(
            parsed,
            OPS,
            self.communicator,
            seed=self.seed,
            check=self.check,
            observe=self.observe,
        )


def _check_interface(parsed: Graph, graph: LoadedGraph) -> None:
    """Refuse a graph whose inputs and results are not those that torchair announced."""
    where = f"graph {graph.name!r}"
    if len(graph.placements) != len(parsed.data):
        raise malformed(
            f"a graph has {len(parsed.data)} inputs, {len(graph.placements)} were announced",
            where,
            "there is one placement for each Data op",
        )
    announced = [GE_DTYPES.get(number) for number in graph.output_dtypes]
    found = [desc.dtype for desc in parsed.net_output.input_descs]
    if announced != found:
        raise malformed(
            f"a graph's results are {', '.join(map(dtype_name, found)) or 'none'}; announced were "
            f"{', '.join(map(dtype_name, announced)) or 'none'}",
            where,
            "they are the inputs of NetOutput",
        )
