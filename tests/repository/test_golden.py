"""The golden fixture finds differences, and writes files only when asked to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Golden = Callable[[str, str], None]


def _in(directory: Path, golden: Any, *, update: bool = False) -> Golden:
    return dataclasses.replace(golden, directory=directory, update=update)


def test_written_text_compares_equal(golden: Golden, tmp_path: Path) -> None:
    _in(tmp_path / "golden", golden, update=True)("program", "a  \nb")
    assert (tmp_path / "golden" / "program.txt").read_text() == "a\nb\n"
    _in(tmp_path / "golden", golden)("program", "\na\nb\n\n")


def test_difference_fails_with_a_diff(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "program.txt").write_text("a\nb\n")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)-b.*\+c.*--update-golden"):
        _in(tmp_path, golden)("program", "a\nc\n")
    assert (tmp_path / "program.txt").read_text() == "a\nb\n"


def test_missing_file_fails(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="no golden file"):
        _in(tmp_path, golden)("program", "a\n")
    assert not list(tmp_path.iterdir())


def test_folder_is_next_to_the_test(golden: Any) -> None:
    assert golden.directory == Path(__file__).parent / "golden"
