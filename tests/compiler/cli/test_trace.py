"""`rolemesh trace`: what goes where, its summary, and its usage errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.compiler.debug.timeline.test_timeline import prefetched
from tests.compiler.debug.timeline.trace_format import check_trace

from rolemesh.compiler.cli.main import main
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.timeline import measure as measure_module
from rolemesh.compiler.debug.timeline.timeline import Machine, timeline

STAGE = prefetched()


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A stage's file."""
    head = {**STAGE.head, "name": "role.phase", "phase": "phase"}
    data = {"schema_version": 1, "kind": "rolemesh.stage", "stage": "partition", "rules": []}
    path = tmp_path / "005_partition.json"
    path.write_text(json.dumps({**data, "program": head, "nodes": STAGE.data["nodes"]}))
    return str(path)


def test_the_trace_goes_to_stdout_and_what_it_adds_up_to_to_stderr(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", run, "--link-gbps", "0.5", "--latency-us", "0"]) == 0
    out, err = capsys.readouterr()
    spans = check_trace(out)
    assert {span["dur"] for span in spans if span["cat"] == "broadcast"} == {80.0}
    assert json.loads(out)["otherData"] == {
        "program": "role.phase",
        "stage": "partition",
        "timeline": "simulated",
        "machine": {**dataclasses.asdict(Machine()), "link_gbps": 0.5, "latency_us": 0.0},
    }
    assert err.splitlines()[0].split() == [
        "us", "total", "compute", "exposed", "overlapped", "bytes", "received"
    ]  # fmt: skip
    assert len(err.splitlines()) == 1 + 2 + 2


def test_the_summary_as_json(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trace.json"
    assert main(["trace", run, "--json", "-o", str(file)]) == 0
    out, err = capsys.readouterr()
    check_trace(file.read_text())
    found = json.loads(out)
    assert err == ""
    assert (found["schema_version"], found["timeline"], len(found["ranks"])) == (1, "simulated", 2)
    first = found["ranks"][0]
    assert first["bytes"] == 42_400
    assert first["total_us"] == round(max(event.end for event in timeline(STAGE)), 3)
    assert set(first["layers"]) == {"layers.0", "layers.1"}


def test_a_simulated_trace_needs_no_torch(run: str) -> None:
    script = f"""
import os, sys
from rolemesh.compiler.cli.main import main
assert main(["trace", {run!r}, "-o", os.devnull]) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


def test_help_says_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["trace", "--help"])
    _, _, text = " ".join(capsys.readouterr().out.split()).partition(
        "the machine that is simulated"
    )
    for field in dataclasses.fields(Machine):
        _, _, about = text.partition(f" --{field.name.replace('_', '-')} X ")
        assert about.partition(")")[0].endswith(f"(default {field.default:g}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "3"], "--tokens is of a measured timeline"),
        (["--measured", "--tflops", "3"], "--tflops is of the simulated timeline"),
        (["--measured", "--role", "decode"], "--measured needs --role and --mesh"),
    ],
)
def test_arguments_of_the_other_timeline_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trace", "hf:llama", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_bad_rates_are_bad_input(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", run, "--memory-gbps", "0"]) == 3
    assert "memory_gbps is 0" in capsys.readouterr().err


def test_a_measured_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[CheckOptions, str | None]] = []

    def measure(options: CheckOptions, phase: str | None, progress: object) -> object:
        asked.append((options, phase))
        return STAGE, timeline(STAGE)

    monkeypatch.setattr(measure_module, "measure", measure)
    arguments = ["--role", "decode", "--mesh", "tp=2", "--program", "decode", "--layers", "1"]
    assert main(["trace", "hf:llama", "--measured", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["otherData"]["timeline"] == "measured"
    ((options, phase),) = asked
    assert (options.model, options.role, str(options.mesh), options.layers, phase) == (
        "hf:llama",
        "decode",
        "tp=2",
        1,
        "decode",
    )
