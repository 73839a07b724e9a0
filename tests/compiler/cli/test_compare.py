"""`rolemesh compare` and `rolemesh bisect MODEL`: exit codes, text, JSON and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from rolemesh.compiler.cli.main import main
from rolemesh.passes import canonicalise

CASE = """
import torch
from torch import nn

import rolemesh


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


def case(tokens, batch):
    return rolemesh.Case(Tiny().eval(), {"prefill": ((torch.ones(batch, tokens).long(),), {})})
"""


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    path = tmp_path / "tiny.py"
    path.write_text(CASE)
    return [f"{path}:case", "--role", "prefill", "--mesh", "tp=3", "--tokens", "5"]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canonicalise takes tanh for a sigmoid."""
    right = canonicalise._Rewriter._rewrite

    def wrong(self: canonicalise._Rewriter, node: fx.Node) -> fx.Node:
        found = right(self, node)
        if node.target is torch.ops.aten.tanh.default:
            found.target = torch.ops.aten.sigmoid.default
        return found

    monkeypatch.setattr(canonicalise._Rewriter, "_rewrite", wrong)


def test_a_right_model_is_equal(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *model]) == 0
    text = capsys.readouterr().out
    assert text.startswith("phase prefill\n")
    assert "first difference" not in text
    assert main(["compare", *model, "--rank", "1", "--stage", "verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["ok"], found["mesh"]) == (1, True, {"tp": 3})
    (phase,) = found["phases"]
    (stage,) = phase["stages"]
    assert (phase["phase"], stage["stage"], stage["divergent"]) == ("prefill", "verify", 0)
    assert {"embedding", "tanh"} <= {node["name"] for node in stage["nodes"]}


@pytest.mark.usefixtures("broken")
def test_a_difference_is_named(model: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *model]) == 1
    text = capsys.readouterr().out
    assert "first difference, after canonicalise:\n    %tanh = aten.sigmoid.default" in text
    assert "at tiny.py:15" in text


@pytest.mark.usefixtures("broken")
def test_bisect_writes_a_script(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "found.py"
    assert main(["bisect", *model, "--out", str(script)]) == 1
    text = capsys.readouterr().out
    assert "phase prefill: pass canonicalise gives %tanh another value than" in text
    assert "smallest part that fails: 1 op: %tanh" in text
    assert f"{model[0]} --role prefill --mesh tp=3 --tokens 5" in script.read_text()
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.startswith("%tanh after canonicalise differs from the single device: ")
    assert main(["bisect", *model, "--out", str(script), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["stage"], found["ops"]) == (False, "canonicalise", ["tanh"])
    assert Path(found["data"]).is_file()


def test_bisect_of_a_right_model_writes_nothing(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bisect", *model, "--out", str(tmp_path / "none.py")]) == 0
    assert capsys.readouterr().out == "every stage is equal to the single device\n"
    assert not (tmp_path / "none.py").exists()


def test_bisect_says_what_a_model_needs(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(["bisect", model[0], "--role", "prefill"])
    assert error.value.code == 2
    assert "a model needs --mesh, a run directory needs --command" in capsys.readouterr().err


def test_a_script_that_cannot_be_written_is_bad_input(
    model: list[str], broken: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bisect", *model, "--out", str(tmp_path / "no" / "such.py")]) == 3
    assert "[RM018] cannot write" in capsys.readouterr().err
