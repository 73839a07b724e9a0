"""Files of ranks: each rank loads its own, reads nothing else, and refuses what does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.runtime.checkpoint.test_load import Reads

from rolemesh.compiler.ir.boxes import distribute
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Segment, Shard, segmented
from rolemesh.lowering.chunks import holds, poison_pads, scatter, scatter_one
from rolemesh.runtime.checkpoint.load import fill_from_checkpoint, load_checkpoint
from rolemesh.runtime.checkpoint.rank_files import load_rank_file
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.reshard.reshard import reshard
from rolemesh.runtime.store import Store

MESH = Mesh({"tp": 2})
LAYOUTS = {
    "embed": Layout((Shard(0, 1, 301),)),
    "qkv": Layout((segmented(0, [Segment(64, 1, 64, 1), Segment(32, 1, 2, 1)]),)),
    "down": Layout((Shard(1, 1, 77),)),
    "norm": Layout((REPLICATE,)),
    "bias": Layout((Owner(1),)),
}


Change = Callable[[dict[str, torch.Tensor], dict[str, Layout]], object]


def values() -> dict[str, torch.Tensor]:
    """The tensors of a model; `head` is tied to `embed`."""
    torch.manual_seed(0)
    tensors = {
        "embed": torch.randn(301, 32).bfloat16(),
        "qkv": torch.randn(96, 32),
        "down": torch.randn(32, 77),
        "norm": torch.randn(()),
        "bias": torch.randn(5),
    }
    return tensors | {"head": tensors["embed"]}


def folder_of(at: Path) -> Path:
    whole = values()
    plain = {name: tensor for name, tensor in whole.items() if name != "head"}
    save_file(plain, at / "model.safetensors")
    tensors = {
        name: StoredTensor(
            whole[name].dtype,
            distribute(layout, tuple(whole[name].shape), MESH),
            ("head",) if name == "embed" else (),
        )
        for name, layout in LAYOUTS.items()
    }
    reshard(at / "model.safetensors", Manifest(MESH, tensors), at / "ranks")
    return at / "ranks"


def require_shard(name: str, local: torch.Tensor, rank: int) -> None:
    whole, layout = values()[name], LAYOUTS[name]
    if not holds(layout, MESH, rank):
        assert not local.numel()
        return
    real = ~poison_pads(scatter(torch.ones(whole.shape), layout, MESH), layout, MESH)[rank].isnan()
    expected = scatter_one(whole, layout, MESH, rank)
    assert (local.shape, local.dtype) == (expected.shape, whole.dtype)
    assert torch.equal(local[real], expected[real])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_bytes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    folder, reads = folder_of(tmp_path), Reads()
    for other in folder.glob("rank-*"):
        if int(other.name[5:10]) != rank:
            other.unlink()
    monkeypatch.setattr(os, "preadv", reads)
    found = load_rank_file(folder, values(), LAYOUTS | {"head": LAYOUTS["embed"]}, MESH, rank)
    assert found.keys() == LAYOUTS.keys()
    for name, local in found.items():
        require_shard(name, local, rank)
    held = sum(local.nbytes for local in found.values())
    assert sum(stop - start for _, start, stop in reads.seen) < 1.05 * held


def test_whole_tensors_are_filled_from_all_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    empty = {name: torch.zeros_like(tensor) for name, tensor in values().items()}
    empty["head"] = empty["embed"]
    fill_from_checkpoint(folder, empty, progress=False)
    assert all(torch.equal(empty[name], tensor) for name, tensor in values().items())
    wide = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in values().items()}
    wide["head"] = wide["embed"]
    fill_from_checkpoint(folder, wide, progress=False, cast=True)
    assert torch.equal(wide["embed"], values()["embed"].double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, _: t.pop("bias"), "extra: bias"),
        (lambda t, _: t.update(more=torch.zeros(2)), "missing: more"),
        (lambda t, _: t.update(norm=torch.zeros(3)), r"shape: norm: .*f32\[\], the model f32\[3\]"),
        (lambda t, _: t.update(qkv=t["qkv"].half()), "dtype: qkv: .*f32.*the model f16"),
        (
            lambda _, ls: ls.update(down=Layout((Shard(0, 1, 32),))),
            r"layout: down on rank 1: the files have .*\[39, 38, 0\].*the model .*\[16, 16, 0\]",
        ),
        (lambda _, ls: ls.update(bias=Layout((Owner(0),))), "bias on rank 1: .*the model nothing"),
    ],
)
def test_what_does_not_fit_is_told_with_both_sides(
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, Layout]], object],
    message: str,
) -> None:
    folder, tensors, layouts = folder_of(tmp_path), values(), dict(LAYOUTS)
    change(tensors, layouts)
    layouts |= {"more": Layout((REPLICATE,))}
    with pytest.raises(RolemeshError, match=rf"RM033(.|\n)*{message}"):
        load_rank_file(folder, tensors, layouts, MESH, 1)


def test_damage_is_found_while_loading(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    path = folder / "rank-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    load_rank_file(folder, values(), LAYOUTS, MESH, 0)
    with pytest.raises(RolemeshError, match=r"RM032(.|\n)*rank-00001.*is damaged"):
        load_rank_file(folder, values(), LAYOUTS, MESH, 1)
    with pytest.raises(RolemeshError, match=r"RM032(.|\n)*rank-00001.*is damaged"):
        fill_from_checkpoint(folder, values(), progress=False)


def loaded(good: Path, damaged: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in values().items()}
    tensors["head"] = tensors["embed"]
    problems = []
    for folder, mesh in ((damaged, MESH), (good, Mesh({"other": 2}))):
        store = Store()
        try:
            load_checkpoint(folder, tensors, LAYOUTS, mesh, store, progress=False)
        except RolemeshError as error:
            problems.append(str(error))
        assert not store.stored()
    store = Store()
    load_checkpoint(good, tensors, LAYOUTS, MESH, store, progress=False)
    return {kept.name: kept.local for kept in store.stored()}, problems


@pytest.mark.processes
def test_ranks_load_or_refuse_together(tmp_path: Path) -> None:
    folders = [tmp_path / "good", tmp_path / "damaged"]
    for at in folders:
        at.mkdir()
    good, damaged = map(folder_of, folders)
    os.truncate(damaged / "rank-00001-of-00002.safetensors", 2000)
    for rank, (locals_, problems) in enumerate(
        run_processes(loaded, 2, (good, damaged), fork=True)
    ):
        assert locals_.keys() == LAYOUTS.keys()
        for name, local in locals_.items():
            require_shard(name, local, rank)
        assert "RM032" in problems[0]
        assert "the files are for tp=2, the model is on other=2" in problems[1]
