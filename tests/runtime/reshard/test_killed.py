"""A reshard that is killed: nothing is half published, and the next run finishes it."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.manifests import one

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.runtime.reshard import journal
from rolemesh.runtime.reshard.reshard import Resharded, reshard

CALLS = ("preadv", "pwrite", "fsync", "fdatasync", "rename", "replace", "posix_fallocate", "mkdir")
"""Between any two of these nothing changes on disk."""

LAST = 14
"""A run makes at least as many calls after its last `pwrite`."""

Moment = tuple[int, int]
"""Before the second-th call behind the first-th `pwrite`.

How often a run notes what is done depends on its threads, so the number of all calls differs from
run to run; that of writes does not.
"""


def target() -> Manifest:
    mesh = Mesh({"tp": 3})
    tensors = {}
    for name in ("a", "b", "c"):
        tensors |= one(mesh, Layout((Shard(1, 1, 50),)), (64, 50), name).tensors
    return Manifest(mesh, tensors)


def run(folder: Path) -> Resharded:
    return reshard(
        folder / "source",
        target(),
        folder / "out",
        staging=24_000,
        note_bytes=4000,
        overwrite=(folder / "replaced").exists(),
    )


def intercept(act: Callable[[str], None]) -> None:
    """Call `act` before every call that touches the disk, and before folders are swapped."""
    lock = threading.Lock()

    def before(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **options: object) -> object:
            with lock:
                act(name)
            return call(*args, **options)

        return called

    for name in CALLS:
        setattr(os, name, before(name, getattr(os, name)))
    journal.exchange = before("exchange", journal.exchange)  # type: ignore[assignment]


def run_until(folder: Path, moment: Moment | None, seconds: float) -> None:
    """Run, and be killed at a moment, or after a while if there is none."""
    seen = [0, 0]

    def die(name: str) -> None:
        assert moment is not None
        if seen[0] < moment[0]:
            seen[0] += name == "pwrite"
            return
        seen[1] += 1
        if seen[1] == moment[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    if moment is not None:
        intercept(die)
    else:
        threading.Thread(target=later, args=(seconds,), daemon=True).start()
    run(folder)


def later(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def count_writes(folder: Path, writes: multiprocessing.Queue[int]) -> None:
    names: list[str] = []
    intercept(names.append)
    run(folder)
    writes.put(names.count("pwrite"))


def contents(folder: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("replacing", [False, True])
def test_a_killed_run_publishes_nothing_and_is_finished_by_the_next(
    tmp_path: Path, replacing: bool
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    whole = {name: torch.randn(64, 50) for name in ("a", "b", "c")}
    save_file(whole, source / "model.safetensors")
    reshard(source, "dcp", tmp_path / "old")
    old = contents(tmp_path / "old")
    if replacing:
        (tmp_path / "replaced").touch()
    before = old if replacing else None

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    writes: multiprocessing.Queue[int] = context.Queue()

    def begin() -> None:
        if replacing:
            reshard(source, "dcp", tmp_path / "out", overwrite=True)

    begin()
    counting = context.Process(target=count_writes, args=(tmp_path, writes))
    counting.start()
    counting.join(60)
    assert counting.exitcode == 0
    total = writes.get()
    expected = contents(tmp_path / "out")
    assert expected is not None
    assert len(expected) == 5

    pick = random.Random(4 + replacing)
    early = [(write, 1) for write in pick.sample(range(total), 3)]
    late = [(total, call) for call in (1, 4, 7, 10, LAST)]  # some of what is done has been noted
    moments: list[Moment | None] = [*early, *late, None, None]
    resumed = killed = 0
    for moment in moments:
        shutil.rmtree(tmp_path / "out")
        begin()
        child = context.Process(target=run_until, args=(tmp_path, moment, pick.random() * 0.1))
        child.start()
        child.join(60)
        killed += child.exitcode == -signal.SIGKILL
        found = contents(tmp_path / "out")
        assert found in (before, expected), moment
        if found == expected and not (tmp_path / ".out.reshard" / "journal").exists():
            continue  # it had ended, but perhaps for an empty folder
        resumed += run(tmp_path).resumed > 0
        assert contents(tmp_path / "out") == expected, moment
        assert not (tmp_path / ".out.reshard").exists()
    assert killed >= len(early) + len(late)
    assert resumed, "some runs went on where another had stopped"
