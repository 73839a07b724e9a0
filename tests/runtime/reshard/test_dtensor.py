"""DTensor placements: boxes against torch's own, there and back."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.manifests import ALL_MESHES, one
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Segment, Segmented, Shard
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.reshard.dtensor import (
    PlacedTensor,
    from_dtensors,
    from_placements,
    to_placements,
)

GRID = Mesh({"dp": 2, "tp": 4})


def placed(shape: tuple[int, ...], *placements: Placement) -> PlacedTensor:
    return PlacedTensor(TensorType(shape, torch.float32), placements)


def torch_local(
    x: torch.Tensor, placements: tuple[Placement, ...], mesh: Mesh, rank: int
) -> torch.Tensor:
    """The local tensor that DTensor gives a rank."""
    for placement, ranks, index in zip(placements, mesh.sizes, mesh.coordinate(rank), strict=True):
        if isinstance(placement, TorchShard | _StridedShard):
            x = placement._split_tensor(x, ranks, with_padding=False)[0][index]
    return x


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mesh, PlacedTensor]:
    mesh = draw(st.sampled_from(ALL_MESHES))
    shape = tuple(
        draw(st.lists(st.sampled_from((1, 2, 3, 5, 6, 8, 12, 16)), min_size=1, max_size=2))
    )
    dims = st.integers(0, len(shape) - 1)
    kinds = st.one_of(
        st.just(Replicate()),
        dims.map(TorchShard),
        st.tuples(dims, st.integers(2, 4)).map(
            lambda pair: _StridedShard(pair[0], split_factor=pair[1])
        ),
    )
    return mesh, placed(shape, *(draw(kinds) for _ in mesh.names))


@settings(max_examples=250)
@given(cases())
def test_boxes_are_those_of_torch(case: tuple[Mesh, PlacedTensor]) -> None:
    mesh, tensor = case
    shape, placements = tensor.type.shape, tensor.placements
    manifest = from_placements(mesh, {"w": tensor})
    found = manifest.tensors["w"].distribution
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for rank, grids in enumerate(found.held):
        local = torch_local(x, placements, mesh, rank)
        if not local.numel():
            assert grids == ()
            continue
        (grid,) = grids
        pick = [
            torch.cat([torch.arange(r.start, r.start + r.length) for r in rs]) for rs in grid.runs
        ]
        assert torch.equal(x[torch.meshgrid(*pick, indexing="ij")], local)
        at = [[r.local + i for r in rs for i in range(r.length)] for rs in grid.runs]
        assert at == [list(range(extent)) for extent in local.shape]  # where DTensor has them
        size, offset = _compute_local_shape_and_global_offset(
            shape, mesh.sizes, list(mesh.coordinate(rank)), placements
        )
        assert tuple(size) == tuple(local.shape)
        assert tuple(offset) == tuple(runs[0].start for runs in grid.runs)
    if found.layout is not None:
        again = from_placements(mesh, {"w": placed(shape, *to_placements(manifest, "w"))})
        assert again == manifest


@pytest.mark.parametrize(
    ("shape", "placements", "layout"),
    [
        ((8, 3), (TorchShard(0), TorchShard(1)), (Shard(0, 1, 8), Shard(1, 1, 3))),
        ((8, 3), (TorchShard(0), TorchShard(0)), (Shard(0, 1, 8), Shard(0, 2, 4))),
        # FSDP over tensor parallelism: tp has the outer chunks.
        (
            (16,),
            (_StridedShard(0, split_factor=4), TorchShard(0)),
            (Shard(0, 4, 4), Shard(0, 1, 16)),
        ),
        ((7,), (Replicate(), TorchShard(0)), (REPLICATE, Shard(0, 1, 7))),
    ],
)
def test_placements_have_layouts(
    shape: tuple[int, ...], placements: tuple[Placement, ...], layout: tuple[Shard, ...]
) -> None:
    manifest = from_placements(GRID, {"w": placed(shape, *placements)})
    assert manifest.tensors["w"].distribution.layout == Layout(layout)
    assert to_placements(manifest, "w") == placements


def test_uneven_nested_chunks_have_boxes_and_no_layout() -> None:
    # torch cuts 9 into 5 and 4, and those into 2, 2, 1 and 1, 1, 1, 1.
    manifest = from_placements(GRID, {"w": placed((9,), TorchShard(0), TorchShard(0))})
    found = manifest.tensors["w"].distribution
    assert found.layout is None
    held = [[tuple(grid.runs[0][0]) for grid in grids] for grids in found.held]
    assert held == [[(0, 2, 0)], [(2, 2, 0)], [(4, 1, 0)], [], *([(n, 1, 0)] for n in range(5, 9))]
    with pytest.raises(RolemeshError, match="DTensor has no placements for w"):
        to_placements(manifest, "w")


@pytest.mark.parametrize(
    "layout",
    [
        Layout((REPLICATE, Owner(2))),
        Layout((REPLICATE, Segmented(0, (Segment(4, 1, 4), Segment(6, 1, 0))))),
        Layout((REPLICATE, Shard(0, 2, 5))),  # chunks of two and one, and pads between
    ],
)
def test_layouts_that_dtensor_lacks_are_refused(layout: Layout) -> None:
    with pytest.raises(RolemeshError, match="DTensor has no placements for w") as raised:
        to_placements(one(GRID, layout, (10,)), "w")
    assert raised.value.code == "RM038"
    assert "on mesh dp=2,tp=4" in str(raised.value)


@pytest.mark.parametrize(
    "placements", [(Replicate(),), (Replicate(), Partial()), (Replicate(), TorchShard(1))]
)
def test_placements_of_no_stored_tensor_are_refused(placements: tuple[Placement, ...]) -> None:
    with pytest.raises(RolemeshError, match="the placements of w are not those of a stored tensor"):
        from_placements(GRID, {"w": placed((4,), *placements)})


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RolemeshError, match="aliases for v, which is no tensor"):
        from_placements(
            GRID, {"w": placed((4,), Replicate(), Replicate())}, aliases={"v": ("head",)}
        )
    with pytest.raises(RolemeshError, match="the manifest has no tensor v"):
        to_placements(one(GRID, Layout((REPLICATE, REPLICATE)), (4,)), "v")


def test_dtensors_tell_shapes_placements_and_ties() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
        weight = distribute_tensor(torch.ones(3, 2), mesh, [TorchShard(0), Replicate()])
        manifest = from_dtensors({"embed": weight, "head": weight}, role="train", generation=4)
        other = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        moved = distribute_tensor(torch.ones(3), other, [Replicate()])
        with pytest.raises(RolemeshError, match="the DTensors are on 2 meshes"):
            from_dtensors({"w": weight, "v": moved})
    finally:
        dist.destroy_process_group()
    assert manifest.mesh == Mesh({"dp": 1, "tp": 1})
    assert (manifest.role, manifest.generation) == ("train", 4)
    assert manifest.tensors["embed"].aliases == ("head",)
    assert manifest.tensors["embed"].type == TensorType((3, 2), torch.float32)
