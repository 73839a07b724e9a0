"""Slots as rows of the cache tensors, read and written outside of programs, where their bytes are.

In lock-step the tables hold everything. Where ranks are processes a table is a ghost and its bytes
are this rank's shard in the store; rows and tokens are whole in every shard, so a row is zeroed or
copied on each rank alone. Only a slot's export puts the ranks' parts together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rolemesh.compiler.engine.cache import CachePlan, Tables
from rolemesh.compiler.engine.ghosts import ghost
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Segmented, Shard
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.lowering.chunks import assemble, scatter_one
from rolemesh.runtime.groups import MeshGroups
from rolemesh.runtime.store import Stored, default_store

__all__ = ["CacheRows", "SlotState"]


@dataclass(frozen=True)
class SlotState:
    """What a slot holds, whole and on its own.

    Attributes:
        length: Number of tokens.
        position: Position id of the next token.
        tensors: By name, a slot's part of each cache tensor: `[heads, length, width]` for keys and
            values, `[length, width]` for index keys, the whole state of other layers.
    """

    length: int
    position: int
    tensors: Mapping[str, torch.Tensor]


class CacheRows:
    """The cache tensors of one replica.

    Args:
        plan: Which tensors.
        device: Where.
        groups: The process groups of the mesh; None if all ranks run in this process.
        axis: The mesh axis that caches may be split over.
    """

    def __init__(
        self, plan: CachePlan, device: torch.device, groups: MeshGroups | None, axis: str
    ) -> None:
        self.plan = plan
        self.groups = groups
        self.axis = axis
        self.tables: Tables = {
            name: ghost(tensor.shape, tensor.dtype, device)
            if groups is not None
            else torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            for name, tensor in plan.tensors.items()
        }

    def place(self, program: Program, inputs: list[torch.Tensor]) -> None:
        """Give the tables that a new Program reads their bytes on this rank, once.

        Args:
            program: A Program with layouts.
            inputs: Its inputs.

        Raises:
            RolemeshError: RM018 if the Program splits a table by slots or by tokens.
        """
        if self.groups is None:
            return
        store = default_store()
        names = {id(table): name for name, table in self.tables.items()}
        for node, entry, tensor in zip(program.placeholders, program.inputs, inputs, strict=True):
            name = names.get(id(tensor))
            if name is None or store.find(tensor) is not None:
                continue
            layout, shape = program.layout(node), tensor_type(node).shape
            self._check(name, layout)
            local = torch.zeros(
                layout.local_shape(shape, program.the_mesh),
                dtype=tensor.dtype,
                device=tensor.device,
            )
            store.put(tensor, entry.name, layout, program.the_mesh, local)

    def _check(self, name: str, layout: Layout) -> None:
        whole = (0, self.plan.tensors[name].token_dim)
        for placement in layout.placements:
            if isinstance(placement, Shard | Segmented) and placement.dim in whole:
                raise RolemeshError(
                    "RM018",
                    f"cache tensor {name} is split along dim {placement.dim}",
                    where="annotations of rolemesh.Engine",
                    why="slots are copied and emptied on each rank alone",
                    fix="split caches along heads only",
                )

    @property
    def bytes(self) -> int:
        """Bytes of the tables on this rank."""
        return sum(self._local(name).nbytes for name in self.tables)

    def clear(self, slot: int) -> None:
        """Zero a slot."""
        for name in self.tables:
            self._local(name)[slot].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a slot to another one."""
        for name, plan in self.plan.tensors.items():
            local = self._local(name)
            if plan.token_dim is None:
                local[target].copy_(local[source])
            else:
                taken = local[source].narrow(plan.token_dim - 1, 0, length)
                local[target].narrow(plan.token_dim - 1, 0, length).copy_(taken)

    def read(self, slot: int, length: int) -> dict[str, torch.Tensor]:
        """A slot's part of every table, whole. All ranks of a replica must make the call."""
        found = {}
        for name, plan in self.plan.tensors.items():
            part = self._local(name)[slot : slot + 1]
            if plan.token_dim is not None:
                part = part.narrow(plan.token_dim, 0, length)
            found[name] = self._whole(name, part, length)[0].clone()
        return found

    def write(self, slot: int, tensors: Mapping[str, torch.Tensor], length: int) -> None:
        """Fill a slot with what `read` returned, here or in an engine of another role."""
        for name, plan in self.plan.tensors.items():
            value = tensors[name].unsqueeze(0).to(self.tables[name].device)
            stored = self._stored(name)
            if stored is not None:
                axis_layout, mesh, index = self._along_axis(stored)
                value = scatter_one(value, axis_layout, mesh, index)
            row = self._local(name)[slot : slot + 1]
            if plan.token_dim is not None:
                row = row.narrow(plan.token_dim, 0, length)
            row.copy_(value)

    def _stored(self, name: str) -> Stored | None:
        return None if self.groups is None else default_store().find(self.tables[name])

    def _local(self, name: str) -> torch.Tensor:
        if self.groups is None:
            return self.tables[name]
        stored = self._stored(name)
        assert stored is not None, "the engine compiles a program before slots are used"
        return stored.local

    def _along_axis(self, stored: Stored) -> tuple[Layout, Mesh, int]:
        """A stored tensor's layout along the role's axis alone, and this rank's place there."""
        assert self.groups is not None
        index = stored.mesh.index(self.axis)
        mesh = Mesh({self.axis: stored.mesh.sizes[index]})
        place = stored.mesh.coordinate(self.groups.rank)[index]
        return Layout((stored.layout.placements[index],)), mesh, place

    def _whole(self, name: str, part: torch.Tensor, length: int) -> torch.Tensor:
        stored = self._stored(name)
        if stored is None:
            return part
        layout, mesh, _ = self._along_axis(stored)
        if not isinstance(layout.placements[0], Shard | Segmented):
            return part
        assert self.groups is not None
        plan = self.plan.tensors[name]
        shape = [1, *plan.shape[1:]]
        if plan.token_dim is not None:
            shape[plan.token_dim] = length
        parts = [part.new_empty(part.shape) for _ in range(mesh.size)]
        group_name = dist.distributed_c10d.GroupName(self.groups.names[self.axis])
        group = dist.distributed_c10d._resolve_process_group(group_name)
        dist.all_gather(parts, part.contiguous(), group=group)
        return assemble(parts, layout, tuple(shape), mesh)
