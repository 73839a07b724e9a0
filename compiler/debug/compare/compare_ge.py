"""The single device against the ranks' GE graphs.

Every rank's graph runs on the reference executor, the ranks' collectives meeting in this process.
An op of a GE graph says which fx node it was converted from, and lowering keeps the names of the
Program's nodes: what bears such a name, and has as many elements, is compared. What is not: the ops
of a node's decomposition but the last, ops that fusions took in, and what only GE has. Outputs are
compared in any case.

Values with memory in them that nobody has written to are left out too: GE fills it otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rolemesh.compiler.debug.compare.reference import Reference
from rolemesh.compiler.debug.compare.reports import Collector, StageReport
from rolemesh.compiler.debug.compare.stages import PhaseRun
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.targets import target
from rolemesh.runtime.ge.graph import Node
from rolemesh.runtime.ge.ranks import GeRanks
from rolemesh.runtime.lockstep import scatter_inputs

__all__ = ["GE", "compare_ge"]

GE = "ge"
"""The name of the stage."""


def compare_ge(
    run: PhaseRun,
    right: Reference,
    options: GeOptions,
    tolerance: float,
    rank: int | None = None,
) -> StageReport:
    """Compare the GE graphs of all ranks.

    Args:
        run: The stages and inputs; all passes must have run.
        right: What the single device computes.
        options: Options of the target.
        tolerance: As in `rolemesh.compiler.command.compare.difference`.
        rank: The only rank whose part is compared; None for all, and the whole values.

    Raises:
        RolemeshError: What lowering raises, and what a graph raises as it runs.
    """
    program = run.at(list(run.programs)[-1])
    ranks = GeRanks(program, target(GE), options)
    watches = [_Watch() for _ in ranks.engines]
    for engine, watch in zip(ranks.engines, watches, strict=True):
        engine.observe = watch
    outputs = ranks(scatter_inputs(program, run.inputs, poison=run.poison))
    collect = Collector(program, right, tolerance, rank)
    for node in program.ops:
        wanted, layouts = right.find(node), program.layouts.get(node)
        if wanted is None or not layouts or len(wanted) != 1 or not _written(wanted[0]):
            collect.add(node, (), None)
            continue
        local = layouts[0].local_shape(wanted[0].shape, program.the_mesh)
        found = [watch.tensor(node.name, local, wanted[0].dtype) for watch in watches]
        collect.add(node, found, None if any(one is None for one in found) else wanted)
    collect.outputs(lambda index: outputs[index])
    return collect.made(GE, "the ranks' GE graphs")


@dataclass
class _Watch:
    """Keeps what the ops of one rank's graph gave, by the fx node that they were converted from."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, node: Node, results: tuple[torch.Tensor, ...]) -> None:
        for desc, tensor in zip(node.outputs, results, strict=True):
            origin, _, output = desc.fx_name.partition(".OUTPUT.")
            if origin and output == "0":
                self.values[origin.partition("-")[0]] = tensor.clone()

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """The value of a node, if there is one that can be it; GE knows scalars as one element."""
        value = self.values.get(name)
        if value is None or value.dtype != dtype or torch.Size(shape).numel() != value.numel():
            return None
        return value.reshape(tuple(shape))


def _written(value: torch.Tensor) -> bool:
    """Whether a value holds nothing that `known_memory` put there."""
    if value.is_floating_point():
        return not bool(value.isnan().any())
    return value.dtype is torch.bool or not bool((value == torch.iinfo(value.dtype).max).any())
