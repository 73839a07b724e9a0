"""A checksum of a block that costs little more than reading it.

The block is a matrix of 64-bit little-endian words, 2048 to a row, filled up with zeros. Its
checksum is the SHA-256 of its length, the sums of its columns and the sums of its rows, modulo
2**64. This is a product code (Elias, "Error-free coding", 1954): a change within one row, within
one column, or of up to three words anywhere is always found, so one of a byte or of a sector is.
Others are missed where all sums agree by chance. It finds damage and not intent: who can choose the
bytes can keep the sums.

SHA-256 of the bytes themselves takes four times as long, and longer than copying them.
"""

from __future__ import annotations

import copy
import hashlib

import numpy as np

__all__ = ["BlockSum"]

_WORDS = 2048
_ROW = 8 * _WORDS
_AT_ONCE = 16
"""Rows that are added at once: they stay in the cache between the sums of columns and of rows."""


class BlockSum:
    """The checksum of a block that is fed from its beginning to its end."""

    def __init__(self) -> None:
        self._length = 0
        self._columns = np.zeros(_WORDS, np.uint64)
        self._rows: list[bytes] = []
        self._part = bytearray()  # of a row

    def update(self, data: memoryview) -> None:
        """Add the next bytes."""
        self._length += len(data)
        if self._part:
            missing = _ROW - len(self._part)
            self._part += data[:missing]
            data = data[missing:]
            if len(self._part) < _ROW:
                return
            self._add(memoryview(self._part))
            self._part = bytearray()
        whole = len(data) // _ROW * _ROW
        if whole:
            self._add(data[:whole])
        self._part += data[whole:]

    def copy(self) -> BlockSum:
        """The same, to be fed otherwise."""
        return copy.deepcopy(self)

    def hexdigest(self) -> str:
        """The checksum, in hexadecimal."""
        last = self.copy()
        if last._part:
            last._add(memoryview(bytes(last._part).ljust(_ROW, b"\0")))
        found = hashlib.sha256(self._length.to_bytes(8, "little"))
        found.update(last._columns.astype("<u8").tobytes())
        found.update(b"".join(last._rows))
        return found.hexdigest()

    def _add(self, rows: memoryview) -> None:
        words = np.frombuffer(rows, "<u8").reshape(-1, _WORDS)
        for first in range(0, len(words), _AT_ONCE):
            part = words[first : first + _AT_ONCE]
            self._columns += np.add.reduce(part, 0)
            self._rows.append(np.add.reduce(part, 1).astype("<u8").tobytes())
