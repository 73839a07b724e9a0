"""One architecture through `rolemesh check`, in every role, and the reason where one is not ok."""

from __future__ import annotations

import os
import re
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from tests.coverage.architectures import Architecture
from tests.coverage.table import OK, Row

from rolemesh.compiler.command.check import check
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.models.cases import Case
from rolemesh.passes.rules.registry import MissingRuleWarning

__all__ = ["measure"]

_MESH = Mesh({"tp": 4})
_REASON_LENGTH = 300
# Where the cause of an error is looked for: the innermost frame of the model or of the compiler.
_SOURCES = ("transformers", "rolemesh", "compiler", "passes", "lowering", "runtime")


def measure(architecture: Architecture, roles: Sequence[str] = ()) -> Row:
    """Check one architecture in this process.

    Args:
        architecture: The architecture.
        roles: The roles to check; by default all that it has.
    """
    verdicts = {}
    unruled: set[str] = set()
    case: Case | None = None
    for role in roles or architecture.roles:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MissingRuleWarning)
            try:
                options = CheckOptions(architecture.model, role, _MESH)
                case = options.load() if case is None else case
                report = check(options, case=case)
                problem = "; ".join(report.all_problems[:1])
            except Exception as error:  # noqa: BLE001 - the reason is the row's verdict
                problem = _reason(error)
        verdicts[role] = _shortened(problem) or OK
        unruled |= {
            str(entry.message).split()[1]
            for entry in caught
            if issubclass(entry.category, MissingRuleWarning)
        }
    return Row(verdicts, tuple(sorted(unruled)))


def _reason(error: Exception) -> str:
    if isinstance(error, RolemeshError):
        return f"[{error.code}] {error.what}; where: {error.where}; why: {error.why}"
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if set(Path(frame.filename).parts) & set(_SOURCES)]
    place = ours[-1] if ours else frames[-1]
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}; where: {place.filename}:{place.lineno}"


def _shortened(reason: str) -> str:
    """One line, with paths from the package on, and without addresses."""
    text = " ".join(reason.split())
    text = re.sub(r"/\S*/(?:site-packages|src)/", "", text)
    text = text.replace(str(Path.cwd()) + os.sep, "")
    text = re.sub(r"0x[0-9a-f]{6,}", "0x...", text)
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 3] + "..."
