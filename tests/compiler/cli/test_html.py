"""`rolemesh html`: the file it writes, its errors, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.compiler.recorded import recorded_run

from rolemesh.compiler.cli.main import main

# The worker of tests/compiler/debug/page/test_page.py, which reads the same run.
pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def folder() -> str:
    return str(recorded_run("hf:llama", "pd_mixed").folder)


def test_it_writes_one_file_and_says_where(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "page.html"
    assert main(["html", folder, "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_json_says_what_was_written(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    path = tmp_path / "page.html"
    assert main(["html", folder, "-o", str(path), "--program", "decode", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "schema_version": 1,
        "file": str(path),
        "bytes": path.stat().st_size,
        "programs": ["pd_mixed/decode"],
    }


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["missing"], "RM035"),
        (["{folder}", "--program", "decod"], "RM018"),
        (["{folder}", "-o", "{tmp}"], "RM036"),
    ],
)
def test_bad_input_is_3(
    capsys: pytest.CaptureFixture[str],
    folder: str,
    tmp_path: Path,
    arguments: list[str],
    code: str,
) -> None:
    filled = [text.format(folder=folder, tmp=tmp_path) for text in arguments]
    assert main(["html", *filled]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"[{code}] " in captured.err


def test_it_loads_no_torch(folder: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom rolemesh.compiler.cli.main import main\n"
        f"assert main(['html', {folder!r}, '-o', {str(tmp_path / 'page.html')!r}]) == 0\n"
        "assert not {'torch', 'numpy', 'sympy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
