"""Leave results: what a training step returns besides its loss stays where it was computed.

Logits are large, and a trainer that looks at the loss alone should not pay for them. A result with
dims is returned as a DTensor in the layout that propagation gave it, if DTensor has one for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Replicate, Shard
from rolemesh.compiler.ir.program import Program, tensor_type

__all__ = ["LeaveResults"]


@dataclass(frozen=True)
class LeaveResults:
    """The pass; see the module docstring."""

    name = "leave_results"
    requires = "layouts of all values of a joint Program"
    ensures = "results with dims are pinned where they are, if they lie in even chunks"

    def apply(self, program: Program) -> Program:
        """The program with results pinned."""
        pinned = dict(program.pinned)
        for index, (value, output) in enumerate(zip(program.results, program.outputs, strict=True)):
            if output.mutates is not None or output.gradient_of is not None:
                continue
            if isinstance(value, fx.Node) and tensor_type(value).shape:
                layout = program.layout(value)
                if _is_even(layout, program.the_mesh):
                    pinned[index] = layout
        return program.after(self.name, pinned=pinned)


def _is_even(layout: Layout, mesh: Mesh) -> bool:
    for index, placement in enumerate(layout.placements):
        if isinstance(placement, Replicate):
            continue
        ranks = math.prod(mesh.sizes[axis] for axis in layout.joint_axes(index))
        if not isinstance(placement, Shard) or placement.size % ranks:
            return False
    return True
