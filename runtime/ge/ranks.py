"""All ranks of a Program in this process, each on its own lowered graph.

Unlike `runtime.lockstep`, which runs the Program's nodes, this runs what the ranks would run: every
rank's graph is bound, lowered and called as a process would, and the ranks' collectives meet in
this process. Nothing of torch.distributed is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import sympy
import torch

from rolemesh.compiler.ir.program import Program
from rolemesh.lowering.bind import bind
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Examples
from rolemesh.lowering.targets import Runnable, Target
from rolemesh.runtime.ge.communicator import Communicator, Request
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.ge.rendezvous import run_ranks
from rolemesh.runtime.groups import stand_in_groups

__all__ = ["GeRanks", "Observer"]

Observer = Callable[[int, Request, int], None]
"""Called for each collective of each rank: the rank, the request, bytes of the wire."""


class GeRanks:
    """A Program lowered to GE graphs, one for each rank.

    Args:
        program: A partitioned Program.
        target: The target; it makes GE graphs.
        options: Its options.
        values: Values of the symbols of the Program's sizes to lower by, an example.

    Attributes:
        saved: For each rank what the target saves of its graph; None if it saves nothing.

    Raises:
        RolemeshError: RM006 if this process is a rank of a process group, and what lowering raises.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        options: GeOptions,
        values: Mapping[sympy.Symbol, int] | None = None,
    ) -> None:
        self.program = program
        self.lines = [_Line(rank) for rank in range(program.the_mesh.size)]
        self.engines = [ReferenceEngine(line, seed=options.order_seed) for line in self.lines]
        self.ranks: list[Runnable] = []
        self.examples: list[Examples] = []
        mesh = program.the_mesh
        for rank in range(mesh.size):
            with stand_in_groups(mesh, rank) as groups:
                module = bind(program, rank, groups.names)
                examples = Examples(program, rank, values)
                signature = Signature.of(program, rank)
                self.ranks.append(target.lower(module, examples.inputs, signature, options))
                self.examples.append(examples)
        self.saved: list[Mapping[str, object] | None] = [
            getattr(run, "saved", None) for run in self.ranks
        ]

    def serves(self, values: Mapping[sympy.Symbol, int]) -> bool:
        """Whether the graphs are right for these values of the symbols of their sizes."""
        return self.program.fits(values) and all(one.hold(values) for one in self.examples)

    def __call__(
        self,
        inputs: Sequence[Sequence[torch.Tensor]],
        observer: Observer | None = None,
        values: Mapping[sympy.Symbol, int] = MappingProxyType({}),
    ) -> list[list[torch.Tensor | None]]:
        """Run all ranks.

        Args:
            inputs: For each input, the local tensor of each rank; mutated ones are updated.
            observer: Told of every collective.
            values: The value of every symbol of the Program's sizes.

        Returns:
            For each output, the local tensor of each rank.
        """

        def run(rank: int, communicator: Communicator) -> tuple[torch.Tensor | None, ...]:
            line = self.lines[rank]
            line.communicator, line.observer = communicator, observer
            with running_on(self.engines[rank]):
                locals_ = [of_ranks[rank] for of_ranks in inputs]
                return self.ranks[rank](*locals_, *values.values())

        outputs = run_ranks(len(self.ranks), run)
        return [list(of_ranks) for of_ranks in zip(*outputs, strict=True)]


@dataclass
class _Line:
    """What a rank's graph, loaded once, exchanges through: the communicator of the present run."""

    rank: int
    communicator: Communicator | None = None
    observer: Observer | None = None

    def exchange(self, request: Request, wire: torch.Tensor) -> torch.Tensor:
        """Report, and take part."""
        assert self.communicator is not None, "a graph runs in __call__ only"
        if self.observer is not None:
            self.observer(self.rank, request, wire.nbytes)
        return self.communicator.exchange(request, wire)
