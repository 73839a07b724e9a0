"""`rolemesh show`: what is shown depends on what is named; its JSON is what other commands read."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from tests.compiler.recorded import record, recorded_run

from rolemesh.compiler.cli.main import main

pytestmark = pytest.mark.xdist_group("recorded")


@pytest.fixture(scope="module")
def run() -> str:
    return str(record("hf:llama", "pd_mixed")[0])


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_run_is_summed_up(capsys: pytest.CaptureFixture[str], run: str) -> None:
    text = shown(capsys, run)
    assert "pd_mixed/prefill  tp=4\n" in text
    assert "pd_mixed/decode  tp=4\n" in text
    stage = recorded_run("hf:llama", "pd_mixed").program("decode").stage("partition")
    label = f"{stage.number:03}_partition"
    assert text.count(label) == 2
    (line,) = [x for x in text.partition("decode  tp")[2].splitlines() if label in x]
    moved = [node.collective for node in stage.nodes.values() if node.collective]
    assert f"{sum(c['bytes'] for c in moved):,}" in line
    gathers = sum(c["op"] == "all_gather" for c in moved)
    assert f"+{gathers} mesh.all_gather" in line


def test_the_change_of_all_passes_adds_up(capsys: pytest.CaptureFixture[str], run: str) -> None:
    found = json.loads(shown(capsys, run, "--json"))
    assert [program["id"] for program in found["programs"]] == [
        "pd_mixed/prefill",
        "pd_mixed/decode",
    ]
    for program in found["programs"]:
        assert program["mesh"] == {"tp": 4}
        first, *rest = program["stages"]
        assert first["change"] == {}
        assert rest[-1]["ops"] - first["ops"] == sum(sum(s["change"].values()) for s in rest)


def test_a_program_is_collapsed_by_module(capsys: pytest.CaptureFixture[str], run: str) -> None:
    text = shown(capsys, run, "--program", "decode", "--stage", "partition")
    assert re.match(r"pd_mixed/decode  \d{3}_partition  tp=4\n", text)
    assert "model.layers.0-1.self_attn.o_proj" in text
    assert "total" in text.splitlines()[-1]
    by_layer = shown(capsys, run, "--program", "decode", "--stage", "partition", "--depth", "3")
    assert "self_attn" not in by_layer
    assert "  model.layers.0" in by_layer
    assert by_layer.splitlines()[-1].split() == text.splitlines()[-1].split()


def test_modules_as_json(capsys: pytest.CaptureFixture[str], run: str) -> None:
    arguments = (run, "--program", "decode", "--depth", "2", "--json")
    found = json.loads(shown(capsys, *arguments))
    assert (found["program"], found["stage"]) == ("pd_mixed/decode", "verify")
    keys = ["path", "alike", "inputs", "ops", "collectives", "bytes", "gives"]
    assert all(list(row) == keys for row in found["modules"])


def test_filters_show_nodes(capsys: pytest.CaptureFixture[str], run: str) -> None:
    arguments = (run, "--program", "decode", "--stage", "partition", "--op", "mesh.all_*")
    text = shown(capsys, *arguments)
    found = json.loads(shown(capsys, *arguments, "--json"))
    stage = recorded_run("hf:llama", "pd_mixed").program("decode").stage("partition")
    expected = [n for n in stage.nodes.values() if n.op.startswith("mesh.all_")]
    assert found["nodes"] == [dict(node.data) for node in expected]
    assert text.count(" because ") == len(expected)
    assert f"{len(expected)} of {len(stage.nodes)} nodes" in text
    for node in expected:
        assert f"%{node.name} " in text
        assert node.module in text


def test_filters_with_depth_count_what_fits(capsys: pytest.CaptureFixture[str], run: str) -> None:
    text = shown(capsys, run, "--program", "decode", "--op", "mm", "--depth", "1")
    stage = recorded_run("hf:llama", "pd_mixed").program("decode").stage()
    products = sum(node.op == "aten.mm.default" for node in stage.nodes.values())
    assert text.splitlines()[-1].split()[:2] == ["total", "0"]
    assert text.splitlines()[-1].split()[2] == str(products)


def test_json_of_a_stage_is_read_from_standard_input(
    capsys: pytest.CaptureFixture[str], run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shown(capsys, run, "--program", "decode", "--stage", "partition", "--json")
    (path,) = Path(run).glob("pd_mixed/decode/*_partition.json")
    assert json.loads(first) == json.loads(path.read_text(encoding="utf-8"))
    monkeypatch.setattr("sys.stdin", io.StringIO(first))
    again = shown(capsys, "-", "--json")
    assert json.loads(again) == json.loads(first)
    from_file = shown(capsys, str(path))
    assert "  model.layers.0-1.mlp.up_proj" in from_file
    assert f"  {path.stem}  tp=4\n" in from_file


def test_colour(capsys: pytest.CaptureFixture[str], run: str) -> None:
    arguments = (run, "--program", "decode", "--op", "mesh.all_gather")
    painted = shown(capsys, *arguments, "--color", "always")
    assert "\x1b[36mtp=4\x1b[0m" in painted
    assert "\x1b" not in shown(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "partition"], "[RM018] 2 programs fit"),
        (["--program", "decod"], "did you mean 'decode'?"),
        (["--program", "decode", "--stage", "partitoin"], "did you mean 'partition'?"),
        (["--program", "decode", "--module", "model.layer.0.mlp"], "did you mean 'model.layers.0"),
        (["--rank", "3"], "[RM035]"),
    ],
)
def test_what_is_not_there(
    capsys: pytest.CaptureFixture[str], run: str, arguments: list[str], message: str
) -> None:
    assert message in failed(capsys, run, *arguments)


def test_standard_input_that_is_no_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("{"))
    assert "[RM035]" in failed(capsys, "-")
