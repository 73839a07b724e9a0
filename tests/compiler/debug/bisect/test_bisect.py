"""Bisect names the pass that was broken on purpose; its script reproduces the fault by itself."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.compiler.debug.compare import faults

from rolemesh.compiler.debug.bisect.bisect import Fault, first_fault
from rolemesh.compiler.debug.bisect.replay import Replay
from rolemesh.compiler.debug.bisect.repro import Repro
from rolemesh.compiler.debug.bisect.reproduce import reproduce, write_script
from rolemesh.compiler.debug.bisect.subgraph import Parts
from rolemesh.compiler.debug.compare.stages import PhaseRun
from rolemesh.compiler.ir.errors import RolemeshError

pytestmark = pytest.mark.xdist_group("faults")

Break = Callable[[], AbstractContextManager[object]]


def quiet(message: str) -> None:
    del message


def found(run: PhaseRun) -> Fault:
    fault = first_fault(run, 1e-3, quiet)
    assert fault is not None
    return fault


def written(fault: Fault, folder: Path) -> tuple[Path, Path]:
    script = folder / "fault.py"
    return script, write_script(fault.repro, script, fault.title, "rolemesh bisect MODEL")


def right_part(fault: Fault, run: PhaseRun) -> Repro:
    """The same part of the same stage as the passes really make it."""
    repro = fault.repro
    assert isinstance(repro, Repro)
    parts = Parts(run.at(fault.stage), lambda _: True)
    after = parts.part([name for name in fault.ops if name in parts.nodes], [repro.target])
    return dataclasses.replace(repro, after=after)


@pytest.mark.parametrize(
    ("broken", "phase", "role", "stage", "ops"),
    [
        (faults.roots_for_inverses, "decode", "decode", "canonicalise", ("rsqrt_2",)),
        (
            faults.one_buffer_for_all,
            "prefill",
            "prefill",
            "prefetch",
            ("broadcast_start", "broadcast_start_2", "wait"),
        ),
        (faults.drops_all_reduces, "decode", "decode", "partition", ("pow_1",)),
    ],
)
def test_a_script_reproduces_a_broken_pass(
    broken: Break,
    phase: str,
    role: str,
    stage: str,
    ops: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with broken():
        fault = found(faults.shard_again(phase, role))
    assert (fault.stage, fault.ops) == (stage, ops)
    assert fault.node is not None
    assert not fault.node.gap.equal
    script, data = written(fault, tmp_path)
    says = f"%{fault.node.name} after {stage} differs from the single device: max abs error "
    if broken is faults.one_buffer_for_all:  # has ops of ours, which the script must import
        ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
        assert ran.returncode == 1, ran.stderr
        assert ran.stdout.startswith(says)
    else:
        with pytest.raises(SystemExit, match=r"^True$"):
            runpy.run_path(str(script), run_name="__main__")
        assert capsys.readouterr().out.startswith(says)
    right_part(fault, faults.shard_again(phase, role)).write(data)
    there, text = reproduce(data)
    assert (there, text) == (
        False,
        f"%{fault.node.name} after {stage} is equal to the single device",
    )


@pytest.mark.parametrize(
    ("broken", "phase", "role", "mesh", "stage", "node"),
    [
        (faults.sums_are_maxima, "decode", "decode", "tp=4", "propagate", "mm_3"),
        (faults.forgets_layouts, "decode", "pd_mixed", "tp=4", "push_back", "reshape_5"),
        (faults.gathers_the_wrong_dim, "prefill", "pd_mixed", "tp=4", "partition", "all_gather_3"),
        (faults.leaves_pads, "decode", "decode", "tp=5", "partition", "mm_3"),
    ],
)
def test_each_pass_is_told_from_the_others(
    broken: Break, phase: str, role: str, mesh: str, stage: str, node: str, tmp_path: Path
) -> None:
    with broken():
        fault = found(faults.shard_again(phase, role, mesh))
    assert (fault.stage, fault.ops) == (stage, (node,))
    script, data = written(fault, tmp_path)
    there, text = reproduce(data)
    assert there
    assert f"%{node} after {stage} differs" in text
    assert f"%{node}" in script.read_text()


def test_right_passes_have_no_fault() -> None:
    assert first_fault(faults.shard_again("decode", "decode", "tp=2"), 1e-3, quiet) is None


@pytest.mark.parametrize(
    ("broken", "stage", "error", "most", "last"),
    [
        (faults.without_silu, "propagate", "ValueError: silu is not known", 100, "silu"),
        (faults.refuses_all_reduces, "partition", "KeyError: 'all_reduce'", 1, "embedding"),
        (
            faults.verify_refuses_silu,
            "verify",
            "RolemeshError: [RM016] %silu is refused",
            1,
            "silu",
        ),
    ],
)
def test_a_pass_that_raises_is_the_fault(
    broken: Break, stage: str, error: str, most: int, last: str, tmp_path: Path
) -> None:
    with broken():
        fault = found(faults.shard_again("decode", "decode"))
        assert isinstance(fault.repro, Replay)
        assert (fault.stage, fault.node, fault.error) == (stage, None, error)
        assert fault.title == f"pass {stage} raises {error}"
        assert len(fault.ops) <= most
        assert fault.ops[-1] == last
        _, data = written(fault, tmp_path)
        assert reproduce(data) == (True, f"{stage} raises {error}")
    assert reproduce(data) == (False, f"{stage} raises nothing")


def test_a_data_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with faults.roots_for_inverses():
        _, data = written(found(faults.shard_again("decode", "decode")), tmp_path)
    content = json.loads(data.read_text())
    for change, why in (
        ({"kind": "rolemesh.run"}, "it is of kind 'rolemesh.run'"),
        ({"schema_version": 99}, "schema version 99"),
        ({"after": {}}, "KeyError"),
    ):
        data.write_text(json.dumps(content | change))
        with pytest.raises(RolemeshError) as error:
            reproduce(data)
        assert error.value.code == "RM035"
        assert why in str(error.value)
