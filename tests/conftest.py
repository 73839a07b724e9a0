"""What all tests share: a quiet, offline, single-threaded torch, and golden files.

A golden test calls the `golden` fixture with a name and a text. The expected text lies next to the
test, in ``golden/<name>.txt``; ``pytest --update-golden`` writes it.
"""

from __future__ import annotations

import os

# Read when these libraries are imported, so set before anything below imports torch.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
os.environ["ROLEMESH_CACHE"] = "0"  # what a test compiles is not another test's
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"  # else each process compiles and loads a probe first

import dataclasses
import difflib
import gc
from pathlib import Path

import hypothesis
import pytest
import torch

# One thread: workers and ranks already share the cores, and sums keep one order of addition.
torch.set_num_threads(1)

# Deadlines measure the machine, not the code: the first example of a test may import torch parts.
# Examples are the same in every run, so that a change fails for what it changed; `make fuzz` looks
# for others.
hypothesis.settings.register_profile(
    "rolemesh", deadline=None, print_blob=True, derandomize=True, database=None
)
hypothesis.settings.register_profile("random", deadline=None, print_blob=True)
hypothesis.settings.load_profile("rolemesh")


@dataclasses.dataclass(frozen=True)
class Golden:
    """Compares texts with the files of one golden folder.

    Attributes:
        directory: The folder that holds the expected texts.
        update: Write the files instead of comparing with them.
    """

    directory: Path
    update: bool

    def __call__(self, name: str, text: str) -> None:
        """Compare `text` with ``<name>.txt``, or write it there.

        Args:
            name: File name without its ending.
            text: The text to compare; trailing blanks and a missing last newline do not count.
        """
        path = self.directory / f"{name}.txt"
        actual = "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(actual, encoding="utf-8")
            return
        if not path.exists():
            pytest.fail(f"no golden file {path}; write it with --update-golden", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if actual != expected:
            diff = difflib.unified_diff(
                expected.splitlines(),
                actual.splitlines(),
                fromfile=str(path),
                tofile="this run",
                lineterm="",
            )
            message = "\n".join(["text differs from its golden file:", *diff])
            pytest.fail(f"{message}\nIf the new text is right: --update-golden", pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files instead of comparing with them",
    )


def pytest_collection_finish() -> None:
    """Let the collector skip what was imported, and come less often: traces make many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Golden files of the folder that holds the calling test."""
    return Golden(request.path.parent / "golden", bool(request.config.getoption("update_golden")))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parent.parent
