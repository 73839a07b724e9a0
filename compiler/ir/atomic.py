"""Files that are whole or not there.

Invariants, through failures of this process and of the machine:

* A path has the content that it had before, or all of the new content.
* What `write_whole` has returned from stays.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["sync_folder", "write_whole"]


def write_whole(path: Path, content: bytes, *, mode: int = 0o644, parents: bool = False) -> None:
    """Write a file so that nobody ever sees a part of it.

    Args:
        path: The file. One that is there is replaced.
        content: All of its bytes.
        mode: Its permissions.
        parents: Make its folder if it is not there.

    Raises:
        OSError: If that fails; a file that was there before still is.
    """
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(part).replace(path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last.

    Raises:
        OSError: If that fails.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
