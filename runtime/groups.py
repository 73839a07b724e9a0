"""Process groups for the axes of a mesh.

Invariants:

* Groups exist only for a mesh whose size is the world size, and are made once for each mesh and
  default group, in the same order on every rank.
* An axis that spans the world uses the default group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.config import Config, Torchrun

__all__ = ["MeshGroups", "device_mesh_of", "groups_for", "mesh_of", "stand_in_groups", "timeout_of"]


@dataclass(frozen=True)
class MeshGroups:
    """The groups this process belongs to.

    Attributes:
        mesh: The mesh.
        rank: This process's rank in it.
        names: For each axis, the group's name, which functional collectives take.
    """

    mesh: Mesh
    rank: int
    names: Mapping[str, str]


def groups_for(mesh: Mesh | DeviceMesh, config: Config | None = None) -> MeshGroups:
    """The process groups of a mesh, made on the first call.

    All ranks must make the first call together. Under torchrun without an initialised default
    group, this initialises one over gloo. Groups wait for other ranks as long as the default group
    does.

    Args:
        mesh: A mesh over all ranks, or a torch DeviceMesh with named dims, whose own groups are
            used.
        config: Has the timeout of a default group made here; read from the environment if None.

    Raises:
        RolemeshError: RM005 if the mesh does not have as many ranks as the world, RM006 if there
            is no default group and none can be made.
    """
    if isinstance(mesh, DeviceMesh):
        named = mesh_of(mesh)
        names = {axis: mesh.get_group(axis).group_name for axis in named.names}
        return MeshGroups(named, dist.get_rank(), names)
    config = config or Config.read()
    _initialise(mesh, config)
    _check_size(mesh, dist.get_world_size())
    world = dist.group.WORLD
    assert world is not None
    known = _MADE.setdefault(world, {})
    if mesh not in known:
        known[mesh] = _make(mesh, world, config)
    return known[mesh]


def device_mesh_of(groups: MeshGroups) -> DeviceMesh:
    """The torch DeviceMesh over these groups."""
    found = [_resolve_process_group(GroupName(groups.names[axis])) for axis in groups.mesh.names]
    ranks = torch.arange(groups.mesh.size).reshape(groups.mesh.sizes)
    return DeviceMesh.from_group(found, "cpu", mesh=ranks, mesh_dim_names=groups.mesh.names)


@contextmanager
def stand_in_groups(mesh: Mesh, rank: int) -> Iterator[MeshGroups]:
    """Groups as one rank of a mesh would have them, with no other process behind them.

    Inside the block a graph can be lowered for `rank`; nothing can be exchanged. At the end the
    groups are gone.

    Raises:
        RolemeshError: RM006 if this process has a process group, whose place they would take.
    """
    if dist.is_initialized():
        raise RolemeshError(
            "RM006",
            what="this process already is a rank of a process group",
            where=f"mesh {mesh}",
            why="all ranks of the mesh were to run in it",
            fix="run them in a process of their own, or run the ranks as processes",
        )
    # The import registers torch's own backend `fake`.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.size)
    try:
        yield groups_for(mesh)
    finally:
        dist.destroy_process_group()


def mesh_of(device_mesh: DeviceMesh) -> Mesh:
    """The mesh with the names and sizes of a torch DeviceMesh.

    Raises:
        RolemeshError: RM015 if its dims have no names, or its ranks are not numbered row-major
            from 0.
    """
    names = device_mesh.mesh_dim_names
    ranks = device_mesh.mesh
    if names is None:
        raise RolemeshError(
            "RM015",
            what="the DeviceMesh has no dim names",
            where=f"{device_mesh}",
            why="layouts and collectives name the axes of a mesh",
            fix='pass mesh_dim_names, for example init_device_mesh("cpu", (4,), '
            'mesh_dim_names=("tp",))',
        )
    if ranks.flatten().tolist() != list(range(ranks.numel())):
        raise RolemeshError(
            "RM015",
            what="the DeviceMesh does not number its ranks row-major",
            where=f"{device_mesh}",
            why=f"position (i, j) of a mesh is one fixed rank; it holds {ranks.tolist()}",
            fix="make it with init_device_mesh over all ranks",
        )
    return Mesh(dict(zip(names, ranks.shape, strict=True)))


_MADE: WeakKeyDictionary[dist.ProcessGroup, dict[Mesh, MeshGroups]] = WeakKeyDictionary()
"""A cache, not state: groups by default group and mesh. It forgets a destroyed default group."""


def _initialise(mesh: Mesh, config: Config) -> None:
    if dist.is_initialized():
        return
    torchrun = Torchrun.read()
    if torchrun is None:
        raise RolemeshError(
            "RM006",
            what="torch.distributed has no process group",
            where=f"mesh {mesh}",
            why=f"its {mesh.size} ranks are {mesh.size} processes that must be able to talk",
            fix=f"start the program with torchrun --nproc-per-node {mesh.size} PROGRAM.py, or call "
            "torch.distributed.init_process_group() first, or run all ranks in this process with "
            "rolemesh.lockstep",
        )
    _check_size(mesh, torchrun.world_size)
    dist.init_process_group("gloo", timeout=config.delta)


def _check_size(mesh: Mesh, world_size: int) -> None:
    if mesh.size != world_size:
        raise RolemeshError(
            "RM005",
            what=f"the mesh has {mesh.size} ranks, but {world_size} processes run",
            where=f"mesh {mesh}",
            why="every rank of the mesh is one process",
            fix=f"start {mesh.size} processes, or use a mesh of {world_size} ranks",
        )


def _make(mesh: Mesh, world: dist.ProcessGroup, config: Config) -> MeshGroups:
    rank = dist.get_rank()
    names: dict[str, str] = {}
    timeout = timeout_of(world, config)
    for axis in mesh.names:
        for ranks in sorted({mesh.group(axis, member) for member in range(mesh.size)}):
            group: dist.ProcessGroup | None = world
            if len(ranks) != mesh.size:  # every rank takes part in making every group
                made = dist.new_group(list(ranks), timeout=timeout, group_desc=f"mesh:{axis}")
                group = made if isinstance(made, dist.ProcessGroup) else None
            if rank in ranks:
                assert group is not None
                names[axis] = group.group_name
    return MeshGroups(mesh, rank, names)


def timeout_of(group: dist.ProcessGroup, config: Config) -> timedelta:
    """How long a group waits for other ranks; the configured time if it does not say."""
    cpu = torch.device("cpu")
    options = group._get_backend(cpu).options if cpu in group._device_types else None
    return config.delta if options is None else options._timeout
