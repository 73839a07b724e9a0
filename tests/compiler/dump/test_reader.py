"""Run directories as they are read: what is found, and what is said of a damaged one."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.compiler.dump.runs import write_run

from rolemesh.compiler.dump.files import SCHEMA_VERSION
from rolemesh.compiler.dump.reader import open_run, open_source
from rolemesh.compiler.ir.errors import RolemeshError

STAGE = "no_role/call/005_push_back.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "run"
    write_run(str(folder))
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def refusal(work: Callable[[], object]) -> RolemeshError:
    with pytest.raises(RolemeshError) as refused:
        work()
    return refused.value


def all_of(run: Path) -> list[object]:
    return list(open_run(run).program().stages())


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_nodes_stages_and_programs(written: Path) -> None:
    program = open_run(written).program()
    assert program.id == "no_role/call"
    assert open_run(written).program("no_role/call") == program
    assert program.phase == ""
    stage = program.stage("partition")
    assert stage.number == 6
    assert program.stage(6).name == program.stage("6").name == "partition"
    assert program.stage().name == program.stage("last").name == "verify"
    assert stage.mesh == {"tp": 3}
    for name, users in stage.users.items():
        for user in users:
            assert name in stage.nodes[user].operands
    (moved,) = (node for node in stage.nodes.values() if node.collective)
    assert moved.op == "mesh.all_reduce"
    assert moved.collective is not None
    assert moved.collective["axes"] == ["tp"]
    assert moved.reason


def test_a_name_that_is_not_there(written: Path) -> None:
    program = open_run(written).program()
    error = refusal(lambda: program.stage("partitoin"))
    assert error.code == "RM018"
    assert "did you mean 'partition'?" in str(error)
    assert refusal(lambda: program.stage("13")).code == "RM018"
    error = refusal(lambda: open_run(written).program("no_role/cal"))
    assert "did you mean 'no_role/call'?" in str(error)
    assert "no rank of that number" in str(refusal(lambda: open_run(written, 3)))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing index": ("index.json", Path.unlink, "FileNotFoundError"),
    "truncated index": (
        "index.json",
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "no JSON",
    ),
    "index of a list": ("index.json", lambda path: path.write_text("[]"), "no JSON object"),
    "index of another kind": (
        "index.json",
        lambda path: changed(path, lambda data: data.update(kind="other")),
        "kind 'other', not 'rolemesh.run'",
    ),
    "index without programs": (
        "index.json",
        lambda path: changed(path, lambda data: data.pop("programs")),
        "edited: KeyError: 'programs'",
    ),
    "index without a checksum": (
        "index.json",
        lambda path: changed(path, lambda data: data["programs"][0]["stages"][2]["json"].popitem()),
        "edited: KeyError: 'sha256'",
    ),
    "missing stage": (STAGE, Path.unlink, "FileNotFoundError"),
    "truncated stage": (STAGE, lambda path: path.write_bytes(path.read_bytes()[:999]), "cut short"),
    "edited stage": (
        STAGE,
        lambda path: changed(path, lambda data: data.update(number=3)),
        "edited",
    ),
    "missing text": (f"{STAGE[:-5]}.txt", Path.unlink, "FileNotFoundError"),
    "edited text": (f"{STAGE[:-5]}.txt", lambda path: path.write_text("program"), "edited"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named(run: Path, name: str) -> None:
    file, damage, why = DAMAGES[name]
    damage(run / file)
    error = refusal(lambda: all_of(run))
    assert error.code == "RM035"
    assert error.where == str(run / file)
    assert why in str(error)
    assert "write it again with `rolemesh dump`" in str(error)


@pytest.mark.parametrize(
    ("version", "fix"),
    [
        (SCHEMA_VERSION + 1, "read it with rolemesh 9.8.7 or later"),
        (SCHEMA_VERSION - 1, "read it with rolemesh 9.8.7, or write it again"),
    ],
)
def test_another_schema_says_which_version_reads_it(run: Path, version: int, fix: str) -> None:
    index = run / "index.json"
    changed(index, lambda data: data.update(schema_version=version, rolemesh="9.8.7"))
    error = refusal(lambda: all_of(run))
    assert error.code == "RM035"
    assert error.where == str(index)
    assert f"has schema version {version}" in str(error)
    assert f"this rolemesh reads version {SCHEMA_VERSION}; rolemesh 9.8.7 wrote the file" in str(
        error
    )
    assert fix in str(error)


def test_another_schema_of_a_stage_by_itself(run: Path) -> None:
    changed(run / STAGE, lambda data: data.update(schema_version=SCHEMA_VERSION + 1))
    error = refusal(lambda: open_source(str(run / STAGE)))
    assert error.where == str(run / STAGE)
    assert f"has schema version {SCHEMA_VERSION + 1}" in str(error)


def test_no_folder(tmp_path: Path) -> None:
    error = refusal(lambda: open_run(tmp_path / "nowhere"))
    assert error.code == "RM035"
    assert "there is no such folder" in str(error)
    assert "FileNotFoundError" in str(refusal(lambda: open_run(tmp_path)))


def test_a_stage_by_itself(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_run(written).program().stage("push_back")
    alone = open_source(str(written / STAGE)).program().stage()
    assert alone.name == "push_back"
    assert alone.nodes == expected.nodes
    monkeypatch.setattr(sys, "stdin", io.StringIO((written / STAGE).read_text(encoding="utf-8")))
    assert open_source("-").program().stage().nodes == expected.nodes
    text = (written / STAGE).read_text(encoding="utf-8")
    for damaged in ("nonsense", text[:-9], text.replace('"program":', '"programme":', 1)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(damaged))
        error = refusal(lambda: open_source("-"))
        assert error.code == "RM035"
        assert error.where == "standard input"


def test_a_stage_by_itself_that_is_none(run: Path) -> None:
    index = run / "index.json"
    error = refusal(lambda: open_source(str(index)))
    assert error.where == str(index)
    assert "kind 'rolemesh.run', not 'rolemesh.stage'" in str(error)


def test_reading_does_not_import_torch(written: Path) -> None:
    script = (
        "import sys; from rolemesh.compiler.dump.reader import open_run;"
        f"list(open_run({str(written)!r}).program().stages()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
