"""Damaged sources, and places that cannot be written: refused by name, with nothing changed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.manifests import one

import rolemesh
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.runtime.reshard import outputs
from rolemesh.runtime.reshard.checksums import CHECKSUMS, Checksums, sums_of, write_checksums
from rolemesh.runtime.reshard.inputs import InputFile
from rolemesh.runtime.reshard.reshard import reshard

MESH = Mesh({"tp": 3})
SHAPE = (40, 6)


def layout(dim: int) -> Manifest:
    tensors = {}
    for name in ("a", "b"):
        tensors |= one(MESH, Layout((Shard(dim, 1, SHAPE[dim]),)), SHAPE, name).tensors
    return Manifest(MESH, tensors)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    save_file({name: torch.randn(SHAPE) for name in ("a", "b")}, folder / "model.safetensors")
    return folder


@pytest.fixture
def ranks(plain: Path) -> Path:
    reshard(plain, layout(0), plain.parent / "ranks")
    return plain.parent / "ranks"


def refused(source: Path, out: Path, code: str, message: str, **options: object) -> RolemeshError:
    """What a reshard is refused with. Nothing is there after."""
    before = {path.name for path in out.parent.iterdir()}
    with pytest.raises(RolemeshError, match=re.compile(message, re.DOTALL)) as raised:
        reshard(source, layout(1), out, **options)  # type: ignore[arg-type]
    assert raised.value.code == code
    assert {path.name for path in out.parent.iterdir()} == before
    return raised.value


def formats(plain: Path) -> dict[str, Path]:
    """The same tensors in every format, with checksums of blocks of 256 bytes."""
    folder = plain.parent
    found = {"rank": folder / "ranks", "safetensors": folder / "several", "dcp": folder / "dcp"}
    reshard(plain, layout(0), found["rank"])
    reshard(found["rank"], "safetensors", found["safetensors"], shard_bytes=1000)
    reshard(found["rank"], layout(0), found["dcp"], file_format="dcp")
    for path in found.values():
        files = {p.name: sums_of(p, 256) for p in path.iterdir() if p.name != CHECKSUMS}
        write_checksums(path, Checksums(256, files))
    return found


@pytest.mark.parametrize("kind", ["rank", "safetensors", "dcp"])
def test_a_byte_that_is_flipped_is_found(plain: Path, kind: str) -> None:
    """In every file, at its ends and at random places."""
    source, pick = formats(plain)[kind], random.Random(3)
    for path in sorted(source.iterdir()):
        size = path.stat().st_size
        for place in (0, size - 1, *(pick.randrange(size) for _ in range(4))):
            whole = path.read_bytes()
            damaged = bytearray(whole)
            damaged[place] ^= 1 << pick.randrange(8)
            path.write_bytes(damaged)
            error = refused(source, plain.parent / "out", "RM032", "damaged|cannot be read|lacks")
            assert path.name in str(error), (path.name, place)
            path.write_bytes(whole)
    reshard(source, layout(1), plain.parent / "out")


def test_damage_is_told_with_the_tensor(ranks: Path) -> None:
    path = ranks / "rank-00001-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(
        ranks,
        ranks.parent / "out",
        "RM032",
        r"rank-00001-of-00003.safetensors is damaged.*bytes 0 to \d+: a, b",
    )


@pytest.mark.parametrize("kind", ["rank", "safetensors", "dcp"])
def test_a_file_that_is_missing_or_cut_short_is_named(plain: Path, kind: str) -> None:
    source = formats(plain)[kind]
    for path in sorted(source.iterdir()):
        if path.name in (CHECKSUMS, "manifest.json", ".metadata"):
            continue
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        error = refused(source, plain.parent / "out", "RM032", "")
        assert path.name in str(error)
        path.unlink()
        error = refused(source, plain.parent / "out", "RM032", "lacks 1 of its")
        assert path.name in str(error)
        path.write_bytes(whole)


def test_files_without_checksums_are_read_all_the_same(plain: Path) -> None:
    """Others write none; then what is there is all that can be said."""
    source = plain.parent / "dcp"
    dcp.save({n: torch.ones(SHAPE) for n in ("a", "b")}, checkpoint_id=source, no_dist=True)
    reshard(source, layout(1), plain.parent / "out")
    path = source / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:900])
    refused(source, plain.parent / "more", "RM032", "[ab] cannot be read.*ends at byte")


def test_ranks_without_their_checksums_are_refused(ranks: Path) -> None:
    (ranks / CHECKSUMS).unlink()
    refused(ranks, ranks.parent / "out", "RM032", "has no checksums.json")


def test_a_file_that_nobody_recorded_is_refused(plain: Path) -> None:
    write_checksums(plain, Checksums(256, {}))
    refused(plain, plain.parent / "out", "RM032", "does not list 1 files.*model.safetensors")


def test_a_file_of_another_checkpoint_is_refused(ranks: Path) -> None:
    other = {"a": torch.zeros(13, 6), "b": torch.zeros(14, 6)}
    save_file(other, ranks / "rank-00001-of-00003.safetensors")
    files = {p.name: sums_of(p) for p in ranks.iterdir() if p.name != CHECKSUMS}
    write_checksums(ranks, Checksums(4 << 20, files))
    refused(ranks, ranks.parent / "out", "RM032", r"not have a as the manifest.*13, 6.*14, 6")


def test_a_source_that_changes_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, really = plain / "model.safetensors", InputFile.sweep

    def meanwhile(self: InputFile) -> None:
        os.utime(file, ns=(1, 1))
        really(self)

    monkeypatch.setattr(InputFile, "sweep", meanwhile)
    refused(plain, plain.parent / "out", "RM032", "model.safetensors changed while it was read")


def test_a_source_that_is_cut_short_meanwhile_is_refused(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, really = plain / "model.safetensors", outputs.OutputFile.__init__

    def meanwhile(self: outputs.OutputFile, *args: object) -> None:
        os.truncate(file, 1200)
        really(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(outputs.OutputFile, "__init__", meanwhile)
    refused(plain, plain.parent / "out", "RM032", "ends at byte 1200.*: b")


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync", "rename"])
def test_a_full_disk_publishes_nothing(
    plain: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = plain.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(RolemeshError, match=r"RM041(.|\n)*out cannot be written: the disk is"):
            reshard(plain, layout(1), out)
    assert not out.exists()
    reshard(plain, layout(1), out)
    assert not (plain.parent / ".out.reshard").exists()


def test_what_is_there_is_left_alone(plain: Path) -> None:
    out = plain.parent / "out"
    reshard(plain, "safetensors", out)
    refused(plain, out, "RM041", "out exists")
    (out / "tokenizer.json").touch()
    refused(plain, out, "RM041", "no reshard wrote.*tokenizer.json", overwrite=True)
    other = plain.parent / "file"
    other.touch()
    refused(plain, other, "RM041", "no reshard wrote", overwrite=True)
    with pytest.raises(RolemeshError, match=r"RM041(.|\n)*there is no folder"):
        reshard(plain, layout(1), other / "out")
    refused(plain, plain / "out", "RM041", "one is within the other")
    refused(plain, plain, "RM041", "one is within the other", overwrite=True)


def test_unfinished_work_of_another_kind_is_left_alone(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = plain.parent / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(RolemeshError, match="RM041"):
            reshard(plain, layout(0), out)
    refused(plain, out, "RM041", "there is an unfinished reshard to .*out")
    assert reshard(plain, layout(0), out).resumed == 2 * 40 * 6 * 4
    shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(RolemeshError, match="RM041"):
            reshard(plain, layout(0), out)
    assert reshard(plain, layout(1), out, overwrite=True).resumed == 0


def test_two_do_not_write_to_one_place(plain: Path) -> None:
    folder = plain.parent / ".out.reshard"
    folder.mkdir()
    with (folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(plain, plain.parent / "out", "RM041", "another process writes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"a": t["a"]}, "the source has no tensor b"),
        (lambda t: t | {"b": t["b"].half()}, r"b has another dtype.*f16.*f32"),
        (lambda t: t | {"b": t["b"][:9]}, r"b has another shape.*9, 6.*40, 6"),
    ],
)
def test_tensors_that_do_not_fit_are_told_with_both_sides(
    plain: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str
) -> None:
    tensors = change({name: torch.randn(SHAPE) for name in ("a", "b")})
    save_file({n: t.contiguous() for n, t in tensors.items()}, plain / "model.safetensors")
    refused(plain, plain.parent / "out", "RM039", message)


def test_options_that_do_not_fit_are_refused(plain: Path) -> None:
    with pytest.raises(RolemeshError, match=r"RM018(.|\n)*names the format already"):
        reshard(plain, "dcp", file_format="rank")
    with pytest.raises(RolemeshError, match=r"RM018(.|\n)*'gguf' cannot be written"):
        reshard(plain, layout(0), file_format="gguf")
    with pytest.raises(RolemeshError, match=r"RM038(.|\n)*none\.json cannot be read"):
        rolemesh.reshard(plain, plain / "none.json")
    with pytest.raises(RolemeshError, match=r"RM032(.|\n)*no checkpoint at"):
        rolemesh.reshard(plain / "none", "dcp")


def test_checkpoints_of_torch_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4, 3).t()}, checkpoint_id=tmp_path / "strided", no_dist=True)
    with pytest.raises(RolemeshError, match=r"RM032(.|\n)*w cannot be read(.|\n)*strides \[1, 3\]"):
        reshard(tmp_path / "strided", "safetensors")
    (tmp_path / "strided" / ".metadata").write_bytes(b"no pickle")
    with pytest.raises(RolemeshError, match=r"RM032(.|\n)*\.metadata cannot be read"):
        reshard(tmp_path / "strided", "safetensors")
