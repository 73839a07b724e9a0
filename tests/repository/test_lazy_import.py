"""`import rolemesh` and `rolemesh --help` load no torch; the public names resolve."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rolemesh

HEAVY = ("torch", "torch_npu", "transformers", "numpy", "sympy")

# Each prints its heavy modules last, on a line of its own: --help writes to the same stream.
REPORT = f"print(); print('loaded:', *[m for m in {HEAVY!r} if m in sys.modules])"
IMPORT = f"import sys, rolemesh; rolemesh.__version__; dir(rolemesh); {REPORT}"
HELP = f"""
import sys
from rolemesh.compiler.cli.main import main
sys.argv = ["rolemesh", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
{REPORT}
"""
CONTROL = f"import sys, rolemesh, torch; {REPORT}"


def _loaded(script: str) -> tuple[str, list[str]]:
    """Run `script` in a new interpreter; its output, and the heavy modules it loaded."""
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    output, _, loaded = run.stdout.rpartition("loaded:")
    return output, loaded.split()


def test_import_loads_nothing_heavy() -> None:
    assert _loaded(IMPORT)[1] == []


def test_help_loads_nothing_heavy() -> None:
    output, loaded = _loaded(HELP)
    assert "usage: rolemesh" in output
    assert loaded == []


def test_the_probe_sees_torch() -> None:
    assert "torch" in _loaded(CONTROL)[1]


@pytest.mark.parametrize("name", sorted(rolemesh.__all__))
def test_public_name_resolves(name: str) -> None:
    assert getattr(rolemesh, name) is not None
    assert name in dir(rolemesh)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'rolemesh' has no attribute 'meshes'"):
        _ = rolemesh.meshes


def test_table_agrees_with_all_and_with_what_type_checkers_see(repository: Path) -> None:
    tree = ast.parse((repository / "src/rolemesh/__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == dict(rolemesh._EXPORTS)
    assert sorted([*typed, "__version__"]) == sorted(rolemesh.__all__)
