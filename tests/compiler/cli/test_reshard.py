"""`rolemesh reshard` and `rolemesh verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.manifests import one

import rolemesh
from rolemesh.compiler.cli.main import main
from rolemesh.compiler.cli.sizes import byte_text
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard

TARGET = one(Mesh({"tp": 3}), Layout((Shard(0, 1, 7),)), (7, 5))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_file({"w": torch.arange(35.0).reshape(7, 5)}, tmp_path / "model.safetensors")
    rolemesh.write_manifest(TARGET, tmp_path / "target.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_prints_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reshard", "model.safetensors", "target.json", "--dry-run"]) == 0
    digest = rolemesh.reshard("model.safetensors", TARGET).plan.digest
    assert (
        capsys.readouterr().out
        == f"""\
source   1 tensors on mesh file=1
target   1 tensors on mesh tp=3
writes   rank: 140 B in 3 files
moved    140 bytes; kept 0
steps    1, with 268.4 MB of staging at most
digest   {digest}

rank  file                                    moved bytes          kept bytes
   0  rank-00000-of-00003.safetensors                  60                   0
   1  rank-00001-of-00003.safetensors                  60                   0
   2  rank-00002-of-00003.safetensors                  20                   0
"""
    )
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "target.json"]


def test_checkpoints_are_written_and_verified(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reshard", "model.safetensors", "target.json", "ranks"]) == 0
    assert capsys.readouterr().out == "ranks: 140 B in 3 files\n"
    options = ["--shard-size", "10", "--staging", "1KiB", "--json"]
    assert main(["reshard", "ranks", "safetensors", "plain", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    assert (found["format"], found["out"], found["staging_bytes"]) == ("safetensors", "plain", 1024)
    assert found["ranks"] == [
        {"rank": 0, "file": "model.safetensors", "moved_bytes": 140, "kept_bytes": 0}
    ]
    assert torch.equal(load_file("plain/model.safetensors")["w"].flatten(), torch.arange(35.0))
    assert main(["reshard", "ranks", "target.json", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_bytes"] == 140, "ranks have what they need"
    assert main(["verify", "ranks"]) == 0
    assert "in 4 files, good" in capsys.readouterr().out
    assert main(["reshard", "plain", "target.json", "ranks"]) == 3
    assert "[RM041] ranks exists" in capsys.readouterr().err
    assert main(["reshard", "plain", "target.json", "ranks", "--overwrite"]) == 0


def test_checksums_are_recorded_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "."]) == 3
    assert "[RM032] . has no checksums.json" in capsys.readouterr().err
    assert main(["verify", "model.safetensors", "--record", "--json"]) == 0
    size = (folder / "model.safetensors").stat().st_size
    assert json.loads(capsys.readouterr().out) == {
        "schema_version": 1,
        "format": "safetensors",
        "files": 1,
        "bytes": size,
        "recorded": True,
    }
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    assert main(["verify", ".", "--record"]) == 3
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert main(["reshard", ".", "target.json", "ranks"]) == 3
    assert not (folder / "ranks").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.safetensors", "target.json"], "name DIR, or --dry-run"),
        (["model.safetensors", "target.json", "out", "--dry-run"], "--dry-run takes no DIR"),
        (["a", "b", "c", "--staging", "some"], "some is no number of bytes"),
        (["a", "b", "c", "--staging", "0MB"], "0MB is no number of bytes"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["reshard", *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_bytes_as_text() -> None:
    counts = (999, 1000, 1_550_000, 5 * 10**9, 10**12)
    assert [byte_text(n) for n in counts] == ["999 B", "1.0 kB", "1.6 MB", "5.0 GB", "1.0 TB"]
