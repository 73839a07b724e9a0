"""The command line: exit codes, what goes where, help, and the JSON report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import rolemesh
from rolemesh.compiler.cli import main as cli
from rolemesh.compiler.command import check as check_module
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.passes.rules import defaults  # noqa: F401 - all rules are registered

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
        return self.head(self.embedding(tokens))


class Unstable(Tiny):
    calls = 0

    def forward(self, tokens):
        if torch.compiler.is_compiling():
            return super().forward(tokens) + 1
        return super().forward(tokens)


def case(tokens, batch):
    return rolemesh.Case(Tiny().eval(), {"prefill": ((torch.ones(batch, tokens).long(),), {})})


def wrong():
    return rolemesh.Case(Unstable().eval(), {"prefill": ((torch.ones(2, 4).long(),), {})})


def failing():
    return rolemesh.Case(Tiny().eval(), {"prefill": ((torch.full((2, 4), 9),), {})})


def broken():
    raise ValueError("no weights here")


def random():
    model = nn.Sequential(Tiny(), nn.Dropout())
    return rolemesh.Case(model.train(), {"prefill": ((torch.ones(2, 4).long(),), {})})
"""


@pytest.fixture
def cases(tmp_path: Path) -> str:
    path = tmp_path / "cases.py"
    path.write_text(CASE, encoding="utf-8")
    return str(path)


def run(
    capsys: pytest.CaptureFixture[str], *arguments: str, role: str = "prefill", mesh: str = "tp=2"
) -> tuple[int, str, str]:
    code = cli.main(["check", *arguments, "--role", role, "--mesh", mesh])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_equal_is_0(capsys: pytest.CaptureFixture[str], cases: str) -> None:
    code, out, _ = run(capsys, f"{cases}:case", "--tokens", "5", "--batch", "3")
    assert code == 0
    assert "f32[" in out
    assert "embedding.weight" in out
    assert out.rstrip().endswith("equal to the single device")


def test_different_is_1(capsys: pytest.CaptureFixture[str], cases: str) -> None:
    code, out, _ = run(capsys, f"{cases}:wrong")
    assert code == 1
    assert "PROBLEM  prefill: result differs by 1" in out
    assert out.rstrip().endswith("NOT equal to the single device")


def test_different_as_json_is_1_and_says_what_on_stderr(
    capsys: pytest.CaptureFixture[str], cases: str
) -> None:
    code, out, err = run(capsys, f"{cases}:wrong", "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False
    assert "prefill: result differs by 1" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["chek"], "invalid choice: 'chek'"),
        (["check", "hf:llama"], "required: --role, --mesh"),
        (["check", "hf:llama", "--role", "decode", "--mesh", "tp=2", "--tokens", "0"], "positive"),
        (["check", "hf:llama", "--role", "decode", "--mesh", "tp=2", "--batch", "two"], "invalid"),
        (["check", "hf:llama", "--role", "decode", "--mesh", "tp=2", "--dtype", "fp8"], "fp32"),
        (["check", "m", "--role", "r", "--mesh", "tp=2", "--tolerance", "-1"], "at least 0"),
    ],
)
def test_usage_is_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_usage_errors_load_no_torch() -> None:
    script = (
        "import sys\nfrom rolemesh.compiler.cli.main import main\n"
        "try: main(['check', 'm'])\nexcept SystemExit as stop: assert stop.code == 2\n"
        "assert not {'torch', 'numpy', 'sympy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "role", "mesh", "code"),
    [
        (["hf:llama"], "prefil", "tp=2", "RM001"),
        (["hf:llama"], "prefill", "tp", "RM015"),
        (["hf:llama"], "prefill", "tp=0", "RM015"),
        (["hf:llama", "--target", "gpu"], "prefill", "tp=2", "RM003"),
        (["hf:lama"], "prefill", "tp=2", "RM019"),
        (["llama"], "prefill", "tp=2", "RM019"),
        (["missing.py:case"], "prefill", "tp=2", "RM019"),
        (["{cases}:missing"], "prefill", "tp=2", "RM019"),
        (["{cases}:broken"], "prefill", "tp=2", "RM019"),
        (["{cases}:case"], "decode", "tp=2", "RM004"),
        (["{cases}:random"], "prefill", "tp=2", "RM012"),
    ],
)
def test_bad_input_is_3(
    capsys: pytest.CaptureFixture[str],
    cases: str,
    arguments: list[str],
    role: str,
    mesh: str,
    code: str,
) -> None:
    filled = [argument.format(cases=cases) for argument in arguments]
    exit_code, out, err = run(capsys, *filled, role=role, mesh=mesh)
    assert exit_code == 3
    assert out == ""
    assert f"[{code}] " in err
    assert "Traceback" not in err


def test_an_error_in_the_users_file_has_its_line(
    capsys: pytest.CaptureFixture[str], cases: str
) -> None:
    line = CASE[: CASE.index('raise ValueError("no weights')].count("\n") + 1
    _, _, err = run(capsys, f"{cases}:broken")
    assert f"where: {cases}:{line}" in err
    assert "no weights here" in err


def test_a_model_that_fails_on_one_device_is_bad_input(
    capsys: pytest.CaptureFixture[str], cases: str
) -> None:
    code, _, err = run(capsys, f"{cases}:failing")
    assert code == 3
    assert "[RM019] the model fails on a single device, in prefill: IndexError" in err
    assert "fix: make the plain model run first" in err


def test_internal_is_4(
    capsys: pytest.CaptureFixture[str], cases: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("broken invariant")

    monkeypatch.setattr(check_module, "plan", fail)
    code, out, err = run(capsys, f"{cases}:case")
    assert code == 4
    assert out == ""
    assert "Traceback" in err
    assert "broken invariant" in err
    assert "please report it" in err


@pytest.mark.parametrize("error", ["RM013", "RM016"])
def test_errors_that_no_input_explains_are_4(
    capsys: pytest.CaptureFixture[str], cases: str, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    def fail(*args: object) -> None:
        raise RolemeshError(error, "it went wrong")

    monkeypatch.setattr(check_module, "reference", fail)
    assert run(capsys, f"{cases}:case")[0] == 4


def test_interrupted_is_130(
    capsys: pytest.CaptureFixture[str], cases: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_module, "reference", interrupt)
    code, _, err = run(capsys, f"{cases}:case")
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--tokens", "7", "--batch", "3", "--layers", "1", "--json")
    code, out, _ = run(capsys, "hf:llama", *arguments, role="pd_mixed", mesh="tp=4")
    report = json.loads(out)
    assert code == 0
    assert list(report) == [
        "schema_version",
        "ok",
        "model",
        "role",
        "mesh",
        "target",
        "phases",
        "storage",
    ]
    assert report["schema_version"] == 1
    assert report["ok"] is True
    assert report["model"] == "hf:llama"
    assert report["role"] == "pd_mixed"
    assert report["mesh"] == {"tp": 4}
    assert report["target"] == "eager"
    assert [phase["phase"] for phase in report["phases"]] == ["prefill", "decode"]
    keys = ["op", "axis", "dim", "shape", "dtype", "bytes", "count", "cause"]
    for phase in report["phases"]:
        assert list(phase) == ["phase", "nodes", "max_abs_err", "collectives"]
        assert phase["max_abs_err"] < 1e-4
        for row in phase["collectives"]:
            assert list(row) == keys
            assert row["axis"] == "tp"
            assert row["count"] >= 1
            assert row["cause"]
        distinct = [tuple(str(row[key]) for key in keys if key != "count") for row in
                    phase["collectives"]]  # fmt: skip
        assert len(set(distinct)) == len(distinct)
    for row in report["storage"]:
        assert list(row) == ["name", "shape", "layout", "bytes_local"]
    (output,) = [row for row in report["storage"] if "o_proj" in row["name"]]
    assert output["shape"] == [72, 96]
    assert output["layout"] == "f32[72, (4@tp x 24)]"
    assert output["bytes_local"] == 72 * 24 * 4


def test_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "hf:llama", "--dtype", "bf16", "--layers", "1", role="decode")
    assert code == 0, out
    assert "bf16[" in out


def test_help_has_examples_and_tolerances(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("check", "doctor"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert "examples:" in text
        assert f"  rolemesh {command}" in text
        assert "exit codes:" in text
        if command == "check":
            assert "(default 1e-3)" in text
            assert "(default 5e-1" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"rolemesh {rolemesh.__version__}\n"


@pytest.mark.processes
def test_processes(capsys: pytest.CaptureFixture[str], cases: str) -> None:
    code, out, _ = run(capsys, f"{cases}:case", "--processes")
    assert code == 0
    assert "eager, 2 processes" in out
    code, _, err = run(capsys, f"{cases}:random", "--processes")
    assert code == 3
    assert "[RM012] " in err
