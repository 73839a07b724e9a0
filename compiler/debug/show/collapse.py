"""A stage collapsed by module: what each does and moves, with layers that are alike on one line.

Layers are alike if their nodes have the same ops, types and layouts in the same order. Two parts of
a layout's text do not matter, for they differ from layer to layer: which rank owns a tensor that is
whole on one rank, and the name of the value that rows are routed by.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rolemesh.compiler.debug.show.select import ROOT, modules_of
from rolemesh.compiler.dump.reader import Node, Stage

__all__ = ["ModuleRow", "module_rows"]

_OF_ONE_LAYER = re.compile(r"(?<=owner\()\d+|%[^\s)]+")
_Path = tuple[str, ...]
_Signature = tuple[tuple[str, tuple[str, ...]], ...]
_Entry = tuple["ModuleRow", _Path, _Signature]


@dataclass(frozen=True)
class ModuleRow:
    """One module, or several that are alike.

    Attributes:
        path: Module path; of several, with ranges for the numbers in which they differ, such as
            `model.layers.0-3.self_attn`.
        alike: How many modules that is.
        inputs: Tensors that one of them is given or holds.
        ops: Ops of one of them.
        collectives: How often one of them does which collective over which axes, such as
            `all_gather tp`.
        bytes: Bytes that a rank receives in one of them.
        gives: Type and layout of the last value of the first one that others read; empty if none.
    """

    path: str
    alike: int
    inputs: int
    ops: int
    collectives: Mapping[str, int]
    bytes: int
    gives: str


def module_rows(
    stage: Stage, nodes: Sequence[Node], depth: int | None = None, *, fold: bool = True
) -> list[ModuleRow]:
    """The modules, each followed by those in it, in the order of their first ops.

    Args:
        stage: The stage.
        nodes: The nodes to count.
        depth: How many components of a path to keep; None for all.
        fold: Whether modules that are alike share a row.
    """
    modules = modules_of(stage)
    paths = {node.name: tuple(modules[node.name].split(".")[:depth]) for node in nodes}
    paths |= {name: () for name in paths if not modules[name]}
    found: dict[_Path, list[Node]] = {}
    for node in nodes:
        found.setdefault(paths[node.name], []).append(node)
    order = _order(nodes, paths)
    sorted_paths = sorted(found, key=lambda path: [order[path[:n]] for n in range(len(path) + 1)])
    returned = set(_returned(stage))
    rows = [
        (_row(stage, path, found[path], returned), path, _signature(found[path]))
        for path in sorted_paths
    ]
    return _folded(rows) if fold else [row for row, _, _ in rows]


def _order(nodes: Sequence[Node], paths: Mapping[str, _Path]) -> dict[_Path, int]:
    """For each path and all above it, the place of its first op; those without ops come last."""
    order: dict[_Path, int] = {(): 0}
    for node in sorted(nodes, key=lambda node: node.op == "input"):
        path = paths[node.name]
        for length in range(1, len(path) + 1):
            order.setdefault(path[:length], len(order))
    return order


def _returned(stage: Stage) -> Iterator[str]:
    """Names of the values that the program returns."""
    for output in stage.head["outputs"]:
        if isinstance(output["value"], dict) and "node" in output["value"]:
            yield output["value"]["node"]


def _row(stage: Stage, path: _Path, members: Sequence[Node], returned: set[str]) -> ModuleRow:
    inside = {node.name for node in members}
    collectives = [node.collective for node in members if node.collective is not None]
    given = [
        node.kinds[0]
        for node in members
        if node.kinds
        and node.op != "input"
        and (node.name in returned or any(user not in inside for user in stage.users[node.name]))
    ]
    return ModuleRow(
        path=".".join(path) or ROOT,
        alike=1,
        inputs=sum(node.op == "input" for node in members),
        ops=sum(node.op != "input" for node in members),
        collectives=dict(Counter(f"{c['op']} {'/'.join(c['axes'])}" for c in collectives)),
        bytes=sum(c["bytes"] for c in collectives),
        gives=given[-1] if given else "",
    )


def _signature(members: Sequence[Node]) -> _Signature:
    return tuple((n.op, tuple(_OF_ONE_LAYER.sub("", kind) for kind in n.kinds)) for n in members)


def _folded(rows: Sequence[_Entry]) -> list[ModuleRow]:
    """Rows with those that differ in one number of their path joined, innermost numbers first."""
    longest = max((len(path) for _, path, _ in rows), default=0)
    for place in reversed(range(longest)):
        groups: dict[object, list[_Entry]] = {}
        for row, path, signature in rows:
            number = len(path) > place and path[place].isdecimal()
            key = (*path[:place], None, *path[place + 1 :]) if number else path
            groups.setdefault((key, signature), []).append((row, path, signature))
        rows = [_joined(group, place) for group in groups.values()]
    return [row for row, _, _ in rows]


def _joined(group: Sequence[_Entry], place: int) -> _Entry:
    row, path, signature = group[0]
    if len(group) == 1:
        return group[0]
    text = _ranges(sorted(int(path[place]) for _, path, _ in group))
    path = (*path[:place], text, *path[place + 1 :])
    alike = sum(row.alike for row, _, _ in group)
    return replace(row, path=".".join(path), alike=alike), path, signature


def _ranges(numbers: Sequence[int]) -> str:
    """`0,2-4` for 0, 2, 3, 4."""
    runs = [
        [number for _, number in group]
        for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
