"""From training to serving, in fewer steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes


def test_what_was_trained_is_served(repository: Path) -> None:
    script = repository / "examples" / "train_to_serve.py"
    command = [sys.executable, str(script), "--steps", "24"]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "trained 24 steps on 4 ranks: loss 5." in run.stdout
    assert run.stdout.count("'One ship") == 1
    assert run.stdout.endswith("every token equals the single device's\n")
