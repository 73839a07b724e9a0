"""Files and folders that are whole or not there.

Invariants, through failures of this process and of the machine:

* A path has the content that it had before, or all of the new content.
* What `write_whole` or `write_folder` has returned from stays.
* Any number of processes may write the same path at the same time: one of them is last.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["exchange", "sync_folder", "write_folder", "write_whole"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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


def write_folder(
    path: Path, files: Mapping[str, bytes], unless: Callable[[], bool] = lambda: False
) -> None:
    """Write a folder so that nobody ever sees a part of it.

    Args:
        path: The folder. One that is there is replaced as a whole; its folder is made.
        files: The contents of its files, by name.
        unless: Called if a folder with anything in it is there when all is written: whether that
            one will do.

    Raises:
        OSError: If that fails; a folder that was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        part.chmod(0o755)
        for name, content in files.items():
            write_whole(part / name, content, parents=True)
        _publish(part, path, unless)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, path: Path, unless: Callable[[], bool]) -> None:
    """Give a folder its name; if another one has it, that gets this one's."""
    while True:
        try:
            part.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            return
        if unless():
            return
        with suppress(FileNotFoundError):
            if exchange(part, path):
                return
            # The file system cannot swap: for a moment nothing is there.
            aside = part.with_name(f"{part.name}.old")
            path.rename(aside)
            try:
                part.rename(path)
            finally:
                if path.exists():
                    shutil.rmtree(aside, ignore_errors=True)
                else:
                    aside.rename(path)
            return


def exchange(first: Path, second: Path) -> bool:
    """Swap two files or folders at once.

    Returns:
        False where the file system cannot.

    Raises:
        OSError: If one of them is not there, or may not be renamed.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(second))
