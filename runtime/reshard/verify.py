"""Checksums of a checkpoint that is on disk: recorded for one that has none, and checked."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass

from rolemesh.runtime.progress import bar
from rolemesh.runtime.reshard.checksums import (
    BLOCK_BYTES,
    CHECKSUMS,
    Checksums,
    bad_checkpoint,
    sums_of,
    write_checksums,
)
from rolemesh.runtime.reshard.inputs import open_inputs
from rolemesh.runtime.reshard.journal import unwritable
from rolemesh.runtime.reshard.sources import Source, open_source

__all__ = ["Verified", "verify_checkpoint"]


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        source: The checkpoint.
        nbytes: Bytes of all of its files.
        recorded: Whether the checksums are new.
    """

    source: Source
    nbytes: int
    recorded: bool


def verify_checkpoint(
    path: str | os.PathLike[str], *, record: bool = False, progress: bool | None = None
) -> Verified:
    """Compare every byte of a checkpoint with its checksums.

    Args:
        path: What `rolemesh.reshard` takes as a source.
        record: Where there are no checksums, write those of the files as they are.
        progress: Show a bar on standard error; None to do so on a terminal.

    Raises:
        RolemeshError: RM032 if it cannot be read, is damaged, or has no checksums that could say;
            RM038 for its manifest; RM041 if checksums cannot be written.
    """
    source = open_source(path)
    names = (*source.files, *source.others)
    nbytes = sum((source.folder / name).stat().st_size for name in names)
    shown = sys.stderr.isatty() if progress is None else progress
    if source.checksums is None and not record:
        raise bad_checkpoint(
            f"{source.folder} has no {CHECKSUMS}",
            where=str(source.folder),
            why="nobody recorded what its bytes should be",
            fix="if they are known to be good, record their checksums: rolemesh verify --record",
        )
    with ExitStack() as stack:
        advance = stack.enter_context(bar(nbytes, "checking", shown=shown))
        if source.checksums is not None:
            for file in open_inputs(source, stack):
                file.sweep()
                advance(file.size)
            return Verified(source, nbytes, recorded=False)
        try:
            files = {name: sums_of(source.folder / name, advance=advance) for name in names}
            write_checksums(source.folder, Checksums(BLOCK_BYTES, files))
        except OSError as error:
            raise unwritable(source.folder / CHECKSUMS, error) from error
    return Verified(source, nbytes, recorded=True)
