"""`rolemesh bisect RUN --command`: binary search over the stages of a recorded program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.compiler.recorded import record

from rolemesh.compiler.cli.main import main

pytestmark = pytest.mark.xdist_group("recorded")

STAGES = (
    "capture",
    "canonicalise",
    "seed",
    "absorb",
    "propagate",
    "push_back",
    "partition",
    "gather_once",
    "sink",
    "bucket",
    "prefetch",
    "schedule",
    "verify",
)


def bisect(*arguments: str) -> int:
    run = record("hf:llama", "pd_mixed")[0]
    return main(["bisect", str(run), "--program", "decode", *arguments])


@pytest.mark.parametrize("first", STAGES)
def test_the_first_bad_stage_is_found(first: str, capfd: pytest.CaptureFixture[str]) -> None:
    good = " ".join(f"*_{name}.json" for name in STAGES[: STAGES.index(first)])
    cases = f"{good.replace(' ', '|')}) exit 0;;" if good else ""
    assert (
        bisect("--command", f"echo trying; case {{stage}} in {cases or 'x) ;;'} *) exit 3;; esac")
        == 1
    )
    out, err = capfd.readouterr()
    assert out == f"pd_mixed/decode: {first} is the first bad stage\n"
    assert err.count("trying\n") <= 5


def test_the_text_of_a_stage_can_be_searched(capfd: pytest.CaptureFixture[str]) -> None:
    assert bisect("--command", "! grep -q mesh.all_gather {text}", "--json") == 1
    found = json.loads(capfd.readouterr().out)
    assert (found["schema_version"], found["stages"]) == (1, ["partition"])
    assert found["tried"]["verify"] == 1
    assert found["tried"]["push_back"] == 0


def test_stages_that_cannot_be_told_are_skipped(capfd: pytest.CaptureFixture[str]) -> None:
    command = (
        "case {stage} in *_propagate.json|*_absorb.json|*_seed.json) echo told nothing; exit 125;; "
        "*_capture.json|*_canonicalise.json|*_push_back.json) exit 0;; *) exit 1;; esac"
    )
    assert bisect("--command", command) == 1
    out, err = capfd.readouterr()
    assert out == "pd_mixed/decode: partition is the first bad stage\n"
    assert "told nothing" in err


def test_neighbours_of_skipped_stages_are_all_named(capfd: pytest.CaptureFixture[str]) -> None:
    command = (
        "case {stage} in *_capture.json|*_canonicalise.json|*_seed.json|*_absorb.json|"
        "*_propagate.json) exit 0;; "
        "*_push_back.json|*_partition.json) exit 125;; *) exit 1;; esac"
    )
    assert bisect("--command", command) == 1
    text = capfd.readouterr().out
    assert text == (
        "pd_mixed/decode: the first bad stage is one of push_back, partition, gather_once\n"
    )


def test_nothing_bad_is_fine(capfd: pytest.CaptureFixture[str]) -> None:
    assert bisect("--command", "test -f {stage}") == 0
    assert capfd.readouterr().out == "pd_mixed/decode: no stage is bad\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("true", "'true' names no stage"),
        ("kill -9 $$ # {stage}", "the command was ended by signal 9 for verify"),
        ("exit 200 # {stage}", "the command exited with 200 for verify"),
    ],
)
def test_a_command_that_gives_no_verdict_is_refused(
    command: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bisect("--command", command) == 3
    error = capfd.readouterr().err
    assert f"[RM018] {says}" in error
    assert "fix: " in error


def test_one_stage_by_itself_cannot_be_searched(capfd: pytest.CaptureFixture[str]) -> None:
    path: Path = record("hf:llama", "pd_mixed")[0] / "pd_mixed" / "decode" / "006_partition.json"
    assert main(["bisect", str(path), "--command", "true {stage}"]) == 3
    assert "RM018" in capfd.readouterr().err
