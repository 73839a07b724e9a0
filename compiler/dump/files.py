"""The files of a run directory: names, versions, checksums, and what can be wrong with them.

    DIR/index.json                              programs, their stages and files, with checksums
    DIR/index.md                                the same for people
    DIR/<role>/<phase>/<NNN>_<pass>.txt, .json  one Program after one pass
    DIR/<role>/<phase>/ge/<role>.<phase>.rank<r>.pbtxt, .txt
                                                the GE graph of a rank, where the target is `ge`

Where several processes run, each has a run directory of its own: DIR/rank_<r>.

Nothing here depends on time, process or machine: two runs of the same compiler on the same model
give the same bytes. This module imports no torch, so that reading a run is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = [
    "INDEX",
    "KIND_RUN",
    "KIND_STAGE",
    "SCHEMA_VERSION",
    "checksum",
    "load_json",
    "load_text",
    "require_kind",
    "stage_name",
    "unreadable",
]

SCHEMA_VERSION = 1
"""Of all files; raised whenever a reader of the version before would misread one."""
INDEX = "index.json"
KIND_RUN = "rolemesh.run"
KIND_STAGE = "rolemesh.stage"


def stage_name(number: int, pass_name: str) -> str:
    """The name of a stage's files, without their ending."""
    return f"{number:03}_{pass_name}"


def checksum(content: bytes) -> str:
    """What the index keeps of a file, to tell whether it is what was written."""
    return hashlib.sha256(content).hexdigest()


def unreadable(path: Path, why: str) -> RolemeshError:
    """The error for a file that is missing, truncated or edited."""
    return RolemeshError(
        "RM035",
        what="a run directory cannot be read",
        where=str(path),
        why=why,
        fix="write it again with `rolemesh dump`, or with option dump",
    )


def load_json(path: Path, expected: str | None = None) -> Mapping[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        expected: Its checksum; None if it is not known.

    Raises:
        RolemeshError: RM035 if it is missing, differs from the checksum, or holds no object.
    """
    try:
        data = json.loads(_content(path, expected))
    except ValueError as error:
        raise unreadable(path, f"it is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise unreadable(path, "it holds no JSON object")
    return data


def load_text(path: Path, expected: str) -> str:
    """The content of a text file with this checksum.

    Raises:
        RolemeshError: RM035 if it is missing, or differs from the checksum.
    """
    return _content(path, expected).decode()


def _content(path: Path, expected: str | None) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, f"{type(error).__name__}: {error.strerror}") from error
    if expected is not None and checksum(content) != expected:
        raise unreadable(path, "its content is not what was written: it was edited or cut short")
    return content


def require_kind(data: Mapping[str, Any], kind: str, path: Path) -> None:
    """Refuse a file of another kind or version.

    Raises:
        RolemeshError: RM035, which says what reads the file.
    """
    if data.get("kind") != kind:
        raise unreadable(path, f"it is of kind {data.get('kind')!r}, not {kind!r}")
    version = data.get("schema_version")
    if version == SCHEMA_VERSION:
        return
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    wrote = data.get("rolemesh", "another version")
    raise RolemeshError(
        "RM035",
        what=f"a run directory has schema version {version!r}",
        where=str(path),
        why=f"this rolemesh reads version {SCHEMA_VERSION}; rolemesh {wrote} wrote the file",
        fix=f"read it with rolemesh {wrote}" + (" or later" if newer else ", or write it again"),
    )
