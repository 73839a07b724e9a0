"""What a safetensors checkpoint holds, read from the headers of its files alone.

A file is 8 bytes with the length of the header, the header (JSON: name to dtype, shape and byte
range) and the tensors' bytes; the format is that of https://github.com/huggingface/safetensors. A
checkpoint is one file, or an index (`*.safetensors.index.json`) that names several.

Invariants:

* No tensor is read, and every byte range of a `Checkpoint` lies within its file.
* All problems of a checkpoint are reported at once, each with the file and tensor it is about.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["DTYPES", "INDEX", "SINGLE", "Checkpoint", "Entry", "listed", "open_checkpoint"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Names of safetensors for dtypes that torch has too. Those of less than a byte have no tensors."""

_MAX_HEADER = 100_000_000
"""Bytes that safetensors allows a header to have."""

_LISTED = 20
"""Problems that one error lists."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the checkpoint.
        file: Path of the file that holds it.
        type: Its shape and dtype.
        start: Where its bytes begin in the file. There are `type.nbytes` of them, contiguous, in
            row-major order.
    """

    name: str
    file: str
    type: TensorType
    start: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, by name.

    Attributes:
        path: What was opened, for messages.
        entries: Every tensor.
    """

    path: str
    entries: Mapping[str, Entry]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.type.nbytes for entry in self.entries.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: A safetensors file, an index file, or a folder with `model.safetensors` or
            `model.safetensors.index.json`.

    Raises:
        RolemeshError: RM032 with every problem found: no checkpoint there, a truncated or
            malformed file, an index that names files or tensors which do not exist, a tensor that
            is there twice.
    """
    found = _Found()
    start = _resolve(Path(path))
    try:
        if start.suffix == ".json":
            _read_index(start, found)
        else:
            _read_file(start, found)
    except OSError as error:  # no permission, or the disk failed
        found.problems.append(str(error))
    if found.problems:
        raise _broken(start, found.problems)
    return Checkpoint(str(start), found.entries)


def listed(problems: Sequence[str]) -> str:
    """Problems as lines of a message, of which many are cut short."""
    more = len(problems) - _LISTED
    lines = [*problems[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
    return "\n".join(lines)


@dataclass
class _Found:
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _broken(path: Path, problems: Sequence[str]) -> RolemeshError:
    return RolemeshError(
        "RM032",
        what=f"the checkpoint {path} cannot be read",
        where=listed(problems),
        why="every byte that its headers promise must be there before anything is loaded",
        fix="download or write the checkpoint again; a copy may have been interrupted",
    )


def _resolve(path: Path) -> Path:
    if path.is_file():
        return path
    for name in (SINGLE, INDEX) if path.is_dir() else ():
        if (path / name).is_file():
            return path / name
    inside = sorted(file.name for file in path.glob("*.safetensors")) if path.is_dir() else []
    raise RolemeshError(
        "RM032",
        what=f"no checkpoint at {path}",
        where=f"the folder has {', '.join(inside[:5])}" if inside else "",
        why=f"it has neither {SINGLE} nor {INDEX}" if path.is_dir() else "it does not exist",
        fix="give a .safetensors file, an index, or a folder that has one of these two names",
    )


def _read_index(path: Path, found: _Found) -> None:
    index = _mapping(path.read_bytes(), "it", path.name, found)
    if index is None:
        return
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        found.problems.append(f"{path.name}: no weight_map from tensor names to file names")
        return
    readable = set()
    for file in sorted(set(files.values())):
        if not (path.parent / file).is_file():
            found.problems.append(f"{file}: the index names it, but it does not exist")
        elif _read_file(path.parent / file, found):
            readable.add(file)
    for name, file in files.items():
        entry = found.entries.get(name)
        if file in readable and (entry is None or entry.file != str(path.parent / file)):
            found.problems.append(f"{file}: {name} is not in it, although the index says so")


def _read_file(path: Path, found: _Found) -> bool:
    """Add what a file holds to `found`; whether its header could be read."""
    size = path.stat().st_size
    header, data = _read_header(path, size, found)
    if header is None:
        return False
    header.pop("__metadata__", None)
    inside: list[Entry] = []
    for name, described in header.items():
        try:
            entry = _entry(name, described, str(path), data)
        except ValueError as error:
            found.problems.append(f"{path.name}: {name}: {error}")
            continue
        inside.append(entry)
        end = entry.start + entry.type.nbytes
        if end > size:
            found.problems.append(
                f"{path.name}: truncated: {name} ends at byte {end}, the file at {size}"
            )
        if name in found.entries:
            other = Path(found.entries[name].file).name
            found.problems.append(f"{path.name}: {name} is in {other} too")
        found.entries[name] = entry
    inside.sort(key=lambda entry: (entry.start, entry.type.nbytes))
    for before, after in pairwise(inside):
        if before.start + before.type.nbytes > after.start:
            found.problems.append(f"{path.name}: {before.name} and {after.name} share bytes")
    return True


def _read_header(path: Path, size: int, found: _Found) -> tuple[dict[str, object] | None, int]:
    """A file's header, if it can be read, and where its data begins."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8:
            found.problems.append(f"{path.name}: truncated: it has {size} bytes")
        elif length > _MAX_HEADER:
            found.problems.append(f"{path.name}: not a safetensors file")
        elif 8 + length > size:
            found.problems.append(
                f"{path.name}: truncated: its header ends at byte {8 + length}, the file at {size}"
            )
        else:
            return _mapping(file.read(length), "its header", path.name, found), 8 + length
    return None, 0


def _mapping(text: bytes, subject: str, file: str, found: _Found) -> dict[str, object] | None:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:  # of JSON, of UTF-8, or of a name that occurs twice
        found.problems.append(f"{file}: {subject} is not valid: {error}")
        return None
    if not isinstance(value, dict):
        found.problems.append(f"{file}: {subject} is not a mapping")
        return None
    return value


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{name} occurs twice")
        made[name] = value
    return made


def _entry(name: str, described: object, file: str, data: int) -> Entry:
    fields = described if isinstance(described, dict) else {}
    dtype = fields.get("dtype")
    shape, offsets = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise ValueError("it needs a dtype, a shape and two data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"torch has no dtype {dtype}")
    kind = TensorType(shape, DTYPES[dtype])
    begin, end = offsets
    if end - begin != kind.nbytes:
        raise ValueError(f"{kind} takes {kind.nbytes} bytes, its data_offsets hold {end - begin}")
    return Entry(name, file, kind, data + begin)


def _sizes(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    if not all(type(size) is int and size >= 0 for size in value):
        return None
    return tuple(value)
