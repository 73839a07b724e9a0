"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rolemesh.compiler.ir.atomic import write_folder, write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    write_whole(path, b"old", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    write_whole(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o644
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"kept": b"new"}


@pytest.mark.parametrize("step", ["fchmod", "fsync"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "kept"
    write_whole(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"kept": b"old"}


def test_a_folder_is_made_only_if_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with pytest.raises(FileNotFoundError):
        write_whole(path, b"x")
    write_whole(path, b"x", parents=True)
    assert path.read_bytes() == b"x"


def test_a_file_lasts_when_the_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    really = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_whole(tmp_path / "kept", b"x")
    assert len(synced) == 2
    assert synced[1] == str(tmp_path), "the file, then the name in its folder"


def test_a_folder_that_will_do_stays(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.mkdir()
    write_folder(path, {"a": b"old"}, lambda: True)  # it was empty
    (path / "added").write_bytes(b"by another process")
    asked: list[str] = []
    write_folder(path, {"a": b"new"}, lambda: not asked.append(path.name))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {
        "a": b"old",
        "added": b"by another process",
    }
    write_folder(path, {"a": b"new"}, lambda: False)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == {"a": b"new"}
    assert asked == ["kept"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
