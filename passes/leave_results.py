"""Leave results: what a training step returns besides its loss stays where it was computed.

Logits are large, and a trainer that looks at the loss alone should not pay for them. A result with
dims is returned as a DTensor in the layout that propagation gave it; along an axis where its chunks
are not even, which DTensor may have no placement for, it is gathered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Shard
from rolemesh.compiler.ir.program import Program, tensor_type

__all__ = ["LeaveResults"]


@dataclass(frozen=True)
class LeaveResults:
    """The pass; see the module docstring."""

    name = "leave_results"
    requires = "layouts of all values of a joint Program"
    ensures = "results with dims are pinned where they are, in even chunks"

    def apply(self, program: Program) -> Program:
        """The program with results pinned."""
        pinned = dict(program.pinned)
        for index, (value, output) in enumerate(zip(program.results, program.outputs, strict=True)):
            if output.mutates is not None or output.gradient_of is not None:
                continue
            if isinstance(value, fx.Node) and tensor_type(value).shape:
                pinned[index] = _even(program.layout(value), program.the_mesh)
        return program.after(self.name, pinned=pinned)


def _even(layout: Layout, mesh: Mesh) -> Layout:
    """A layout without its placements that are no even shards."""
    found = layout
    for index, placement in enumerate(layout.placements):
        ranks = math.prod(mesh.sizes[axis] for axis in layout.joint_axes(index))
        if not isinstance(placement, Shard) or placement.size % ranks:
            found = found.replace(index, REPLICATE)
    return found
