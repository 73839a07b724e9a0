"""The README's example runs under torchrun and prints the single device's tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rolemesh.compiler.models.cases import load_case


def expected() -> list[str]:
    case = load_case("hf:llama")
    (tokens,), state = case.phases["prefill"]
    lines = []
    with torch.no_grad():
        for _ in range(6):
            tokens = case.model(tokens, **state).logits[:, -1:].argmax(-1)
            lines.append(str(tokens.flatten().tolist()))
    return lines


@pytest.mark.processes
def test_prints_the_tokens_of_one_device(repository: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    run = subprocess.run(
        [*torchrun, *rendezvous, str(repository / "examples" / "quickstart.py")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == expected()


def test_the_readme_shows_it(repository: Path) -> None:
    """Every line of code in the README's example is one of the file's, in order."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    shown = readme.split("```python\n")[1].split("```")[0].splitlines()
    lines = iter((repository / "examples" / "quickstart.py").read_text("utf-8").splitlines())
    for line in filter(None, shown):
        assert line in lines, f"not in examples/quickstart.py, or out of order: {line}"
