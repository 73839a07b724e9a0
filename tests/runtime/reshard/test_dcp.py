"""Checkpoint metadata of torch.distributed.checkpoint: there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from tests.manifests import one, random_manifest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rolemesh.compiler.ir.boxes import Distribution, Run
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Shard
from rolemesh.runtime.reshard.dcp import files_of, from_checkpoint, to_checkpoint
from rolemesh.runtime.reshard.plan import plan_reshard


def checkpoint(*chunks: tuple[int, int, str], size: int = 6) -> Metadata:
    """A checkpoint of one vector `w`, from first indices, lengths and files of its chunks."""
    boxes = [ChunkStorageMetadata(torch.Size([at]), torch.Size([n])) for at, n, _ in chunks]
    entry = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([size]), boxes)
    storage = {
        MetadataIndex("w", box.offsets): _StorageInfo(file, 0, 0)
        for box, (_, _, file) in zip(boxes, chunks, strict=True)
        if file
    }
    return Metadata({"w": entry}, storage_data=storage)


def test_chunks_are_local_tensors_of_the_ranks_of_their_files() -> None:
    found = checkpoint((0, 2, "__1_0.distcp"), (2, 3, "__0_0.distcp"), (5, 1, "__1_0.distcp"))
    manifest = from_checkpoint(found, role="train", generation=3)
    assert files_of(found) == ("__0_0.distcp", "__1_0.distcp")
    assert manifest.mesh == Mesh({"file": 2})
    assert manifest.tensors["w"].dtype == torch.bfloat16
    held = manifest.tensors["w"].distribution.held
    assert [[grid.runs for grid in grids] for grids in held] == [
        [((Run(2, 3, 0),),)],
        [((Run(0, 2, 0),),), ((Run(5, 1, 0),),)],
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_written_checkpoint_reshards(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(12.0).reshape(4, 3), "scale": torch.tensor(2.0)}
    dcp.save({**tensors, "step": 3}, checkpoint_id=tmp_path, no_dist=True)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    source = from_checkpoint(metadata)
    assert sorted(source.tensors) == ["scale", "w"]
    target = one(Mesh({"tp": 3}), Layout((Shard(0, 1, 4),)), (4, 3))
    plan = plan_reshard(source, target, processes={})
    assert plan.moved_bytes == 4 * 3 * 4


@given(st.data(), st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), max_size=3))
def test_every_element_is_in_one_chunk(data: st.DataObject, shapes: list[tuple[int, ...]]) -> None:
    manifest = random_manifest(lambda options: data.draw(st.sampled_from(options)), shapes)
    for name, entry in to_checkpoint(manifest).items():
        kind = manifest.tensors[name].type
        assert (tuple(entry.size), entry.properties.dtype) == kind
        count = torch.zeros(kind.shape)
        for chunk in entry.chunks:
            box = zip(chunk.offsets, chunk.sizes, strict=True)
            count[tuple(slice(at, at + n) for at, n in box)] += 1
        assert (count == 1).all()


def test_chunks_are_cut_as_ranks_hold_them() -> None:
    mesh = Mesh({"dp": 2, "tp": 3})
    found = to_checkpoint(one(mesh, Layout((REPLICATE, Shard(0, 1, 7))), (7, 2)))["w"]
    assert [(list(c.offsets), list(c.sizes)) for c in found.chunks] == [
        ([0, 0], [3, 2]),
        ([3, 0], [3, 2]),
        ([6, 0], [1, 2]),
    ]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (checkpoint((0, 6, "")), "a chunk of w is in no file"),
        (checkpoint((0, 2, "a"), (3, 3, "b")), "no rank holds all of w"),
        (checkpoint((0, 7, "a")), "a chunk of w lies outside of the tensor"),
        (checkpoint(), "no rank holds all of w"),
    ],
)
def test_what_makes_up_no_tensor_is_refused(metadata: Metadata, expected: str) -> None:
    with pytest.raises(RolemeshError, match=expected) as raised:
        from_checkpoint(metadata)
    assert raised.value.code == "RM038"


def test_storage_without_files_is_refused() -> None:
    metadata = checkpoint((0, 6, "a"))
    metadata.storage_data = dict.fromkeys(metadata.storage_data, "elsewhere")
    with pytest.raises(RolemeshError, match="does not say which files it has"):
        from_checkpoint(metadata)


def test_a_tensor_that_no_rank_holds_is_refused() -> None:
    lost = StoredTensor(torch.float32, Distribution((2,), None, ((), ())))
    with pytest.raises(RolemeshError, match="no rank holds all of w"):
        to_checkpoint(Manifest(Mesh({"tp": 2}), {"w": lost}))
