"""Run directories as they are written: names, contents, what is replaced, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.compiler.dump.runs import Mlp, contents, write_run
from tests.models import forget_compiled

from rolemesh.compiler.api import lower
from rolemesh.compiler.dump.reader import open_run
from rolemesh.compiler.dump.record import RunWriter
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.serial import decode_program
from rolemesh.passes.partition import Partition
from rolemesh.runtime.launch import run_processes

PASSES = (
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
FILES = {
    f"{number:03}_{name}.{form}" for number, name in enumerate(PASSES) for form in ("txt", "json")
}


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there" / "run"
    write_run(str(here))
    seed = "22" if os.environ.get("PYTHONHASHSEED") != "22" else "1"
    subprocess.run(
        [sys.executable, "-m", "tests.compiler.dump.runs", str(there)],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        timeout=120,
    )
    found = contents(here)
    assert contents(there) == found
    names = {f"no_role/call/{name}" for name in FILES}
    assert found.keys() == {"index.json", "index.md", *names}
    for content in found.values():
        assert str(tmp_path).encode() not in content


def test_stages_are_the_program_after_each_pass(tmp_path: Path) -> None:
    sharded = write_run(str(tmp_path / "run"))
    (recorded,) = open_run(tmp_path / "run").programs
    assert recorded.stage_names == PASSES
    programs = {
        "capture": sharded.traced.program,
        "push_back": sharded.stages.decided,
        "verify": sharded.program,
    }
    for name, program in programs.items():
        stage = recorded.stage(name)
        assert stage.text == str(program)
        assert str(decode_program(stage.head, stage.data["nodes"])) == stage.text  # type: ignore[arg-type]
    for stage in recorded.stages():
        assert stage.text.startswith(f"program {stage.head['name']}")
        assert stage.head["history"] == list(PASSES[: stage.number + 1])
    moved = {node.name: node.collective for node in recorded.stage().nodes.values()}
    expected = {record.node: record.bytes_received for record in sharded.collectives}
    assert expected
    assert {name: c["bytes"] for name, c in moved.items() if c} == expected
    entry = recorded.entry["stages"][-1]
    assert entry["collectives"] == len(expected)
    assert entry["bytes"] == sum(expected.values())


def test_a_decision_names_its_rule_and_alternatives(tmp_path: Path) -> None:
    write_run(str(tmp_path / "run"))
    stage = open_run(tmp_path / "run").program().stage("push_back")
    products = [node for node in stage.nodes.values() if node.op == "aten.mm.default"]
    assert len(products) == 2
    for node in products:
        assert node.decision is not None
        rule = stage.rules[node.decision["rule"]]
        assert rule.startswith("([i, j], [j, k])->([i, k]) {")
        (alternatives,) = node.decision["alternatives"]
        assert node.decision["choices"][0] in [entry["choice"] for entry in alternatives]
    assert {node.decision["choices"][0] for node in products if node.decision} == {
        "split k",
        "split j",
    }


def test_the_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROLEMESH_DUMP", str(tmp_path / "by variable"))
    write_run(None)
    write_run(str(tmp_path / "by option"))  # which goes before
    for name in ("by variable", "by option"):
        assert len(open_run(tmp_path / name).programs) == 1


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ROLEMESH_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    assert write_run(None).stages.record is None
    assert not contents(tmp_path)


def test_programs_of_one_phase_are_numbered(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        write_run(str(folder))
    run = open_run(folder)
    assert [program.id for program in run.programs] == ["no_role/call", "no_role/call.2"]
    first, second = (contents(folder / program.id) for program in run.programs)
    assert first == second
    assert first.keys() == FILES


def test_target_ge_adds_a_graph_of_each_rank(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lower(write_run(str(folder)), "ge").lockstep()
    program = open_run(folder).program()
    assert [graph["rank"] for graph in program.entry["ge"]] == [0, 1, 2]
    for graph in program.entry["ge"]:
        for form in ("text", "pbtxt"):
            content = (folder / graph[form]["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == graph[form]["sha256"]
    assert [path.name.rpartition(".rank")[2] for path in program.graphs] == [
        f"{rank}.pbtxt" for rank in range(3)
    ]
    page = (folder / "index.md").read_text(encoding="utf-8")
    assert "| rank 2 | [text](no_role/call/ge/" in page


def test_the_page_links_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(str(folder))
    page = (folder / "index.md").read_text(encoding="utf-8")
    assert "## no_role/call on mesh tp=3" in page
    for name in FILES:
        assert f"](no_role/call/{name})" in page


def test_a_pass_that_fails_leaves_the_stages_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Partition, program: Program) -> Program:
        raise ValueError("partition does not work today")

    monkeypatch.setattr(Partition, "apply", fail)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="does not work today"):
        write_run(str(folder))
    program = open_run(folder).program()
    assert program.stage_names == PASSES[:6]
    assert [stage.name for stage in program.stages()] == list(PASSES[:6])
    assert contents(folder / "no_role/call").keys() == {
        name for name in FILES if name[4:].partition(".")[0] in PASSES[:6]
    }


# ---------------------------------------------------------------------------- processes, and pieces


def compile_pieces(folder: str) -> None:
    forget_compiled()
    options = {"mesh": {"tp": 2}, "role": "prefill", "dump": folder}
    model = torch.compile(Mlp(breaks=True).eval(), backend="rolemesh", options=options)
    with torch.no_grad():
        model(torch.arange(10).reshape(2, 5))


@pytest.mark.processes
def test_every_rank_writes_a_run_of_all_pieces(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_processes(compile_pieces, 2, (str(folder),), fork=True)
    assert sorted(path.name for path in folder.iterdir()) == ["rank_0", "rank_1"]
    ranks = [contents(folder / name) for name in ("rank_0", "rank_1")]
    assert ranks[0] == ranks[1]
    for rank in (None, 0, 1):
        run = open_run(folder, rank)
        assert run.folder == folder / f"rank_{rank or 0}"
        assert [program.id for program in run.programs] == ["prefill/prefill", "prefill/prefill.2"]
        ops = [
            {node.op for node in program.stage("capture").nodes.values()}
            for program in run.programs
        ]
        assert "aten.embedding.default" in ops[0]
        assert "aten.embedding.default" not in ops[1]


# --------------------------------------------------------------------------------- what was there


def test_an_old_run_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(str(folder))
    (folder / "notes.txt").write_text("mine")
    (folder / "no_role" / "call" / "notes.txt").write_text("mine too")
    (folder / "rank_0").mkdir()
    RunWriter(folder)
    assert contents(folder).keys() == {
        "index.json",
        "index.md",
        "notes.txt",
        "no_role/call/notes.txt",
    }
    assert (folder / "rank_0").is_dir()
    assert not open_run(folder).programs


def test_folders_that_become_empty_go(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(str(folder))
    RunWriter(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "index.md"]


def test_an_edited_index_removes_nothing_outside(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunWriter(folder)
    for name in ("precious", "run/precious"):
        (tmp_path / name).write_text("mine")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    names = ["../precious", str(tmp_path / "precious"), "no_role/../precious"]
    index["programs"] = [{"stages": [{"text": {"file": name}}]} for name in names]
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    RunWriter(folder)
    assert (tmp_path / "precious").exists()
    assert (folder / "precious").exists()


def refusal(folder: Path) -> str:
    with pytest.raises(RolemeshError) as refused:
        RunWriter(folder)
    assert refused.value.code == "RM036"
    return str(refused.value)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    text = refusal(tmp_path)
    assert f"{str(tmp_path)!r} has files that are not a run directory's" in text
    assert "name an empty or new folder" in text
    (tmp_path / "index.json").write_text('{"kind": "something else"}')
    assert "are not a run directory's" in refusal(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    text = refusal(tmp_path / "file" / "run")
    assert f"cannot write the run directory {str(tmp_path / 'file' / 'run')!r}" in text
    assert "NotADirectoryError" in text
    folder = tmp_path / "run"
    (folder / "no_role").mkdir(parents=True)
    (folder / "no_role" / "call").write_text("")
    (folder / "index.json").write_text('{"kind": "rolemesh.run"}')
    with pytest.raises(RolemeshError, match=r"\[RM036\] cannot write"):
        write_run(str(folder))
