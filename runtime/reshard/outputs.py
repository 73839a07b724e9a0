"""Writing a file piece by piece, and hashing it on the way.

Pieces that follow one another are hashed as they are written. What they leave out is written when
they pass it: the parts that are known from the beginning, and else zeros. A piece that comes late
has its blocks hashed again, from the file.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rolemesh.runtime.reshard.checksums import BLOCK_BYTES, BlockHasher, FileSums

__all__ = ["OutputFile"]

_ZEROS = memoryview(bytes(1 << 16))


class OutputFile:
    """One file that is written to.

    Args:
        path: The file; made if it is not there.
        size: Its bytes. Room for all of them is taken at once.
        parts: What is in it besides what is written: places and bytes, in order.
        block: Bytes of a block of its checksums.

    Raises:
        OSError: If it cannot be made, or the disk has no room for it.
    """

    def __init__(
        self, path: Path, size: int, parts: Sequence[tuple[int, bytes]], block: int = BLOCK_BYTES
    ) -> None:
        self._parts = deque(parts)
        self._size, self._block = size, block
        self._hasher = BlockHasher(block)
        self._late: set[int] = set()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if size:
                self._reserve(size)
            os.ftruncate(self._descriptor, size)
        except BaseException:
            self.close()
            raise

    def _reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            # Some file systems cannot; a disk that is full is then found while it is written to.
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def write(self, data: memoryview, at: int) -> None:
        """Write bytes from `at` on.

        Raises:
            OSError: If that fails.
        """
        self._pad(at)
        self._put(data, at)
        if at < self._hasher.at:
            known = min(at + len(data), self._hasher.at)
            self._late.update(range(at // self._block, -(-known // self._block)))
            data = data[known - at :]
        self._hasher.feed(data)

    def resume(self, to: int) -> None:
        """Go on with a file that was written up to a byte.

        Raises:
            OSError: If what is there cannot be read.
        """
        for start in range(self._hasher.at, to, self._block):
            self._hasher.feed(self._back(start, min(start + self._block, to)))
        while self._parts and self._parts[0][0] < to:
            self._parts.popleft()

    def sync(self) -> None:
        """Make what was written last.

        Raises:
            OSError: If that fails.
        """
        os.fdatasync(self._descriptor)

    def finish(self) -> FileSums:
        """The checksums of the file; nothing is written after.

        Raises:
            OSError: If what came late cannot be read back.
        """
        self._pad(self._size)
        blocks = list(self._hasher.finish())
        for number in sorted(self._late):
            start = number * self._block
            again = BlockHasher(self._block)
            again.feed(self._back(start, min(start + self._block, self._size)))
            (blocks[number],) = again.finish()
        return FileSums(self._size, tuple(blocks))

    def _pad(self, to: int) -> None:
        """Go on to a place, over what is not written by anyone else."""
        while self._hasher.at < to:
            part, content = self._parts[0] if self._parts else (to, b"")
            if part <= self._hasher.at and content:
                self._put(memoryview(content), part)
                self._hasher.feed(memoryview(content))
                self._parts.popleft()
            else:
                self._hasher.feed(_ZEROS[: min(part, to) - self._hasher.at])

    def _put(self, data: memoryview, at: int) -> None:
        while data:
            count = os.pwrite(self._descriptor, data, at)
            data, at = data[count:], at + count

    def _back(self, start: int, stop: int) -> memoryview:
        data = os.pread(self._descriptor, stop - start, start)
        assert len(data) == stop - start, "the file has its size from the beginning"
        return memoryview(data)
