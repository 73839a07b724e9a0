"""Choosing nodes of a stage by globs over their module, op and name.

A pattern that fits nothing is an error that names the closest thing there is: an empty answer would
read as "the compiler did nothing there".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rolemesh.compiler.dump.reader import Node, Stage
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["ROOT", "Filters", "modules_of", "select", "stored_names"]

ROOT = "(root)"
"""What stands for the module of nodes that belong to none."""


@dataclass(frozen=True)
class Filters:
    """Globs; a node is chosen if, for each kind that is given, one of its globs fits.

    Attributes:
        modules: Over module paths. A module stands for all that is in it.
        ops: Over ops, such as `mesh.*`. `mm` is enough for `aten.mm.default`.
        names: Over names of nodes, and of the parameters, buffers and arguments that inputs are.
    """

    modules: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.modules or self.ops or self.names)


def stored_names(stage: Stage) -> Mapping[str, str]:
    """By name of an input's node, the name of the parameter, buffer or argument that it is."""
    return {entry["node"]: entry["name"] for entry in stage.head["inputs"]}


def modules_of(stage: Stage) -> dict[str, str]:
    """By name of a node, its module path; empty for the root.

    A parameter or buffer belongs to the module that holds it, and an op to the one that called it.
    """
    kinds = {entry["node"]: entry["kind"] for entry in stage.head["inputs"]}
    names = stored_names(stage)
    return {
        name: names[name].rpartition(".")[0]
        if kinds.get(name) in ("parameter", "buffer")
        else node.module
        for name, node in stage.nodes.items()
    }


def select(stage: Stage, filters: Filters) -> list[Node]:
    """The nodes that are chosen, in order.

    Args:
        stage: The stage.
        filters: What to choose; all nodes if there are none.

    Raises:
        RolemeshError: RM018 if a glob fits nothing, or no node fits them all.
    """
    modules, stored = modules_of(stage), stored_names(stage)
    kinds = (
        ("module", filters.modules, {name: _and_above(modules[name]) for name in stage.nodes}),
        ("op", filters.ops, {name: _op_names(node.op) for name, node in stage.nodes.items()}),
        ("node", filters.names, {n: [n, *filter(None, [stored.get(n)])] for n in stage.nodes}),
    )
    chosen = set(stage.nodes)
    for what, globs, spelled in kinds:
        if not globs:
            continue
        fitting: set[str] = set()
        for glob in globs:
            found = {n for n, texts in spelled.items() if any(fnmatchcase(t, glob) for t in texts)}
            if not found:
                raise _nothing(what, glob, stage, spelled.values())
            fitting |= found
        chosen &= fitting
    if not chosen:
        raise RolemeshError(
            "RM018",
            what="no node fits all of the globs",
            where=f"{stage.program}, stage {stage.name}",
            why="each of them fits some nodes, but no node fits one of every kind",
            fix="drop one of --module, --op and --name",
        )
    return [node for name, node in stage.nodes.items() if name in chosen]


def _and_above(module: str) -> list[str]:
    """A module's path and those of all that it is in."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)] if module else [ROOT]


def _op_names(op: str) -> list[str]:
    """`aten.mm.default`, `aten.mm` and `mm`."""
    parts = op.split(".")
    return [op, *([".".join(parts[:2]), parts[1]] if len(parts) > 1 else [])]


def _nothing(what: str, glob: str, stage: Stage, spelled: Iterable[Sequence[str]]) -> RolemeshError:
    known = list(dict.fromkeys(text for texts in spelled for text in texts))
    close = difflib.get_close_matches(glob.replace("*", ""), known, n=1, cutoff=0.4)
    some = ", ".join(known[:4])
    return RolemeshError(
        "RM018",
        what=f"no {what} fits {glob!r}",
        where=f"{stage.program}, stage {stage.name}",
        why=f"there are {len(known)}, such as {some}" if known else "the stage has no nodes",
        fix=f"did you mean {close[0]!r}?" if close else "see `rolemesh show` without filters",
    )
