"""The folder in which a checkpoint is written, and how it takes its place.

    OUT                    the checkpoint, once it is whole
    .OUT.reshard/lock      held by the process that writes
    .OUT.reshard/journal   what is written: the key of the work, and how many of its units are done
    .OUT.reshard/files/    becomes OUT

Invariants:

* OUT is what it was before, or the whole new checkpoint.
* The units that the journal counts are in the files, also after the machine failed.
* Work goes on only where its key is that of the journal. Other unfinished work, and a checkpoint
  that is there, are left alone unless they are to be replaced.
* What is replaced is a checkpoint that was written here: `checksums.json` lists all of its files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from rolemesh.compiler.ir.atomic import exchange, sync_folder, write_whole
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.reshard.checksums import CHECKSUMS, read_checksums

__all__ = ["Workplace", "unwritable"]


class Workplace:
    """The folder beside OUT, held by this process.

    Args:
        out: Where the checkpoint is to be.
        key: Identifies the work: equal keys write equal bytes in equal steps.
        overwrite: Replace a checkpoint that is there, and other unfinished work.

    Attributes:
        files: The folder to write to.
        done: Units that an earlier run has finished.
        published: Whether an earlier run has finished everything.

    Raises:
        RolemeshError: RM041 if something is there that is not to be replaced, another process holds
            the folder, or it cannot be made.
    """

    def __init__(self, out: Path, key: str, *, overwrite: bool) -> None:
        self.out = out
        self._folder = out.parent / f".{out.name}.reshard"
        self._journal = self._folder / "journal"
        self._key = key
        self.files = self._folder / "files"
        self.done = 0
        self.published = False
        if not self._folder.exists():
            _check_replaceable(out, overwrite=overwrite)
        try:
            self._folder.mkdir(exist_ok=True)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
            self._start(overwrite=overwrite)
        except OSError as error:
            raise unwritable(out, error) from error

    def note(self, done: int) -> None:
        """Say how many units are done, once their bytes last.

        Raises:
            OSError: If that fails.
        """
        body = {"key": self._key, "inode": self.files.stat().st_ino, "done": done}
        write_whole(self._journal, json.dumps(body).encode())
        self.done = done

    def publish(self) -> None:
        """Put the files in the place of OUT. What was there is gone after.

        Raises:
            OSError: If that fails.
        """
        sync_folder(self.files)
        old = self._folder / "old"
        if not _filled(self.out):
            os.rename(self.files, self.out)
        elif not exchange(self.files, self.out):
            os.rename(self.out, old)
            os.rename(self.files, self.out)
        sync_folder(self.out.parent)
        self.published = True

    def close(self) -> None:
        """Let go of the folder, and remove it if it is not needed to go on."""
        if self.published or not self.done:
            with suppress(OSError):
                self._remove()
        os.close(self._lock)

    def _remove(self) -> None:
        """Remove the folder; the journal last, since it tells a later run what the rest is."""
        for path in sorted(self._folder.iterdir(), key=lambda path: path == self._journal):
            _delete(path)
        self._folder.rmdir()

    def _start(self, *, overwrite: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise _refused(
                f"another process writes {self.out}",
                where=str(self._folder),
                why="it holds the lock of the folder that the checkpoint is written in",
                fix="wait until it has ended",
            ) from error
        try:
            self._take(overwrite=overwrite)
        except BaseException:
            if not self._journal.exists():
                with suppress(OSError):
                    self._remove()
            os.close(self._lock)
            raise

    def _take(self, *, overwrite: bool) -> None:
        """Go on with what is there, or start anew."""
        key, inode, done = self._read()
        old = self._folder / "old"
        if old.exists() and not self.out.exists():
            os.rename(old, self.out)  # stopped between two renames
        if _inode(self.out) == inode:  # stopped after the rename
            if key == self._key:
                self.published = True
                return
            key = None
        _check_replaceable(self.out, overwrite=overwrite)
        if key == self._key and _inode(self.files) == inode:
            self.done = done
            return
        if key not in (None, self._key) and done and not overwrite:
            raise _refused(
                f"there is an unfinished reshard to {self.out}",
                where=str(self._folder),
                why="it is of another source, target or option, or its source was written again",
                fix="run that one again to finish it, or overwrite to start anew",
            )
        for path in (self._journal, self.files, old):
            _delete(path)
        self.files.mkdir()
        self.note(0)

    def _read(self) -> tuple[str | None, int, int]:
        try:
            body = json.loads(self._journal.read_bytes())
            return str(body["key"]), int(body["inode"]), int(body["done"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, -1, 0  # none yet: it is written whole


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    """Refuse to write where something is that must stay.

    Raises:
        RolemeshError: RM041 if there is a checkpoint and it is not to be replaced, or something
            that was not written here.
    """
    if not out.parent.is_dir():
        raise _refused(
            f"{out} cannot be written",
            where=str(out),
            why=f"there is no folder {out.parent}",
            fix="name a folder in one that exists",
        )
    if not _filled(out):
        return
    if not overwrite:
        raise _refused(
            f"{out} exists",
            where=str(out),
            why="a checkpoint that is there is never changed",
            fix="name another folder, or overwrite: it is replaced once the new one is whole",
        )
    is_folder = out.is_dir() and not out.is_symlink()
    listed = read_checksums(out) if is_folder else None
    known = set() if listed is None else {CHECKSUMS, *listed.files}
    inside = sorted(path.name for path in out.iterdir()) if is_folder else [out.name]
    other = [name for name in inside if name not in known]
    if other:
        raise _refused(
            f"{out} has files that no reshard wrote",
            where=", ".join(other[:5]),
            why=f"only what {CHECKSUMS} lists is replaced",
            fix="name another folder, or move them away",
        )


def unwritable(out: Path, error: OSError) -> RolemeshError:
    """The error RM041 for what the system refused."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _refused(
        f"{out} cannot be written" + (": the disk is full" if full else ""),
        where=str(error.filename or out.parent),
        why=f"{type(error).__name__}: {error}",
        fix="make room and run it again: it goes on where it stopped"
        if full
        else "name a folder that this process can write to",
    )


def _refused(what: str, *, where: str, why: str, fix: str) -> RolemeshError:
    return RolemeshError("RM041", what, where=where, why=f"{why}; nothing was published", fix=fix)


def _filled(path: Path) -> bool:
    """Whether something is there other than an empty folder."""
    if path.is_symlink() or not path.is_dir():
        return os.path.lexists(path)
    return any(path.iterdir())


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None
