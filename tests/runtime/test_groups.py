"""Groups for the axes of a mesh, and the errors of a world that does not fit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.runtime.groups import groups_for, mesh_of


@pytest.fixture
def world() -> Iterator[int]:
    """A world of 4 ranks, of which this is rank 1, without traffic."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield 4
    dist.destroy_process_group()


def ranks_of(name: str) -> list[int]:
    return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))


def test_one_axis_uses_the_default_group(world: int) -> None:
    groups = groups_for(Mesh({"tp": world}))
    assert groups.rank == 1
    assert dist.group.WORLD is not None
    assert groups.names == {"tp": dist.group.WORLD.group_name}


def test_two_axes(world: int) -> None:
    groups = groups_for(Mesh({"dp": 2, "tp": 2}))
    assert ranks_of(groups.names["tp"]) == [0, 1]
    assert ranks_of(groups.names["dp"]) == [1, 3]


def test_groups_are_made_once(world: int) -> None:
    first = groups_for(Mesh({"dp": 2, "tp": 2}))
    assert groups_for(Mesh({"dp": 2, "tp": 2})) is first
    assert groups_for(Mesh({"tp": 2, "dp": 2})) is not first


def test_groups_do_not_outlive_the_world() -> None:
    found = []
    for _ in range(2):
        dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
        found.append(groups_for(Mesh({"tp": 4})))
        dist.destroy_process_group()
    assert found[0] is not found[1]


def test_a_device_mesh_brings_its_own_groups(world: int) -> None:
    device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    groups = groups_for(device_mesh)
    assert groups.mesh == Mesh({"dp": 2, "tp": 2})
    assert groups.names["tp"] == device_mesh.get_group("tp").group_name
    assert ranks_of(groups.names["dp"]) == [1, 3]


def test_a_device_mesh_needs_names(world: int) -> None:
    with pytest.raises(RolemeshError) as caught:
        mesh_of(DeviceMesh("cpu", [0, 1, 2, 3]))
    assert caught.value.code == "RM015"
    assert 'mesh_dim_names=("tp",)' in caught.value.fix


def test_a_device_mesh_in_another_order_is_refused(world: int) -> None:
    with pytest.raises(RolemeshError) as caught:
        mesh_of(DeviceMesh("cpu", [1, 0, 2, 3], mesh_dim_names=("tp",)))
    assert caught.value.code == "RM015"
    assert "it holds [1, 0, 2, 3]" in caught.value.why


def test_mesh_of_another_size(world: int) -> None:
    with pytest.raises(RolemeshError) as caught:
        groups_for(Mesh({"dp": 2, "tp": 4}))
    assert str(caught.value) == (
        "[RM005] the mesh has 8 ranks, but 4 processes run\n"
        "  where: mesh dp=2,tp=4\n"
        "  why: every rank of the mesh is one process\n"
        "  fix: start 8 processes, or use a mesh of 4 ranks"
    )


def test_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RolemeshError) as caught:
        groups_for(Mesh({"tp": 4}))
    assert str(caught.value) == (
        "[RM006] torch.distributed has no process group\n"
        "  where: mesh tp=4\n"
        "  why: its 4 ranks are 4 processes that must be able to talk\n"
        "  fix: start the program with torchrun --nproc-per-node 4 PROGRAM.py, or call "
        "torch.distributed.init_process_group() first, or run all ranks in this process with "
        "rolemesh.lockstep"
    )


def test_torchrun_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "ROLEMESH_TIMEOUT": "17",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RolemeshError, match="RM005"):
        groups_for(Mesh({"tp": 2}))
    assert not dist.is_initialized()
    groups = groups_for(Mesh({"tp": 1}))
    try:
        assert ranks_of(groups.names["tp"]) == [0]
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()
