"""Reading parts of a file, and checking what was read against its checksums.

Bytes are hashed as they are read: parts that follow one another, in blocks that they share. What
lies between, before or after them in a block is read for its checksum alone.

Invariants:

* What `settle` has returned after is what the checksums say: every byte that was read lies in a
  block that was found good. `sweep` says it of the whole file.
* A reader holds a fixed number of bytes, whatever it reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rolemesh.runtime.reshard.block_sums import BlockSum
from rolemesh.runtime.reshard.checksums import BLOCK_BYTES, FileSums, bad_checkpoint
from rolemesh.runtime.reshard.sources import Source

__all__ = ["InputFile", "open_inputs"]

_SCRATCH = 1 << 18


class InputFile:
    """One file that is read from.

    Args:
        path: The file.
        sums: Its checksums; None if nobody recorded any.
        block: Bytes of a block of the checksums.
        names: Names the tensors between two places, for messages.

    Attributes:
        path: The file.
        state: What identifies its contents without reading them: device, inode, size, time.

    Raises:
        RolemeshError: RM032 if it cannot be opened, or has another size than the checksums say.
    """

    def __init__(
        self,
        path: Path,
        sums: FileSums | None,
        block: int,
        names: Callable[[int, int], str],
    ) -> None:
        self.path = path
        self._sums = sums
        self._block = block
        self._names = names
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unreadable(path, error) from error
        self.state = _state(os.fstat(self._descriptor))
        self.size = self.state[2]
        self._good = bytearray(0 if sums is None else len(sums.blocks))
        self._hash: BlockSum | None = None  # of the block that `_at` is in, up to there
        self._at = 0
        self._scratch = memoryview(bytearray(0 if sums is None else min(_SCRATCH, block)))
        if sums is not None and sums.size != self.size:
            self.close()
            raise bad_checkpoint(
                f"{path.name} has {self.size} bytes, its checksums are of {sums.size}",
                where=str(path),
                why="the file was cut short, or written again, after they were recorded",
            )

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read(self, view: memoryview, at: int) -> None:
        """Fill a view with the bytes from `at` on.

        Raises:
            RolemeshError: RM032 if the file ends before, cannot be read, or a block that this
                completes is not what its checksum says.
        """
        self._fill(view, at)
        if self._sums is None or not view:
            return
        if self._hash is None or not 0 <= at - self._at <= self._block:
            self.settle()
            self._hash, self._at = BlockSum(), at // self._block * self._block
        self._skip(at)
        self._feed(view)

    def settle(self) -> None:
        """Check the block that reading ended in, reading the rest of it.

        Raises:
            RolemeshError: RM032 if it is not what its checksum says.
        """
        if self._hash is None:
            return
        kept, at = self._hash.copy(), self._at
        self._skip(min((at // self._block + 1) * self._block, self.size))
        self._hash, self._at = kept, at

    def sweep(self) -> None:
        """Check all blocks that have not been found good, and that nobody wrote to the file.

        Raises:
            RolemeshError: RM032 if a block is not what its checksum says, or the file is another.
        """
        for number, good in enumerate(self._good):
            if not good:
                start = number * self._block
                self._hash, self._at = BlockSum(), start
                self._skip(min(start + self._block, self.size))
        try:
            now = _state(self.path.stat())
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if now != self.state:
            raise bad_checkpoint(
                f"{self.path.name} changed while it was read",
                where=str(self.path),
                why=f"it had {self.state[2]} bytes and now has {now[2]}, or was written again",
                fix="start again when nothing writes to the checkpoint",
            )

    def _skip(self, to: int) -> None:
        """Hash what lies before `to`."""
        while self._at < to:
            part = self._scratch[: to - self._at]
            self._fill(part, self._at)
            self._feed(part)

    def _feed(self, data: memoryview) -> None:
        assert self._sums is not None
        while data:
            if self._hash is None:
                self._hash = BlockSum()
            part = data[: self._block - self._at % self._block]
            self._hash.update(part)
            self._at += len(part)
            data = data[len(part) :]
            if self._at % self._block == 0 or self._at == self.size:
                number = (self._at - 1) // self._block
                if self._hash.hexdigest() != self._sums.blocks[number]:
                    raise self._damaged(number)
                self._good[number] = 1
                self._hash = None

    def _fill(self, view: memoryview, at: int) -> None:
        while view:
            try:
                count = os.preadv(self._descriptor, [view], at)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if not count:
                raise bad_checkpoint(
                    f"{self.path.name} ends at byte {at}",
                    where=f"{self.path}: {self._names(at, at + len(view))}",
                    why=f"it had {self.size} bytes when it was opened, and was cut short since",
                    fix="start again when nothing writes to the checkpoint",
                )
            view, at = view[count:], at + count

    def _damaged(self, number: int) -> Exception:
        start = number * self._block
        stop = min(start + self._block, self.size)
        return bad_checkpoint(
            f"{self.path.name} is damaged",
            where=f"{self.path}: bytes {start} to {stop - 1}: {self._names(start, stop)}",
            why="they are not those whose checksum was recorded",
        )


def open_inputs(
    source: Source, stack: ExitStack, ranks: Sequence[int] | None = None
) -> list[InputFile]:
    """The files of a checkpoint that have tensors, by rank, open until the stack ends.

    Args:
        source: The checkpoint.
        stack: Closes the files.
        ranks: Which of them; all if None.

    Raises:
        RolemeshError: RM032 if one cannot be opened, or has another size than its checksums say.
    """
    inputs = []
    for rank in range(len(source.files)) if ranks is None else ranks:
        name = source.files[rank]
        checksums = source.checksums
        sums = None if checksums is None else checksums.files[name]
        block = BLOCK_BYTES if checksums is None else checksums.block

        def names(start: int, stop: int, rank: int = rank) -> str:
            return source.names_at(rank, start, stop)

        opened = InputFile(source.folder / name, sums, block, names)
        stack.callback(opened.close)
        inputs.append(opened)
    return inputs


def _state(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _unreadable(path: Path, error: OSError) -> Exception:
    return bad_checkpoint(f"{path} cannot be read", where=str(path), why=str(error))
