"""On an Ascend NPU: torchair is the real one, and its graphs compute what one CPU computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rolemesh.compiler.command.doctor import examine
from rolemesh.lowering.ge.loader import diagnose, load_torchair
from rolemesh.lowering.ge.native import NativeGraph

FOUND = diagnose()
REASON = f"no torch_npu on CANN in this environment {FOUND.problem and f'({FOUND.problem})'}"

pytestmark = [
    pytest.mark.npu,
    pytest.mark.skipif(not (FOUND.cann and FOUND.version), reason=REASON.strip()),
    pytest.mark.timeout(1800),  # the first compilation of each op takes long
    pytest.mark.xdist_group("npu"),
]

PROGRAM = Path(__file__).with_name("program.py")
TOLERANCE = 1e-3


def devices() -> int:
    load_torchair()
    import torch

    return int(torch.npu.device_count())  # type: ignore[attr-defined]


def run(what: str, ranks: int) -> dict[str, object]:
    """What rank 0 of a program prints."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *command, str(PROGRAM), what],
        check=False,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_doctor_finds_nothing_wrong() -> None:
    found = {entry.name: entry for entry in examine().entries}
    for name in ("CANN", "torch_npu", "torchair"):
        assert found[name].ok, found[name]


def test_torchair_is_the_real_one() -> None:
    loaded = load_torchair()
    assert (loaded.cann, loaded.device) == (True, "npu")
    from torchair.core import _torchair

    assert not issubclass(_torchair.TorchNpuGraphBase, NativeGraph)
    assert str(_torchair.__file__).endswith(".so")
    assert _torchair.GetSocName().startswith("Ascend")


def test_there_is_a_device() -> None:
    assert devices() >= 1


def test_a_model_on_one_npu_equals_the_cpu() -> None:
    errors = run("model", 1)
    assert set(errors) == {f"{p} {what}" for p in ("prefill", "decode") for what in KINDS}
    assert max(map(float, errors.values())) < TOLERANCE, errors  # type: ignore[arg-type]


def test_all_gather_over_hccl() -> None:
    size = devices()
    found = run("all_gather", size)
    expected = [float(10 * rank + 3 * row) for rank in range(size) for row in range(2)]
    assert found == {"size": size, "first_column": expected}


def test_a_model_on_several_npus_equals_the_cpu() -> None:
    size = min(4, devices())
    if size < 2:
        pytest.skip("one NPU")
    errors = run("model", size)
    assert max(map(float, errors.values())) < TOLERANCE, errors  # type: ignore[arg-type]


KINDS = ("logits", "cache")
