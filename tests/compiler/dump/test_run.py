"""Run directories of whole cases: of `rolemesh dump`, and of a check."""

from __future__ import annotations

from pathlib import Path

import pytest

from rolemesh.compiler.cli import main as cli
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.dump.reader import open_run
from rolemesh.compiler.dump.run import dump_case
from rolemesh.compiler.ir.mesh import Mesh

CASE = """
import torch
from torch import nn

import rolemesh


def case(tokens, batch):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8)).eval()
    return rolemesh.Case(model, {"prefill": ((torch.ones(batch, tokens).long(),), {})})
"""


@pytest.fixture
def case(tmp_path: Path) -> str:
    path = tmp_path / "cases.py"
    path.write_text(CASE, encoding="utf-8")
    return f"{path}:case"


def test_a_case_is_compiled_and_not_run(case: str, tmp_path: Path) -> None:
    said: list[str] = []
    options = CheckOptions(case, "prefill", Mesh({"tp": 2}), target="ge")
    found = dump_case(options, str(tmp_path / "run"), said.append)
    assert said[1:] == ["compiling prefill", "lowering prefill for 2 ranks"]
    (program,) = open_run(found.folder).programs
    assert list(found.seconds) == [program.id] == ["prefill/prefill"]
    names = [f"{number:03}_{name}" for number, name in enumerate(program.stage_names)]
    assert list(found.seconds[program.id]) == names
    assert [path.name for path in program.graphs] == [
        f"prefill.prefill.rank{rank}.pbtxt" for rank in range(2)
    ]


def check(case: str, *arguments: str) -> int:
    return cli.main(["check", case, "--role", "prefill", "--mesh", "tp=2", *arguments])


def test_a_check_writes_what_it_compiled(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(case, "--dump", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out.rstrip().endswith("equal to the single device")
    assert [program.id for program in open_run(tmp_path / "run").programs] == ["prefill/prefill"]


@pytest.mark.processes
def test_each_process_of_a_check_writes_its_own(case: str, tmp_path: Path) -> None:
    assert check(case, "--processes", "--dump", str(tmp_path / "run")) == 0
    for rank in range(2):
        run = open_run(tmp_path / "run", rank)
        assert [program.id for program in run.programs] == ["prefill/prefill"]
        assert run.program().stage().name == "verify"
