"""The source tree keeps the house rules that a parser can check.

Imports run one way::

    compiler.ir < -passes < -lowering < -runtime < -compiler

and every module is imported absolutely, by its installed name, lists its public names in
``__all__`` and has at most 500 lines. The compiler of programs (`compiler.ir`, `passes`) never
imports torch.distributed: a program names mesh axes, process groups exist only at run time.

An import counts wherever it stands: at the top, in a function, or under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDERS = ("compiler", "passes", "lowering", "runtime")
ORDER = ("compiler.ir", "passes", "lowering", "runtime", "compiler")
WITHOUT_GROUPS = ("compiler.ir", "passes")
MAX_LINES = 500


class Import(NamedTuple):
    """One imported name: the line, and the absolute dotted path."""

    line: int
    target: str


def module_name(path: Path, root: Path) -> str:
    """The dotted name below rolemesh: passes/rules/matmul.py -> passes.rules.matmul."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int:
    """Position in ORDER of a module below rolemesh."""
    # Python runs compiler/__init__.py before any module of compiler.ir, so it belongs to the leaf.
    if module == "compiler":
        return 0
    return next(index for index, package in enumerate(ORDER) if is_below(module, package))


def dotted(node: ast.expr) -> str:
    """`torch.distributed.new_group` as text; empty for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imports(tree: ast.Module) -> Iterator[Import]:
    """Every absolute import of a file, and every import_module("...") with a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (Import(node.lineno, f"{node.module}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "import_module":
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(node.lineno, argument.value)


def import_problem(module: str, target: str) -> str | None:
    """Say what is wrong with `module` importing `target`, if anything is."""
    first, _, ours = target.partition(".")
    if first in FOLDERS:
        return f"imports {target} by its bare name, not rolemesh.{target}"
    if first != "rolemesh":
        return None
    if ours == "__version__":
        return None
    if ours.split(".")[0] not in FOLDERS:
        return f"imports {target} through the public front, not from the module that defines it"
    if layer(ours) > layer(module):
        return f"imports {target}: the arrow runs backwards"
    return None


def import_problems(module: str, tree: ast.Module) -> Iterator[str]:
    for line, target in imports(tree):
        problem = import_problem(module, target)
        if problem:
            yield f"{line}: {problem}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield f"{node.lineno}: relative import"
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield f"{node.lineno}: star import"


def group_problems(module: str, tree: ast.Module) -> Iterator[str]:
    if not any(is_below(module, package) for package in WITHOUT_GROUPS):
        return
    for line, target in imports(tree):
        if is_below(target, "torch.distributed"):
            yield f"{line}: imports {target}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.distributed":
            yield f"{node.lineno}: uses torch.distributed"


def has_all(tree: ast.Module) -> bool:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return True
    return False


def all_problems(path: Path, tree: ast.Module) -> Iterator[str]:
    # A package file that imports nothing exports nothing. Other modules are private by their name.
    is_empty_package = path.name == "__init__.py" and not any(imports(tree))
    is_private = path.name.startswith("_") and path.name != "__init__.py"
    if not (is_empty_package or is_private or has_all(tree)):
        yield "1: no __all__"


def problems(root: Path) -> list[str]:
    """Every broken rule below `root`, as `path:line: problem`."""
    found = []
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
        module = module_name(path, root)
        lines = [
            *import_problems(module, tree),
            *group_problems(module, tree),
            *all_problems(path, tree),
        ]
        if source.count("\n") > MAX_LINES:
            lines.append(f"{MAX_LINES}: more than {MAX_LINES} lines; split it by reason to exist")
        found += [f"{path.relative_to(root).as_posix()}:{line}" for line in lines]
    return found


def test_source_tree_keeps_the_rules(repository: Path) -> None:
    assert (repository / "compiler" / "ir" / "errors.py").exists()
    assert problems(repository) == []


GOOD = '__all__ = ["x"]\n'


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("compiler/ir/a.py", "import rolemesh.passes.b", "arrow runs backwards"),
        ("compiler/ir/a.py", "from rolemesh import passes", "arrow runs backwards"),
        ("compiler/ir/a.py", "from rolemesh.compiler import cases", "arrow runs backwards"),
        ("compiler/__init__.py", "from rolemesh.compiler.api import x", "arrow runs backwards"),
        ("passes/a.py", "from rolemesh.lowering.b import c", "arrow runs backwards"),
        ("passes/a.py", "def f():\n    import rolemesh.runtime.b", "arrow runs backwards"),
        ("lowering/a.py", "from rolemesh.runtime import b", "arrow runs backwards"),
        ("runtime/a.py", "from rolemesh.compiler.backend import b", "arrow runs backwards"),
        (
            "runtime/a.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from rolemesh.compiler.api import b",
            "arrow runs backwards",
        ),
        (
            "runtime/a.py",
            'import importlib\nimportlib.import_module("rolemesh.compiler.api")',
            "arrow runs backwards",
        ),
        ("runtime/a.py", "from rolemesh import Mesh", "public front"),
        ("runtime/a.py", "import rolemesh", "public front"),
        ("passes/a.py", "import passes.b", "bare name"),
        ("passes/a.py", "from compiler.ir import mesh", "bare name"),
        ("passes/a.py", "from . import b", "relative import"),
        ("passes/a.py", "from rolemesh.compiler.ir.mesh import *", "star import"),
        ("passes/a.py", "import torch.distributed as dist", "imports torch.distributed"),
        ("passes/a.py", "from torch import distributed", "imports torch.distributed"),
        (
            "compiler/ir/a.py",
            "import torch\ntorch.distributed.get_rank()",
            "uses torch.distributed",
        ),
        pytest.param("passes/a.py", "\n" * 500, "more than 500 lines", id="500 lines"),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, path: str, source: str, expected: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(GOOD + source + "\n")
    found = problems(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:")
    assert expected in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [("passes/a.py", "x = 1"), ("passes/rules/__init__.py", "from rolemesh.passes import a")],
)
def test_a_missing_all_is_found(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert problems(tmp_path) == [f"{path}:1: no __all__"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("passes/a.py", "import torch\nfrom rolemesh.compiler.ir.mesh import Mesh"),
        ("passes/a.py", "from rolemesh.compiler import ir"),
        ("lowering/a.py", "from rolemesh.passes.b import c"),
        ("runtime/a.py", "import torch.distributed\nimport rolemesh.lowering.b"),
        ("compiler/cli/main.py", "from rolemesh import __version__\nimport rolemesh.runtime.b"),
    ],
)
def test_a_forward_arrow_passes(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(GOOD + source + "\n")
    assert problems(tmp_path) == []


def test_package_files_and_private_modules_need_no_all(tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text('"""Passes."""\n')
    (tmp_path / "passes" / "_tables.py").write_text("x = 1\n")
    assert problems(tmp_path) == []
