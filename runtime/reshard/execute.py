"""Carrying out a reshard between files: read, put together, write; one unit after the other.

One thread reads and checks the next unit while this one puts a unit together and another thread
hashes and writes the one before; a fourth makes what is written last, and notes it. Threads wait
for the disk or are in code that lets others run.

Invariants:

* In memory are at most the reads of one unit and all of two others: three times a unit's limit.
* The journal counts a unit once its writes last and all that it read was found good.
* The checkpoint is published once every byte of the source was found good, and the source is what
  it was at the beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.runtime.reshard.checksums import BLOCK_BYTES, Checksums, sums_of, write_checksums
from rolemesh.runtime.reshard.inputs import InputFile, open_inputs
from rolemesh.runtime.reshard.journal import Workplace, unwritable
from rolemesh.runtime.reshard.outputs import OutputFile
from rolemesh.runtime.reshard.sinks import Sink
from rolemesh.runtime.reshard.sources import Source
from rolemesh.runtime.reshard.units import Extent, Task, Unit

__all__ = ["NOTE_BYTES", "Work", "carry_out"]

NOTE_BYTES = 256 << 20
"""Bytes that are written before what is done is noted: about what a stopped run does twice."""

_SYNC_BYTES = 32 << 20
"""Bytes that are written before the disk is made to write them, too, while work goes on."""

Buffers = list[list[NDArray[np.void]]]
"""Parts of local tensors, by slab of a unit."""

_LINE = 64
"""Bytes that parts are aligned to."""


class _Arena:
    """Memory for the parts of one unit, used again for others: new memory costs a fault a page.

    Args:
        limit: Its bytes: all that one unit takes, each part in whole lines.
    """

    def __init__(self, limit: int) -> None:
        self._memory = np.empty(limit, np.uint8)
        self._used = 0

    def clear(self) -> None:
        """Use all of it again."""
        self._used = 0

    def take(self, shape: tuple[int, ...], words: np.dtype[np.void]) -> NDArray[np.void]:
        """Memory of a shape, with anything in it."""
        start, nbytes = self._used, math.prod(shape) * words.itemsize
        self._used += _lines(nbytes)
        return self._memory[start : start + nbytes].view(words).reshape(shape)


@dataclass(frozen=True)
class Work:
    """A reshard between files.

    Attributes:
        source: What is read.
        sink: What is written.
        units: How, in order.
    """

    source: Source
    sink: Sink
    units: Sequence[Unit]

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to be written."""
        return sum(self.written(unit) for unit in self.units)

    def written(self, unit: Unit) -> int:
        """Bytes that a unit writes."""
        return sum(
            extent.elements * len(extent.ranks) * self.itemsize(task)
            for task, slab in unit.slabs
            for extent in slab.writes
        )

    def itemsize(self, task: Task) -> int:
        """Bytes of an element of a task's tensor."""
        return self.sink.manifest.tensors[task.target].dtype.itemsize

    def places(self, task: Task, extent: Extent) -> Iterator[tuple[int, int]]:
        """The files, by rank, that a part is written to, and where."""
        for rank in extent.ranks:
            at = self.sink.at[task.target, rank, extent.piece]
            yield rank, at + extent.start * self.itemsize(task)


def carry_out(
    work: Work,
    workplace: Workplace,
    advance: Callable[[int], object],
    note_bytes: int = NOTE_BYTES,
) -> None:
    """Do the work, from where an earlier run stopped, and publish it.

    Args:
        work: The work.
        workplace: Where it is done.
        advance: Called with each number of bytes that are written.
        note_bytes: Bytes that are written before what is done is noted.

    Raises:
        RolemeshError: RM032 if the source cannot be read, is damaged or changes; RM041 if the
            result cannot be written. Nothing is published then.
    """
    with ExitStack() as stack:
        inputs = open_inputs(work.source, stack)
        try:
            outputs = _outputs(work, workplace, stack)
            _Run(work, workplace, inputs, outputs, advance, note_bytes).units()
            found = _finish(work, workplace, inputs, outputs)
            write_checksums(workplace.files, found)
            workplace.note(len(work.units))
            workplace.publish()
        except OSError as error:
            raise unwritable(workplace.out, error) from error


def _outputs(work: Work, workplace: Workplace, stack: ExitStack) -> dict[int, OutputFile]:
    """The target files, hashed as far as they are done; and no others."""
    names = {file.name for file in work.sink.files}
    for path in workplace.files.iterdir():
        if path.name not in names:  # a run was stopped while it wrote it
            path.unlink()
    outputs = {}
    for rank, file in enumerate(work.sink.files):
        if not file.size:
            continue
        output = OutputFile(workplace.files / file.name, file.size, file.parts)
        stack.callback(output.close)
        outputs[rank] = output
    ends = dict.fromkeys(outputs, 0)
    for unit in work.units[: workplace.done]:
        for task, slab in unit.slabs:
            for extent in slab.writes:
                for rank, at in work.places(task, extent):
                    ends[rank] = max(ends[rank], at + extent.elements * work.itemsize(task))
    for rank, output in outputs.items():
        output.resume(ends[rank])
    return outputs


def _finish(
    work: Work, workplace: Workplace, inputs: Sequence[InputFile], outputs: dict[int, OutputFile]
) -> Checksums:
    """Check what is left of the source while the files are made to last."""
    with ThreadPoolExecutor(2, thread_name_prefix="rolemesh-reshard") as pool:
        checked = [pool.submit(source.sweep) for source in inputs]
        files = {}
        for rank, output in outputs.items():
            files[work.sink.files[rank].name] = output.finish()
            output.sync()
        for name, data in work.sink.others.items():
            write_whole(workplace.files / name, data)
            files[name] = sums_of(workplace.files / name)
        for job in checked:
            job.result()
    return Checksums(BLOCK_BYTES, files)


class _Run:
    """One run over the units that are left."""

    def __init__(
        self,
        work: Work,
        workplace: Workplace,
        inputs: Sequence[InputFile],
        outputs: dict[int, OutputFile],
        advance: Callable[[int], object],
        note_bytes: int,
    ) -> None:
        self._work = work
        self._workplace = workplace
        self._inputs = inputs
        self._outputs = outputs
        self._advance = advance
        self._note_bytes = note_bytes
        limit = max(map(self._memory, work.units), default=0)
        # One for the unit that is read, one for that which is put together, one that is written.
        self._arenas = tuple(_Arena(limit) for _ in range(3))

    def units(self) -> None:
        """Do all units that are not done."""
        units = self._work.units[self._workplace.done :]
        number = self._workplace.done
        with ExitStack() as stack:
            reading, writing, noting = (
                stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="rolemesh-reshard"))
                for _ in range(3)
            )
            ahead = reading.submit(self._read, units[0], self._arenas[0]) if units else None
            written: Future[None] | None = None
            noted: Future[None] | None = None
            unnoted = unsynced = 0
            for index, unit in enumerate(units):
                assert ahead is not None
                have = ahead.result()
                last = index + 1 == len(units)
                free = self._arenas[(index + 1) % len(self._arenas)]
                ahead = None if last else reading.submit(self._read, units[index + 1], free)
                made = self._put_together(unit, have, self._arenas[index % len(self._arenas)])
                if written is not None:
                    written.result()
                written = writing.submit(self._write, unit, made)
                number += 1
                unnoted += self._work.written(unit)
                unsynced += self._work.written(unit)
                due = unsynced >= min(_SYNC_BYTES, self._note_bytes)
                if not due or (noted is not None and not noted.done()):
                    continue
                if noted is not None:
                    noted.result()
                if unnoted >= self._note_bytes:
                    settled = reading.submit(self._settle)
                    noted = noting.submit(self._note, number, written, settled)
                    unnoted = 0
                else:
                    noted = noting.submit(self._sync)
                unsynced = 0
            for job in (written, noted):
                if job is not None:
                    job.result()

    def _memory(self, unit: Unit) -> int:
        """Bytes that a unit takes of an arena."""
        return sum(
            _lines(extent.elements * self._work.itemsize(task))
            for task, slab in unit.slabs
            for extent in (*slab.reads, *slab.writes)
        )

    def _read(self, unit: Unit, arena: _Arena) -> Buffers:
        arena.clear()
        source, found = self._work.source, Buffers()
        for task, slab in unit.slabs:
            itemsize, parts = self._work.itemsize(task), []
            for extent in slab.reads:
                part = arena.take(extent.shape, _words(itemsize))
                name = task.transfers[extent.transfer][0].source
                (rank,) = extent.ranks
                at = source.at[name, rank, extent.piece] + extent.start * itemsize
                self._inputs[rank].read(_bytes(part), at)
                parts.append(part)
            found.append(parts)
        return found

    def _put_together(self, unit: Unit, have: Buffers, arena: _Arena) -> Buffers:
        found = Buffers()
        for (task, slab), parts in zip(unit.slabs, have, strict=True):
            words = _words(self._work.itemsize(task))
            made: dict[int, NDArray[np.void]] = {}
            for copy in slab.copies:
                take = parts[copy.read][copy.take]
                shape = slab.writes[copy.write].shape
                if take.shape == shape and take.flags.c_contiguous:
                    made[copy.write] = take  # all of it, as it is
                    continue
                if copy.write not in made:
                    made[copy.write] = arena.take(shape, words)
                    if not slab.filled[copy.write]:  # pads are zeros
                        made[copy.write].reshape(-1).view(np.uint8).fill(0)
                made[copy.write][copy.put] = take
            found.append([made[number] for number in range(len(slab.writes))])
        return found

    def _write(self, unit: Unit, made: Buffers) -> None:
        for (task, slab), parts in zip(unit.slabs, made, strict=True):
            for extent, part in zip(slab.writes, parts, strict=True):
                for rank, at in self._work.places(task, extent):
                    self._outputs[rank].write(_bytes(part), at)
        self._advance(self._work.written(unit))

    def _settle(self) -> None:
        for source in self._inputs:
            source.settle()

    def _note(self, done: int, written: Future[None], settled: Future[None]) -> None:
        written.result()
        settled.result()
        self._sync()
        self._workplace.note(done)

    def _sync(self) -> None:
        for output in self._outputs.values():
            output.sync()


def _lines(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


def _words(itemsize: int) -> np.dtype[np.void]:
    """A dtype of elements that are only copied."""
    return np.dtype(f"u{itemsize}" if itemsize in (1, 2, 4, 8) else f"V{itemsize}")


def _bytes(part: NDArray[np.void]) -> memoryview:
    return part.reshape(-1).view(np.uint8).data
