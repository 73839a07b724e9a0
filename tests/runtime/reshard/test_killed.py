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


def intercept(act: Callable[[], None]) -> None:
    """Call `act` before every call that touches the disk, and before folders are swapped."""

    def before(call: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **options: object) -> object:
            act()
            return call(*args, **options)

        return called

    for name in CALLS:
        setattr(os, name, before(getattr(os, name)))
    journal._exchange = before(journal._exchange)  # type: ignore[assignment]


def run_until(folder: Path, call: int | None, seconds: float) -> None:
    """Run, and be killed at the n-th call, or after a while."""
    count, lock = [0], threading.Lock()

    def die() -> None:
        with lock:
            count[0] += 1
            if count[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)

    if call is not None:
        intercept(die)
    else:
        threading.Thread(target=later, args=(seconds,), daemon=True).start()
    run(folder)


def later(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def count_calls(folder: Path, calls: multiprocessing.Queue[int]) -> None:
    count = [0]

    def add() -> None:
        count[0] += 1

    intercept(add)
    run(folder)
    calls.put(count[0])


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
    calls: multiprocessing.Queue[int] = context.Queue()

    def begin() -> None:
        if replacing:
            reshard(source, "dcp", tmp_path / "out", overwrite=True)

    begin()
    counting = context.Process(target=count_calls, args=(tmp_path, calls))
    counting.start()
    total = calls.get(timeout=60)
    counting.join()
    expected = contents(tmp_path / "out")
    assert expected is not None
    assert len(expected) == 5

    pick = random.Random(4 + replacing)
    late = [total - back for back in (16, 12, 8, 4, 1)]  # some of what is done has been noted
    moments: list[int | None] = [*pick.sample(range(1, total), 3), *late, None, None]
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
    assert killed >= 6, "how many calls a run makes depends a little on its threads"
    assert resumed, "some runs went on where another had stopped"
