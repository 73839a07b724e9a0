"""The demo, with fewer layers: it passes, prints a table per role, and notices what is wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rolemesh.compiler.command.report import CollectiveRow, PhaseReport

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def demo(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", repository / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_two_layers_of_every_role(repository: Path) -> None:
    command = [sys.executable, str(repository / "examples" / "demo.py"), "--layers", "2"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    for role in ("prefill", "decode", "pd_mixed"):
        assert f"\nrole {role}\n" in run.stdout
    assert run.stdout.count("  =\n") == 9, "one row per kind of collective"
    assert run.stdout.count("greedy tokens equal one device's") == 3
    assert all(len(line) <= 120 for line in run.stdout.splitlines())
    assert run.stderr == ""


def phase_of(*rows: tuple[str, str, int, int]) -> PhaseReport:
    collectives = tuple(
        CollectiveRow(op, "tp", 0, (1,), "float32", size, count, "", f"model.layers.*.{module}")
        for op, module, size, count in rows
    )
    return PhaseReport("decode", 1, 1, 0.0, 0.0, collectives)


def test_traffic_that_differs_from_the_formula(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ("all_reduce", "self_attn.o_proj", 2688, 2)
    elsewhere = ("all_reduce", "mlp", 77, 2)
    assert demo.print_traffic("decode", phase_of(right, elsewhere), 2)
    assert not demo.print_traffic(
        "decode", phase_of(("all_reduce", "self_attn.o_proj", 2684, 2)), 2
    )
    assert not demo.print_traffic(
        "decode", phase_of(("all_reduce", "self_attn.o_proj", 2688, 3)), 2
    )
    assert not demo.print_traffic("decode", phase_of(), 2)
    assert not demo.print_traffic("decode", phase_of(right, ("all_gather", "self_attn", 8, 2)), 2)
    assert "UNEXPECTED: 2 all_gather, 16 bytes" in capsys.readouterr().out
