"""Ranks as processes: results in order, the first failure named, nothing left running."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.launch import run_processes


def rank_times(factor: int) -> int:
    return dist.get_rank() * factor


def fate(what: str) -> None:
    if dist.get_rank() == 1:
        if what == "raises":
            raise ValueError("no such thing")
        if what == "dies":
            os._exit(3)
    time.sleep(60)


def unpicklable() -> object:
    return lambda: None


def failure(
    target: Callable[..., object], *args: object, ranks: int = 2, timeout: float = 60.0
) -> RolemeshError:
    started = time.monotonic()
    with pytest.raises(RolemeshError) as caught:
        run_processes(target, ranks, args, timeout=timeout, fork=True)
    assert caught.value.code == "RM013"
    assert time.monotonic() - started < 40.0
    assert multiprocessing.active_children() == []
    return caught.value


@pytest.mark.processes
def test_results_come_in_rank_order() -> None:
    assert run_processes(f"{__file__}:rank_times", 2, (10,)) == [0, 10]
    assert multiprocessing.active_children() == []


@pytest.mark.processes
def test_a_rank_that_raises() -> None:
    error = failure(fate, "raises")
    assert error.what == "rank 1 raised ValueError: no such thing"
    assert 'raise ValueError("no such thing")' in error.why
    assert isinstance(error.__cause__, ValueError)


@pytest.mark.processes
def test_a_rank_that_dies() -> None:
    assert failure(fate, "dies").what == "rank 1 died with exit code 3"


@pytest.mark.processes
def test_a_run_that_does_not_finish(capfd: pytest.CaptureFixture[str]) -> None:
    error = failure(fate, "sleeps", ranks=1, timeout=3)
    assert error.what == "rank 0 did not finish in 3 s"
    assert "in fate" in capfd.readouterr().err


@pytest.mark.processes
def test_a_result_that_does_not_pickle() -> None:
    assert "the result does not pickle" in failure(unpicklable, ranks=1).why


def collect() -> int:
    gc.collect()
    return dist.get_rank()


@pytest.mark.processes
def test_ranks_do_not_collect_what_their_parent_left() -> None:
    """A group that is part of a cycle goes away with the next collection, and joins its threads."""
    gc.disable()
    try:
        left = [dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=20))]
        left.append(left)  # type: ignore[arg-type]
        left[0].barrier().wait()
        del left
        assert run_processes(collect, 2, fork=True, timeout=20) == [0, 1]
    finally:
        gc.enable()


@pytest.mark.processes
def test_ranks_are_there_before_the_store_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a process whose store is at work may find its locks taken, and wait for ever."""
    started: list[int] = []
    store = dist.TCPStore

    def made(*args: object, **kwargs: object) -> dist.TCPStore:
        if kwargs.get("is_master"):
            started.append(len(multiprocessing.active_children()))
        return store(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dist, "TCPStore", made)
    assert run_processes(f"{__file__}:rank_times", 3, (2,)) == [0, 2, 4]
    assert started == [3]
