"""The folder that a warm start reads: one checked file an entry, bounded in size.

    FOLDER/<kind>/<first two digits of the key>/<key>

A file has one line, `rolemesh cache 1 <kind> <key> <SHA-256 of the rest>`, and then its content.

Invariants:

* A file appears whole or not at all, so processes may write the same entry at the same time; the
  last one stays, and they are equal, because the key says all that decides them.
* What is read has the checksum that was written with it, under the key that was asked for. Any
  other file is reported once with a warning, and the entry is made anew in its place.
* A folder that cannot be written costs the warm start, and nothing else.
* After a write the folder has at most `LIMIT` bytes: entries that were not used for longest go.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir

from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.runtime.config import Config

__all__ = ["LIMIT", "CacheFolder", "CacheWarning", "default_folder"]

LIMIT = 1 << 30
"""Bytes that the entries of a folder may have in all."""

_MAGIC = b"rolemesh cache 1"


class CacheWarning(UserWarning):
    """An entry of the cache could not be read, or written."""


@dataclass(frozen=True)
class CacheFolder:
    """A folder of entries.

    Attributes:
        path: Where it is; made at the first write.
        limit: Bytes that its entries may have in all.
    """

    path: Path
    limit: int = LIMIT

    def read(self, kind: str, key: str) -> bytes | None:
        """The content of an entry; None if there is none that can be used."""
        path = self._file(kind, key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _warn("cannot be read", path, f"{type(error).__name__}: {error}")
            return None
        head, _, content = data.partition(b"\n")
        if head != _head(kind, key, content):
            self.refuse(kind, key, "its checksum is not that of its content")
            return None
        with suppress(OSError):
            os.utime(path)  # the time of its last use, for `_shrink`
        return content

    def write(self, kind: str, key: str, content: bytes) -> None:
        """Write an entry."""
        path = self._file(kind, key)
        try:
            write_whole(path, _head(kind, key, content) + b"\n" + content, mode=0o600, parents=True)
        except OSError as error:
            _warn("cannot be written", path, f"{type(error).__name__}: {error}")
            return
        self._shrink()

    def refuse(self, kind: str, key: str, why: str) -> None:
        """Warn of an entry that cannot be used."""
        _warn("is damaged, or of something else", self._file(kind, key), why)

    def _file(self, kind: str, key: str) -> Path:
        return self.path / kind / key[:2] / key

    def _shrink(self) -> None:
        """Remove the entries that were not used for longest, if there are too many bytes."""
        entries: list[tuple[float, int, Path]] = []
        for path in self.path.glob("*/*/*"):
            with suppress(OSError):  # another process removes entries too
                state = path.stat()
                entries.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries, key=lambda entry: entry[0]):
            if total <= self.limit:
                return
            with suppress(OSError):
                path.unlink()
            total -= size


def default_folder() -> CacheFolder | None:
    """The folder that the environment says, by default `rolemesh` in torch's own; None for none."""
    config = Config.read()
    if not config.cache:
        return None
    return CacheFolder(Path(config.cache_dir or Path(cache_dir(), "rolemesh")))


def _head(kind: str, key: str, content: bytes) -> bytes:
    digest = hashlib.sha256(content).hexdigest()
    return b" ".join((_MAGIC, kind.encode(), key.encode(), digest.encode()))


def _warn(what: str, path: Path, why: str) -> None:
    warnings.warn(
        f"an entry of the compile cache {what}; it is compiled anew\n"
        f"  where: {path}\n"
        f"  why: {why}\n"
        f"  fix: none is needed; ROLEMESH_CACHE=0 turns the cache off",
        CacheWarning,
        stacklevel=3,
    )
