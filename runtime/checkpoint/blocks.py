"""Reading a checkpoint in blocks, each by one rank of a node, one block ahead.

Invariants:

* The blocks of all ranks of a node together cover every byte of their sources once.
* A rank holds at most two blocks: the one it hands out, and the one that a thread reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.checkpoint.files import Entry
from rolemesh.runtime.checkpoint.naming import Conversion, Sources
from rolemesh.runtime.checkpoint.pieces import as_bytes

__all__ = ["Block", "Reader", "blocks_of"]


@dataclass(frozen=True)
class Block:
    """Part of a conversion that is read and converted at once.

    Attributes:
        conversion: The conversion.
        start: The first row of the result; 0 if the block is the whole conversion.
        stop: The row after the last one; None if the block is the whole conversion.
        nbytes: Bytes to read.
        reader: Which member of the node reads it, counted from 0.
    """

    conversion: Conversion
    start: int
    stop: int | None
    nbytes: int
    reader: int

    def rows_of(self, kind: TensorType) -> tuple[int, int]:
        """The rows of a result that the block gives."""
        rows = kind.shape[0] if kind.shape else 1
        return self.start, rows if self.stop is None else self.stop

    def sources(self) -> list[tuple[Entry, int, tuple[int, ...]]]:
        """What to read: tensors of the checkpoint, first byte in the file, and shape."""
        conversion = self.conversion
        if conversion.convert is None and self.stop is not None:
            entry = conversion.sources[0]
            row = entry.type.nbytes // entry.type.shape[0]
            shape = (self.stop - self.start, *entry.type.shape[1:])
            return [(entry, entry.start + self.start * row, shape)]
        rows = conversion.rows[self.start : self.stop]
        entries = [entry for row in rows for entry in row] or conversion.sources
        return [(entry, entry.start, entry.type.shape) for entry in entries]


def blocks_of(plan: Sequence[Conversion], limit: int, members: int) -> Iterator[Block]:
    """Cut conversions into blocks of about `limit` bytes, spread evenly over a node's members.

    A conversion that gives its result row by row is cut between rows: a block has at least one.
    """
    read = [0] * members
    for conversion in plan:
        nbytes = sum(source.type.nbytes for source in conversion.sources)
        if not nbytes:
            continue
        rows = _rows(conversion)
        step = max(1, limit * rows // nbytes)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            reader = min(range(members), key=read.__getitem__)
            part = nbytes // rows * (stop - start)
            read[reader] += part
            yield Block(conversion, start, None if rows == 1 else stop, part, reader)


def _rows(conversion: Conversion) -> int:
    """Rows of a conversion that can be read apart."""
    if conversion.convert is None:
        shape = conversion.sources[0].type.shape
        return shape[0] if shape else 1
    return max(1, len(conversion.rows))


class Reader:
    """Reads the blocks of one rank in order, one ahead, in a thread of its own.

    After a failure nothing more is read and blocks hold zeros, so that the ranks stay in step until
    they refuse together.

    Args:
        blocks: The blocks that this rank reads.

    Attributes:
        problem: Why reading failed, if it did.
    """

    def __init__(self, blocks: Iterator[Block]) -> None:
        self.problem: RolemeshError | None = None
        self._blocks = blocks
        self._files: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rolemesh-checkpoint")
        self._ahead = self._start()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)

    def take(self, block: Block) -> Mapping[str, torch.Tensor]:
        """The tensors that a block gives, which is the next one of this rank."""
        assert self._ahead is not None
        due, sources, done = self._ahead
        assert due == block, "blocks are taken in order"
        try:
            done.result()
        except RolemeshError as error:
            self.problem = self.problem or error
        except OSError as error:
            self.problem = self.problem or _failed(str(error), str(error.filename or ""))
        self._ahead = self._start()
        conversion = block.conversion
        if self.problem is not None:
            return {name: _zeros(block, kind) for name, kind in conversion.results.items()}
        if conversion.convert is None:
            return dict.fromkeys(conversion.results, sources[0][1])
        return conversion.convert(sources)

    def _start(self) -> tuple[Block, Sources, Future[None]] | None:
        block = next(self._blocks, None)
        if block is None:
            return None
        parts = [] if self.problem else block.sources()
        sources = [(entry, torch.empty(s, dtype=entry.type.dtype)) for entry, _, s in parts]
        ranges = [(entry.file, at) for entry, at, _ in parts]
        # Through numpy, because torch has no other view that a file can be read into.
        views = [as_bytes(tensor).numpy().data for _, tensor in sources]
        work = [(*place, view) for place, view in zip(ranges, views, strict=True)]
        return block, sources, self._thread.submit(self._read, work)

    def _read(self, work: Sequence[tuple[str, int, memoryview]]) -> None:
        for file, at, view in work:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            while view:
                count = os.preadv(self._files[file], [view], at)
                if not count:
                    raise _failed(f"it ends at byte {at}", file)
                view, at = view[count:], at + count


def _zeros(block: Block, kind: TensorType) -> torch.Tensor:
    start, stop = block.rows_of(kind)
    return torch.zeros((stop - start, *kind.shape[1:]), dtype=kind.dtype)


def _failed(what: str, file: str) -> RolemeshError:
    return RolemeshError(
        "RM032",
        what=f"reading the checkpoint failed: {what}",
        where=file,
        why="the file changed or its disk failed after its header was read; nothing is stored",
        fix="load again when the file is whole and nothing writes to it",
    )
