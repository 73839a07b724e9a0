"""Run directories that tests read, written once per test process.

Tests that use them carry `pytestmark = pytest.mark.xdist_group("recorded")`, so that one worker
compiles the models for all.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from rolemesh.compiler.api import Sharded
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.dump.reader import Run, open_run
from rolemesh.compiler.dump.run import shard_case
from rolemesh.compiler.ir.mesh import Mesh

__all__ = ["record", "recorded_run"]


@functools.cache
def record(
    model: str, role: str, mesh: str = "tp=4", layers: int = 2
) -> tuple[Path, dict[str, Sharded]]:
    """The run directory of a tiny model for a role, and its sharded Programs by phase."""
    folder = Path(tempfile.mkdtemp(prefix="rolemesh-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    options = CheckOptions(model, role, Mesh.parse(mesh), layers=layers)
    return folder, shard_case(options, lambda _: None, str(folder))


def recorded_run(model: str, role: str, mesh: str = "tp=4", layers: int = 2) -> Run:
    """The same, read back."""
    return open_run(record(model, role, mesh, layers)[0])
