"""The generation example: torchrun starts it, it loads shards, and its tokens are one device's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.processes
def test_two_ranks_under_torchrun(repository: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(repository / "examples" / "generate.py")]
    command += ["--tiny", "qwen3_moe", "--prompt-tokens", "3", "6", "--new-tokens", "2"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "every token equals the single device's" in run.stdout
    assert "mesh tp=2, 2 programs" in run.stdout
    assert run.stdout.count(" prompt tokens -> ") == 2
