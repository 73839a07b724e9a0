"""Checkpoints resharded on disk, element by element, and how much memory and disk that takes."""

from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.manifests import numbered, one, random_manifest, scattered
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as TorchShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import rolemesh
from rolemesh.compiler.ir.boxes import Distribution, Grid, Run, distribute
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, Part, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Shard
from rolemesh.runtime.reshard.checksums import read_checksums, sums_of
from rolemesh.runtime.reshard.inputs import InputFile
from rolemesh.runtime.reshard.reshard import reshard

LINE = Mesh({"tp": 3})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def require_rank_files(folder: Path, manifest: Manifest) -> None:
    """Every rank's file has what the store would cut for it, and zeros in pads."""
    expected = scattered(manifest)
    for rank in range(manifest.mesh.size):
        found = load_file(folder / f"rank-{rank:05d}-of-{manifest.mesh.size:05d}.safetensors")
        for name, tensor in manifest.tensors.items():
            if not tensor.distribution.held[rank]:
                assert name not in found
                continue
            real = expected[name][rank]
            assert found[name].dtype == real.dtype
            assert torch.equal(found[name], real.nan_to_num(0.0))
            del found[name]
        assert not found


def plain_file(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@settings(max_examples=15)
@given(
    st.data(),
    st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=3),
    st.sampled_from([16, 100, 3000, 1 << 20]),
)
def test_every_element_gets_to_its_place(
    data: st.DataObject, shapes: list[tuple[int, ...]], staging: int
) -> None:
    def choose(options: object) -> object:
        return data.draw(st.sampled_from(options))  # type: ignore[arg-type]

    first, second = random_manifest(choose, shapes), random_manifest(choose, shapes)
    whole = {name: numbered(tensor) for name, tensor in first.tensors.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = plain_file(folder / "plain", whole)
        done = reshard(plain, first, folder / "first", staging=staging)
        require_rank_files(folder / "first", first)
        assert done.plan.kept_bytes == 0, "a file of whole tensors is nobody's"
        done = reshard(folder / "first", second, folder / "second", staging=staging)
        require_rank_files(folder / "second", second)
        assert done.plan.digest == rolemesh.plan_reshard(first, second, staging=staging).digest
        reshard(folder / "second", first, folder / "dcp", file_format="dcp", staging=staging)
        reshard(folder / "dcp", "safetensors", folder / "back", staging=staging)
        found = load_file(folder / "back" / "model.safetensors")
        assert found.keys() == whole.keys()
        for key, tensor in whole.items():
            assert torch.equal(found[key], tensor)
            assert found[key].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_formats_are_those_of_their_libraries(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = {
        "w": torch.arange(77).reshape(7, 11).to(dtype),
        "scale": torch.ones((), dtype=dtype),
        "none": torch.zeros(0, 3, dtype=dtype),
    }
    dcp.save(dict(whole), checkpoint_id=tmp_path / "torch", no_dist=True)
    target = Manifest(
        LINE,
        {
            name: StoredTensor(dtype, distribute(layout, tuple(whole[name].shape), LINE))
            for name, layout in {
                "w": Layout((Shard(1, 1, 11),)),
                "scale": Layout((Owner(1),)),
                "none": Layout((REPLICATE,)),
            }.items()
        },
    )
    rolemesh.reshard(tmp_path / "torch", target, tmp_path / "ranks")
    rolemesh.reshard(tmp_path / "ranks", target, tmp_path / "dcp", file_format="dcp")
    found = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    done = rolemesh.reshard(tmp_path / "dcp", "safetensors", tmp_path / "plain", shard_bytes=9)
    assert len(done.files) == 2
    for file in done.files:
        for name, tensor in load_file(tmp_path / "plain" / file).items():
            assert torch.equal(tensor, whole[name])
            assert torch.equal(found[name], whole[name])
    rolemesh.reshard(tmp_path / "plain", "dcp", tmp_path / "alone")
    found = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    dcp.load(found, checkpoint_id=tmp_path / "alone", no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_loads_what_is_written_on_another_mesh(tmp_path: Path, rank: int) -> None:
    whole = torch.randn(8, 10)
    plain_file(tmp_path / "plain", {"w": whole})
    uneven = one(LINE, Layout((Shard(0, 1, 8),)), (8, 10))
    reshard(tmp_path / "plain", uneven, tmp_path / "dcp", file_format="dcp")
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        placements = [TorchShard(0), TorchShard(1)]
        local = DTensor.from_local(torch.zeros(4, 5), mesh, placements, run_check=False)
        dcp.load({"w": local}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    finally:
        dist.destroy_process_group()
    row, column = divmod(rank, 2)
    expected = whole[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
    assert torch.equal(local.to_local(), expected)


def test_packed_weights_are_put_together_and_taken_apart(tmp_path: Path) -> None:
    """Along a dim that is not the first, from tensors in two files, and under another name."""
    gate, up = torch.randn(3, 5, 2), torch.randn(3, 4, 2)
    embed = torch.randn(6, 2)
    plain_file(tmp_path / "plain", {"gate": gate, "up": up, "embed": embed})
    alone = Mesh({"tp": 2})
    parts = (Part("gate", 1, 0, 5), Part("up", 1, 5, 4))
    packed = StoredTensor(
        torch.float32, distribute(Layout((Shard(0, 1, 3),)), (3, 9, 2), alone), (), parts
    )
    head = StoredTensor(
        torch.float32, distribute(Layout((REPLICATE,)), (6, 2), alone), ("embed",), ()
    )
    target = Manifest(alone, {"gate_up": packed, "head": head})
    for staging in (48, 1 << 20):
        out = tmp_path / f"packed{staging}"
        reshard(tmp_path / "plain", target, out, staging=staging)
        found = load_file(out / "rank-00000-of-00002.safetensors")
        assert torch.equal(found["gate_up"], torch.cat([gate, up], 1)[:2])
        assert torch.equal(found["head"], embed)
    apart = Manifest(
        LINE,
        {
            n: one(LINE, Layout((Shard(1, 1, t.shape[1]),)), t.shape, n).tensors[n]
            for n, t in {"gate": gate, "up": up}.items()
        },
    )
    reshard(out, apart, tmp_path / "apart")
    reshard(tmp_path / "apart", "safetensors", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(found["gate"], gate)
    assert torch.equal(found["up"], up)


def test_runs_in_any_order(tmp_path: Path) -> None:
    """A foreign manifest may list a rank's rows from the last to the first."""
    whole = torch.randn(6, 3)
    plain_file(tmp_path / "plain", {"w": whole})
    back = (Run(4, 2, 0), Run(0, 3, 2))
    held = (Grid((5, 3), (back, (Run(0, 3, 0),))),)
    columns = (Run(0, 3, 0),)
    rest = (Grid((1, 3), ((Run(3, 1, 0),), columns)), Grid((1, 3), ((Run(0, 1, 0),), columns)))
    found = Distribution((6, 3), None, (held, rest))
    target = Manifest(Mesh({"tp": 2}), {"w": StoredTensor(torch.float32, found)})
    reshard(tmp_path / "plain", target, tmp_path / "out", staging=40)
    local = load_file(tmp_path / "out" / "rank-00000-of-00002.safetensors")
    assert torch.equal(local["w"], torch.cat([whole[4:], whole[:3]]))
    local = load_file(tmp_path / "out" / "rank-00001-of-00002.safetensors")
    assert torch.equal(local["w"], whole[3:4])
    assert torch.equal(local["w[1]"], whole[:1])
    sums = read_checksums(tmp_path / "out")
    assert sums is not None
    for name, recorded in sums.files.items():
        assert sums_of(tmp_path / "out" / name, sums.block) == recorded


def test_memory_is_bounded(tmp_path: Path) -> None:
    whole = {f"w{n}": torch.randn(1024, 768) for n in range(8)}
    plain = plain_file(tmp_path / "plain", whole)
    mesh = Mesh({"fsdp": 4})
    rows = Manifest(
        mesh, {n: one(mesh, Layout((Shard(0, 1, 1024),)), (1024, 768), n).tensors[n] for n in whole}
    )
    columns = Manifest(
        LINE, {n: one(LINE, Layout((Shard(1, 1, 768),)), (1024, 768), n).tensors[n] for n in whole}
    )
    reshard(plain, rows, tmp_path / "rows")
    staging = 2 << 20
    tracemalloc.start()
    try:
        reshard(tmp_path / "rows", columns, tmp_path / "columns", staging=staging)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Beside tensors: a quarter megabyte to check each file of the source, and what plans take.
    assert peak < staging + 4 * (1 << 18) + (1 << 20), "of 25 MB of tensors"


def test_each_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {f"w{n}": torch.randn(64, 48) for n in range(5)}
    plain = plain_file(tmp_path / "plain", whole)
    mesh = Mesh({"fsdp": 4})
    rows = Manifest(
        mesh, {n: one(mesh, Layout((Shard(0, 1, 64),)), (64, 48), n).tensors[n] for n in whole}
    )
    everywhere = Manifest(
        LINE, {n: one(LINE, Layout((REPLICATE,)), (64, 48), n).tensors[n] for n in whole}
    )
    reshard(plain, rows, tmp_path / "rows")
    read = [0]
    really = InputFile._fill

    def count(self: InputFile, view: memoryview, at: int) -> None:
        read[0] += len(view)
        really(self, view, at)

    monkeypatch.setattr(InputFile, "_fill", count)
    reshard(tmp_path / "rows", everywhere, tmp_path / "out", staging=9000)
    assert read[0] == sum(path.stat().st_size for path in (tmp_path / "rows").glob("rank-*"))


def test_nothing_is_written_without_a_folder(tmp_path: Path) -> None:
    plain = plain_file(tmp_path / "plain", {"w": torch.randn(6, 2)})
    target = one(LINE, Layout((Shard(0, 1, 6),)), (6, 2))
    rolemesh.write_manifest(target, tmp_path / "target.json")
    done = rolemesh.reshard(plain, tmp_path / "target.json")
    assert (done.out, done.nbytes, done.plan.moved_bytes) == (None, 48, 48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "target.json"]


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    plain = plain_file(tmp_path / "plain", {"w": torch.randn(6, 2)})
    target = one(LINE, Layout((Shard(0, 1, 6),)), (6, 2))
    out = tmp_path / "out"
    out.mkdir()
    rolemesh.reshard(plain, "safetensors", out)
    before = contents(out)
    rolemesh.reshard(plain, target, out, overwrite=True)
    require = one(LINE, Layout((Shard(0, 1, 6),)), (6, 2))
    assert rolemesh.read_manifest(out / "manifest.json") == require
    assert not contents(out).keys() & (before.keys() - {"checksums.json"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_a_bar_shows_the_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = plain_file(tmp_path / "plain", {"w": torch.randn(50, 20)})
    rolemesh.reshard(plain, "dcp", tmp_path / "out", progress=True)
    assert "resharding: 100%" in capsys.readouterr().err
    rolemesh.reshard(plain, "dcp", tmp_path / "more")
    assert not capsys.readouterr().err, "no terminal"
