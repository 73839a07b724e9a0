"""An artefact at a glance: the fields of its key, as errors name them, and its programs.

Read are its files alone: no op of a program has to exist here, and nothing of it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from rolemesh.compiler.artefact.folder import MANIFEST, PARTITIONED, Folder
from rolemesh.compiler.artefact.graphs import graph_files
from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.debug.show.show import columns
from rolemesh.compiler.ir.manifest_json import decode_manifest
from rolemesh.compiler.ir.serial_values import Json

__all__ = ["ArtefactSummary", "SavedProgram", "artefact_text", "summarise_artefact"]

_DIGEST = 16
"""Digits that are shown of a SHA-256."""


@dataclass(frozen=True)
class SavedProgram:
    """One program.

    Attributes:
        name: Its name in the artefact.
        program: Its own name, such as `pd_mixed.decode`.
        ops: How many ops a rank runs.
        mesh_ops: How many of each kind are of the mesh: collectives, and what prepares them.
        rank_bytes: Bytes of weights on each rank.
        files: Bytes of its files.
        graphs: How many ranks have a graph of the target ge in it.
    """

    name: str
    program: str
    ops: int
    mesh_ops: Mapping[str, int]
    rank_bytes: Sequence[int]
    files: int
    graphs: int


@dataclass(frozen=True)
class ArtefactSummary:
    """An artefact.

    Attributes:
        digest: SHA-256 of its index, and so of everything.
        key: The fields of its key, such as `options.role`.
        programs: Its programs.
    """

    digest: str
    key: Mapping[str, Json]
    programs: Sequence[SavedProgram]


def summarise_artefact(folder: Folder) -> ArtefactSummary:
    """What an artefact was made for, and what is in it.

    Raises:
        RolemeshError: RM038 if a layout manifest is none.
    """
    names = cast(list[str], folder.index["programs"])
    programs = [_program(folder, name) for name in names]
    return ArtefactSummary(folder.digest, dict(_fields(folder.index["key"], "")), programs)


def _fields(value: Json, name: str) -> Iterator[tuple[str, Json]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _fields(item, f"{name}.{key}" if name else key)


def _program(folder: Folder, name: str) -> SavedProgram:
    data = folder.json(f"{name}/{PARTITIONED}")
    ops = [node["op"] for node in data["nodes"] if node["op"] != "input"]
    mesh_ops = Counter(op for op in ops if op.startswith("mesh."))
    layouts = decode_manifest(folder.files[f"{name}/{MANIFEST}"], f"{folder.path}/{name}")
    return SavedProgram(
        name,
        data["head"]["name"],
        len(ops),
        dict(mesh_ops.most_common()),
        layouts.rank_bytes,
        sum(len(data) for file, data in folder.files.items() if file.startswith(f"{name}/")),
        len(graph_files(folder.path, name)),
    )


def artefact_text(found: ArtefactSummary, painter: Painter) -> str:
    """The key's fields, and a table of programs.

    Args:
        found: The artefact.
        painter: Whether in colour.
    """
    rows = [(name, _value(value)) for name, value in [("digest", found.digest), *found.key.items()]]
    head = ("program", "name", "ops", "weights of a rank", "files", "GE graphs", "ops of the mesh")
    table = [
        (
            program.name,
            program.program,
            f"{program.ops:,}",
            f"{max(program.rank_bytes):,}",
            f"{program.files:,}",
            f"{program.graphs:,}",
            ", ".join(f"{count} {op}" for op, count in program.mesh_ops.items()),
        )
        for program in found.programs
    ]
    first, *rest = columns([head, *table], right={2, 3, 4, 5})
    return "\n".join([*columns(rows, right=set()), "", painter.dim(first), *rest])


def _value(value: Json) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    is_digest = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return text[:_DIGEST] if is_digest else text
