"""Files of the compile cache: checked, atomic, bounded."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

from rolemesh.compiler.cache.folder import CacheFolder, CacheWarning, default_folder

KEY = "ab" * 32
CONTENT = bytes(range(256)) * 7


def entry(folder: CacheFolder) -> Path:
    (path,) = folder.path.glob("*/*/*")
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path / "made")
    assert folder.read("captured", KEY) is None
    folder.write("captured", KEY, CONTENT)
    assert folder.read("captured", KEY) == CONTENT
    assert folder.read("sharded", KEY) is None
    assert folder.read("captured", "cd" * 32) is None


@pytest.mark.parametrize("place", [0, 20, 90, 150, 200, -1])
def test_a_changed_byte_is_reported_and_the_entry_made_anew(tmp_path: Path, place: int) -> None:
    folder = CacheFolder(tmp_path)
    folder.write("captured", KEY, CONTENT)
    data = bytearray(entry(folder).read_bytes())
    data[place] ^= 1
    entry(folder).write_bytes(data)
    with pytest.warns(CacheWarning, match="damaged, or of something else; it is compiled anew"):
        assert folder.read("captured", KEY) is None
    folder.write("captured", KEY, CONTENT)
    assert folder.read("captured", KEY) == CONTENT


@pytest.mark.parametrize("content", [b"", b"\n", b"something else", CONTENT])
def test_a_foreign_file_is_reported(tmp_path: Path, content: bytes) -> None:
    folder = CacheFolder(tmp_path)
    folder.write("captured", KEY, CONTENT)
    entry(folder).write_bytes(content)
    with pytest.warns(CacheWarning, match="ROLEMESH_CACHE=0 turns the cache off"):
        assert folder.read("captured", KEY) is None


def test_an_entry_under_another_key_or_kind_is_reported(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path)
    folder.write("captured", KEY, CONTENT)
    other = KEY[:-1] + "0"
    entry(folder).rename(entry(folder).with_name(other))
    with pytest.warns(CacheWarning):
        assert folder.read("captured", other) is None


def test_a_cut_file_is_reported(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path)
    folder.write("captured", KEY, CONTENT)
    data = entry(folder).read_bytes()
    for length in (1, 50, len(data) - 1):
        entry(folder).write_bytes(data[:length])
        with pytest.warns(CacheWarning):
            assert folder.read("captured", KEY) is None


def test_a_folder_that_cannot_be_written_costs_only_the_entry(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = CacheFolder(tmp_path / "file")
    with pytest.warns(CacheWarning, match="cannot be written"):
        folder.write("captured", KEY, CONTENT)
    with pytest.warns(CacheWarning, match="cannot be read"):
        assert folder.read("captured", KEY) is None


def test_entries_not_used_for_longest_go_first(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path, limit=3500)
    keys = [f"{number:02}" * 32 for number in range(3)]
    for number, key in enumerate(keys[:2]):
        folder.write("captured", key, b"x" * 1500)
        os.utime(tmp_path / "captured" / key[:2] / key, (number, number))
    assert folder.read("captured", keys[0]) is not None  # now the one that was used last
    folder.write("captured", keys[2], b"x" * 1500)
    assert [folder.read("captured", key) is not None for key in keys] == [True, False, True]


def _write_and_read(folder: CacheFolder, number: int) -> None:
    warnings.simplefilter("error")
    for _ in range(100):
        folder.write("captured", KEY, CONTENT)
        assert folder.read("captured", KEY) == CONTENT
        folder.write("captured", f"{number:02}" * 32, CONTENT)


def test_processes_write_one_entry_at_the_same_time(tmp_path: Path) -> None:
    folder = CacheFolder(tmp_path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_and_read, args=(folder, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(list(tmp_path.glob("*/*/.*"))) == 0


def test_the_environment_says_which_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_folder() is None  # off in all tests
    monkeypatch.delenv("ROLEMESH_CACHE")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert default_folder() == CacheFolder(tmp_path / "rolemesh")
    monkeypatch.setenv("ROLEMESH_CACHE_DIR", str(tmp_path / "own"))
    assert default_folder() == CacheFolder(tmp_path / "own")
    monkeypatch.setenv("ROLEMESH_CACHE", "0")
    assert default_folder() is None
