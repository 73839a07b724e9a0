"""Checksums of the files of a checkpoint, block by block, in a file beside them.

A checksum of every block of `block` bytes lets a reader check the parts that it reads, in any
order, while it reads them. The file has a SHA-256 of its own, so a byte changed anywhere is found:
in data, headers, an index, a manifest, or the checksums.

Invariants:

* `checksums.json` lists every file of its folder that belongs to the checkpoint, and their sizes.
* Equal files give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.serial_values import Json
from rolemesh.runtime.reshard.block_sums import BlockSum

__all__ = [
    "BLOCK_BYTES",
    "CHECKSUMS",
    "BlockHasher",
    "Checksums",
    "FileSums",
    "bad_checkpoint",
    "read_checksums",
    "sums_of",
    "write_checksums",
]

CHECKSUMS = "checksums.json"

BLOCK_BYTES = 4 << 20
"""Bytes of a block: a terabyte has 16 MB of checksums."""

_SCHEMA = 1
_ALGORITHM = "sums2048-sha256"
_SCRATCH = 1 << 20


@dataclass(frozen=True)
class FileSums:
    """Checksums of one file.

    Attributes:
        size: Its bytes.
        blocks: The `BlockSum` of each block; the last block may be shorter.
    """

    size: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Checksums:
    """What a `checksums.json` says.

    Attributes:
        block: Bytes of a block.
        files: The files of its folder, by name.
    """

    block: int
    files: Mapping[str, FileSums]

    @property
    def digest(self) -> str:
        """The SHA-256 of its canonical JSON, in hexadecimal."""
        return hashlib.sha256(_canonical(_body(self))).hexdigest()


class BlockHasher:
    """Hashes a file that is fed from its beginning to its end.

    Args:
        block: Bytes of a block.

    Attributes:
        at: Where the next bytes belong.
        blocks: The digests of the blocks that are whole.
    """

    def __init__(self, block: int) -> None:
        self.at = 0
        self.blocks: list[str] = []
        self._block = block
        self._hash = BlockSum()

    def feed(self, data: memoryview) -> None:
        """Hash the next bytes."""
        while data:
            part = data[: self._block - self.at % self._block]
            self._hash.update(part)
            self.at += len(part)
            if self.at % self._block == 0:
                self._end()
            data = data[len(part) :]

    def finish(self) -> tuple[str, ...]:
        """The digests of all blocks; no bytes follow."""
        if self.at % self._block:
            self._end()
        return tuple(self.blocks)

    def _end(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash = BlockSum()


def sums_of(
    path: Path, block: int = BLOCK_BYTES, advance: Callable[[int], object] | None = None
) -> FileSums:
    """The checksums of a file as it is.

    Args:
        path: The file.
        block: Bytes of a block.
        advance: Called with each number of bytes that were read.

    Raises:
        OSError: If it cannot be read.
    """
    hasher, scratch = BlockHasher(block), memoryview(bytearray(_SCRATCH))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(scratch):
            hasher.feed(scratch[:count])
            if advance is not None:
                advance(count)
    return FileSums(hasher.at, hasher.finish())


def write_checksums(folder: Path, found: Checksums) -> None:
    """Write the checksums of a folder's files.

    Raises:
        OSError: If they cannot be written.
    """
    body = {**_body(found), "digest": found.digest}
    write_whole(folder / CHECKSUMS, _canonical(body))


def read_checksums(folder: Path) -> Checksums | None:
    """The checksums of a folder's files; None if it has none.

    Raises:
        RolemeshError: RM032 if they cannot be read or are damaged.
    """
    path = folder / CHECKSUMS
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise bad_checkpoint(f"{path} cannot be read", where=str(path), why=str(error)) from error
    try:
        return _decode(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_checkpoint(
            f"{path} is damaged",
            where=str(path),
            why=str(error) or type(error).__name__,
            fix="copy the checkpoint again; if its files are known to be good, delete this file "
            "and record their checksums anew",
        ) from error


def bad_checkpoint(what: str, *, where: str, why: str, fix: str = "") -> RolemeshError:
    """The error RM032."""
    fix = fix or "copy or write the checkpoint again"
    return RolemeshError("RM032", what, where=where, why=why, fix=fix)


def _body(found: Checksums) -> dict[str, Json]:
    files: dict[str, Json] = {
        name: {"size": sums.size, "blocks": list[Json](sums.blocks)}
        for name, sums in found.files.items()
    }
    return {"schema": _SCHEMA, "algorithm": _ALGORITHM, "block": found.block, "files": files}


def _canonical(body: Mapping[str, Json]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _decode(data: bytes) -> Checksums:
    body = json.loads(data)
    claimed = body.pop("digest")
    if (body["schema"], body["algorithm"]) != (_SCHEMA, _ALGORITHM):
        raise ValueError(f"its schema is {body['schema']!r}; this version reads {_SCHEMA}")
    actual = hashlib.sha256(_canonical(body)).hexdigest()
    if claimed != actual:
        raise ValueError(f"its digest is {claimed}, that of its contents is {actual}")
    if _canonical({**body, "digest": claimed}) != data:
        raise ValueError("it is not in canonical form")
    return Checksums(body["block"], dict(_files(body["files"], body["block"])))


def _files(
    entries: Mapping[str, Mapping[str, object]], block: int
) -> Iterator[tuple[str, FileSums]]:
    for name, entry in entries.items():
        size, blocks = entry["size"], entry["blocks"]
        if not isinstance(size, int) or not isinstance(blocks, list):
            raise TypeError(f"{name} has no size or no blocks")
        if len(blocks) != -(-size // block) or os.path.isabs(name) or ".." in Path(name).parts:
            raise ValueError(f"{name} of {size} bytes has {len(blocks)} blocks of {block}")
        yield name, FileSums(size, tuple(blocks))
