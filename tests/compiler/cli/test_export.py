"""`rolemesh export`: which stages are written, and where to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.compiler.recorded import record, recorded_run

from rolemesh.compiler.cli.main import main

pytestmark = pytest.mark.xdist_group("recorded")


@pytest.fixture(scope="module")
def run() -> str:
    return str(record("hf:llama", "pd_mixed")[0])


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["export", *arguments]) == 0
    return capsys.readouterr().out


def test_dot_is_of_one_stage(capsys: pytest.CaptureFixture[str], run: str) -> None:
    text = exported(capsys, run, "--format", "dot", "--program", "decode", "--stage", "partition")
    assert text.startswith('digraph "pd_mixed/decode after partition" {\n')
    assert main(["export", run, "--format", "dot"]) == 3
    assert "2 programs fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "programs", "stages"),
    [
        ((), 2, None),
        (("--program", "decode"), 1, None),
        (("--stage", "partition"), 2, 1),
        (("--program", "decode", "--stage", "partition"), 1, 1),
    ],
)
def test_the_other_formats_take_all_that_is_not_excluded(
    capsys: pytest.CaptureFixture[str],
    run: str,
    arguments: tuple[str, ...],
    programs: int,
    stages: int | None,
) -> None:
    recorded = recorded_run("hf:llama", "pd_mixed").program("decode").stage_names
    graphs = programs * (stages or len(recorded))
    filters = ("--op", "mm") if len(arguments) == 4 else ()
    text = exported(capsys, run, "--format", "model-explorer", *arguments, *filters)
    found = json.loads(text)
    assert len({graph["id"] for graph in found["graphs"]}) == graphs
    if filters:
        labels = {node["label"] for node in found["graphs"][0]["nodes"]}
        assert labels == {"aten.mm.default"}
    trace = exported(capsys, run, "--format", "tlparse", *arguments)
    assert trace.count('"artifact"') >= 2 * graphs
    assert sum(line.startswith("V0101 ") for line in trace.splitlines()) == 2 * graphs


def test_a_file(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    arguments = (run, "--format", "dot", "--program", "decode")
    path = tmp_path / "decode.dot"
    assert exported(capsys, *arguments, "-o", str(path)) == ""
    assert path.read_text(encoding="utf-8") == exported(capsys, *arguments)
    assert main(["export", *arguments, "-o", str(tmp_path / "missing" / "x.dot")]) == 3
    assert "[RM018] cannot write" in capsys.readouterr().err
