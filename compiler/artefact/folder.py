"""The folder of an artefact: its files, the index with their checksums, and reading it.

    PATH/index.json                    the key, names of the programs, and every file's SHA-256
    PATH/<program>/captured.json       the Program as it was traced
    PATH/<program>/partitioned.json    the Program that every rank runs
    PATH/<program>/calling.json        how the model is called
    PATH/<program>/manifest.json       where its weights lie
    PATH/<program>/constants.safetensors    tensors that the model's code makes, if it makes any
    PATH/<program>/ge/                 graphs of the target ge (`compiler.artefact.graphs`)

Invariants:

* The folder appears at once, and is replaced at once. A reader sees one artefact or the other. Only
  to `ge` files are added, which the index does not list and which have checksums of their own.
* `index.json` is canonical JSON with its own digest, so that no byte of any file can change unseen.
* Nothing is unpickled, and no text of a file that the index lists is run as code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rolemesh.compiler.ir.atomic import write_folder
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.serial_values import Json

__all__ = [
    "CALLING",
    "CAPTURED",
    "CONSTANTS",
    "FORMAT",
    "INDEX",
    "MANIFEST",
    "PARTITIONED",
    "Folder",
    "canonical",
    "damaged",
    "program_bytes",
    "read_folder",
    "unwritable",
    "write",
]

FORMAT = "rolemesh artefact 1"
"""First member of every index; readers refuse others."""

INDEX = "index.json"

CAPTURED = "captured.json"
PARTITIONED = "partitioned.json"
CALLING = "calling.json"
MANIFEST = "manifest.json"
CONSTANTS = "constants.safetensors"
"""Names of a program's files."""

_TRIES = 5
"""How often a reader begins again because the artefact was replaced meanwhile."""


@dataclass(frozen=True)
class Folder:
    """What was read, and found to be what was written.

    Attributes:
        path: Where it was read.
        index: The index.
        files: Contents of all other files, by name.
    """

    path: Path
    index: Mapping[str, Json]
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, path: Path, contents: Mapping[str, bytes]) -> Folder:
        """Check the contents of a folder.

        Raises:
            RolemeshError: RM042 if a file is missing or is not what was written.
        """
        data = contents[INDEX]
        where = path / INDEX
        try:
            index = json.loads(data)
        except ValueError as error:
            raise damaged(where, f"it is no JSON: {error}") from error
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            found = index.get("format") if isinstance(index, dict) else None
            raise damaged(where, f"its format is {found!r}; this rolemesh reads {FORMAT!r}")
        body = {key: value for key, value in index.items() if key != "digest"}
        if canonical(index) != data or index.get("digest") != _sha256(canonical(body)):
            raise damaged(where, "its checksum is not that of its content")
        listed = cast(dict[str, Any], index["files"])
        for name, entry in listed.items():
            content = contents.get(name)
            if content is None:
                raise damaged(path / name, "the file is missing")
            if len(content) != entry["bytes"] or _sha256(content) != entry["sha256"]:
                raise damaged(path / name, "its checksum is not that of its content")
        return cls(path, body, {name: contents[name] for name in listed})

    @property
    def digest(self) -> str:
        """SHA-256 of the index without it, and so of everything."""
        return _sha256(canonical(self.index))

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file."""
        return cast(dict[str, Any], json.loads(self.files[name]))


def write(path: Path, head: Mapping[str, Json], files: Mapping[str, bytes]) -> None:
    """Write an artefact. If the same one is there, nothing is done.

    Args:
        path: The folder. An artefact that is there is replaced; anything else is left alone.
        head: Members of the index besides those about files.
        files: Contents of the files, by name.

    Raises:
        RolemeshError: RM044 if the folder cannot be written, or has something else in it.
    """
    listed: dict[str, Json] = {
        name: {"bytes": len(content), "sha256": _sha256(content)}
        for name, content in sorted(files.items())
    }
    body: dict[str, Json] = {"format": FORMAT, **head, "files": listed}
    index = canonical({**body, "digest": _sha256(canonical(body))})
    try:
        if path.exists() and not _replaceable(path):
            raise unwritable(
                str(path), "it is there and is no artefact", "name another folder, or remove it"
            )
        if _equals(path, index, files):
            return
        # Another rank may have written the same meanwhile, and graphs of its own into it.
        write_folder(path, {**files, INDEX: index}, lambda: _equals(path, index, files))
    except OSError as error:
        why = f"{type(error).__name__}: {error}"
        raise unwritable(str(path), why, "name a folder that can be written to") from error


def read_folder(path: Path) -> Folder:
    """Read an artefact and check every byte.

    Raises:
        RolemeshError: RM042 if it cannot be read, or is not what was written.
    """
    return Folder.of(path, read_files(path))


def read_files(path: Path) -> dict[str, bytes]:
    """The contents of an artefact's files, as they are.

    Raises:
        RolemeshError: RM042 if there is no artefact.
    """
    for _ in range(_TRIES):
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise damaged(path, f"{type(error).__name__}: {error.strerror}") from error
        try:
            # The folder stays the one that was opened, also when another takes its place.
            contents = {INDEX: _content(folder, INDEX)}
            contents |= {name: _content(folder, name) for name in _listed(contents[INDEX])}
        except OSError as error:
            if not _is_replaced(folder, path):
                raise damaged(path, f"{type(error).__name__}: {error}") from error
        else:
            return contents
        finally:
            os.close(folder)
    raise damaged(path, "it was replaced again and again while it was read")


def canonical(data: Mapping[str, Json]) -> bytes:
    """JSON with sorted members, in ASCII, with a newline at the end."""
    return json.dumps(data, sort_keys=True, indent=1).encode() + b"\n"


def program_bytes(program: Mapping[str, Json]) -> bytes:
    """The JSON of a Program, a node a line."""
    nodes = ",\n".join(map(_compact, cast(list[Json], program["nodes"])))
    return f'{{"head": {_compact(program["head"])},\n"nodes": [\n{nodes}\n]}}\n'.encode()


def _compact(data: Json) -> str:
    return json.dumps(data, separators=(",", ":"))  # the order of keyword arguments stays


def damaged(path: Path, why: str) -> RolemeshError:
    """The error for a folder that is not what was written."""
    return RolemeshError(
        "RM042",
        "an artefact cannot be read",
        where=str(path),
        why=why,
        fix="save it again, or pass recompile= to do so when that is needed",
    )


def unwritable(where: str, why: str, fix: str) -> RolemeshError:
    """The error for an artefact that cannot be written."""
    return RolemeshError("RM044", "an artefact cannot be written", where=where, why=why, fix=fix)


def _listed(index: bytes) -> list[str]:
    """Names of files in an index that was not checked yet: only such below its folder."""
    try:
        files = json.loads(index)["files"]
    except (ValueError, TypeError, KeyError):
        return []
    names = files if isinstance(files, dict) else {}
    return [name for name in names if not {"", ".", ".."} & set(name.split("/"))]


def _content(folder: int, name: str) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as stream:
        return stream.read()


def _is_replaced(folder: int, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(folder), path.stat())
    except OSError:
        return True


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / INDEX).is_file() or not any(path.iterdir()))


def _equals(path: Path, index: bytes, files: Mapping[str, bytes]) -> bool:
    try:
        return read_files(path) == {**files, INDEX: index}
    except RolemeshError:
        return False


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
