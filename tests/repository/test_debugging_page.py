"""docs/debugging.md shows what the commands really print.

Commands run in the order of the page, in one folder. A line `...` in the page stands for lines that
it leaves out; `$ sed` edits a file as the reader would.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rolemesh.compiler.cli.main import main

pytestmark = pytest.mark.xdist_group("recorded")


def commands(page: str) -> list[tuple[str, list[str]]]:
    """The commands of a page's console blocks, each with the lines shown after it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line.rstrip())
    return found


def agrees(shown: list[str], printed: list[str]) -> bool:
    """Whether the lines are those that were printed, but for those left out."""
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(agrees(shown[1:], printed[start:]) for start in range(len(printed) + 1))
    return bool(printed) and shown[0] == printed[0] and agrees(shown[1:], printed[1:])


def printed_by(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    name, *arguments = shlex.split(command)
    if name == "rolemesh":
        main(arguments)
        output = capsys.readouterr().out
    else:
        program = [sys.executable] if name == "python" else [name]
        output = subprocess.run(
            [*program, *arguments], capture_output=True, text=True, check=False
        ).stdout
    return [line.rstrip() for line in output.splitlines()]


def test_the_page_shows_what_is_printed(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(repository / "examples/debugging", tmp_path / "examples/debugging")
    monkeypatch.chdir(tmp_path)
    steps = commands((repository / "docs/debugging.md").read_text(encoding="utf-8"))
    assert len(steps) > 5
    for command, shown in steps:
        printed = printed_by(command, capsys)
        assert agrees(shown, printed), f"$ {command}\n" + "\n".join(printed)


def test_lines_left_out() -> None:
    assert agrees(["a", "...", "d"], ["a", "b", "c", "d"])
    assert agrees(["...", "d"], ["d"])
    assert not agrees(["a", "d"], ["a", "b", "d"])
    assert not agrees(["a", "..."], ["b"])
