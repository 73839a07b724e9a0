"""The built wheel holds exactly the modules of the source tree, installs and imports."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

FOLDERS = ("compiler", "passes", "lowering", "runtime")

# One worker builds the wheel once for all of these tests.
pytestmark = pytest.mark.xdist_group("package")


def _run(*command: str, cwd: Path, **env: str) -> str:
    run = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **env},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _source_modules(repository: Path) -> set[str]:
    """The Python files of the source tree, by the path that they have when installed."""
    files = {path for folder in FOLDERS for path in (repository / folder).rglob("*.py")}
    return {"rolemesh/__init__.py"} | {
        f"rolemesh/{path.relative_to(repository).as_posix()}" for path in files
    }


def _files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    _run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=repository)
    (path,) = out.glob("rolemesh-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target))
    _run(*command, str(wheel), cwd=target)
    return target


def test_wheel_has_the_modules_of_the_source_tree(wheel: Path, repository: Path) -> None:
    modules = {name for name in _files(wheel) if name.endswith(".py")}
    assert modules == _source_modules(repository)
    assert "rolemesh/compiler/ir/errors.py" in modules


def test_wheel_has_the_type_marker_and_the_licence(wheel: Path) -> None:
    files = _files(wheel)
    assert "rolemesh/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_wheel_has_the_manual_page(wheel: Path) -> None:
    pages = [name for name in _files(wheel) if name.endswith("data/share/man/man1/rolemesh.1")]
    assert len(pages) == 1


def test_wheel_has_the_parts_of_the_page(wheel: Path, repository: Path) -> None:
    parts = {
        path for path in (repository / "compiler/debug/page/assets").rglob("*") if path.is_file()
    }
    named = {f"rolemesh/{path.relative_to(repository).as_posix()}" for path in parts}
    assert named <= _files(wheel)
    assert "rolemesh/compiler/debug/page/assets/vendor/dagre.min.js.LEGAL.txt" in named


def test_wheel_from_the_source_archive_is_the_same(
    wheel: Path, repository: Path, tmp_path: Path
) -> None:
    # Without --wheel, build makes the source archive and then the wheel from it.
    _run("-m", "build", "--no-isolation", "--outdir", str(tmp_path), cwd=repository)
    (again,) = tmp_path.glob("rolemesh-*.whl")
    assert _files(again) == _files(wheel)


def test_installed_wheel_imports(installed: Path, tmp_path: Path) -> None:
    script = "import rolemesh; print(rolemesh.__file__); print(rolemesh.RolemeshError.__module__)"
    # PYTHONPATH comes before the editable install that the tests themselves run from.
    output = _run("-c", script, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert output == [str(installed / "rolemesh/__init__.py"), "rolemesh.compiler.ir.errors"]


def test_metadata(installed: Path) -> None:
    (found,) = metadata.distributions(path=[str(installed)])
    entry_points = {(point.group, point.name, point.value) for point in found.entry_points}
    assert entry_points == {
        ("console_scripts", "rolemesh", "rolemesh.compiler.cli.main:main"),
        ("torch_dynamo_backends", "rolemesh", "rolemesh.compiler.backend:rolemesh_backend"),
    }
    fields = email.message_from_string(found.read_text("METADATA") or "")
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"


def test_entry_points_name_things_that_exist(installed: Path, tmp_path: Path) -> None:
    script = (
        "from importlib import metadata\n"
        f"(found,) = metadata.distributions(path=[{str(installed)!r}])\n"
        "assert all(callable(point.load()) for point in found.entry_points)\n"
    )
    _run("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
