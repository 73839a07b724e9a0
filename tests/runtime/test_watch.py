"""A rank that dies, hangs, fails or leaves: every other rank raises RM013 naming it, in time."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.launch import Outcome, run_ranks
from rolemesh.runtime.watch import Watch, _State, is_collective_error

pytestmark = pytest.mark.processes

COLLECTIVE_TIMEOUT = 2.0
BOUND = COLLECTIVE_TIMEOUT + 6.0
VICTIM = 1


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    started = torch.ops._c10d_functional.all_reduce(x, "sum", dist.group.WORLD.group_name)
    return torch.ops._c10d_functional.wait_tensor(started)


def worker(fate: str) -> tuple[str, float]:
    """Three steps; at the second one the victim meets its fate. Returns the error and its time."""
    watch = Watch.of_default_group(interval=0.25)
    started = time.monotonic()
    try:
        for step in range(3):
            with watch.guard():
                if step == 1 and dist.get_rank() == VICTIM:
                    meet(fate)
                started = time.monotonic()
                all_reduce(torch.ones(4))
            if step == 1 and dist.get_rank() == VICTIM:
                watch.close()
                break
    except RolemeshError as error:
        return str(error), time.monotonic() - started
    return "no error", time.monotonic() - started


def meet(fate: str) -> None:
    if fate == "dies":
        os._exit(7)
    if fate == "hangs":
        time.sleep(COLLECTIVE_TIMEOUT + 4.0)
    if fate == "raises":
        raise ZeroDivisionError("of its own")


def run(fate: str, ranks: int) -> list[Outcome]:
    return run_ranks(
        worker,
        ranks,
        (fate,),
        timeout=60.0,
        collective_timeout=COLLECTIVE_TIMEOUT,
        stop_early=False,
        fork=True,
    )


@pytest.mark.parametrize(
    ("fate", "ranks", "said"),
    [
        ("dies", 2, "rank 1 died; last heard after"),
        ("hangs", 3, "rank 1 hangs in a step after 1 completed steps, at "),
        ("raises", 2, "rank 1 raised ZeroDivisionError: of its own"),
        ("leaves", 2, "rank 1 left after 2 completed steps"),
    ],
)
def test_every_other_rank_names_the_one_to_blame(fate: str, ranks: int, said: str) -> None:
    for outcome in run(fate, ranks):
        if outcome.rank == VICTIM:
            assert (outcome.exitcode == 7) == (fate == "dies")
            continue
        assert outcome.succeeded, outcome.trace
        assert isinstance(outcome.value, tuple)
        text, seconds = outcome.value
        assert text.startswith(f"[RM013] {said}")
        assert f"found by rank {outcome.rank}" in text or ranks > 2
        assert seconds < BOUND


def test_a_hanging_rank_is_shown_at_its_source_line() -> None:
    states = _states(hangs=("inside", "model.py:12 time.sleep(60)", False))
    assert "at model.py:12 time.sleep(60)" in states["what"]
    assert states["why"].startswith("it is alive")


def test_ranks_in_different_collectives_are_all_shown() -> None:
    states = _states(waits=("inside", "graph.py:3 all_reduce", True))
    assert states["what"] == "all ranks wait, in different collectives"
    assert "rank 1 after 2 steps at graph.py:3 all_reduce" in states["why"]


def test_a_lost_store_points_at_its_holder() -> None:
    states = _states(lost=("inside", "", True))
    assert "rank 0, which holds the store" in states["what"]


def _states(**fate: tuple[str, str, bool]) -> dict[str, str]:
    """The verdict of rank 2 of 3 about rank 1, whose state is given; rank 0 has failed too."""
    watch = Watch(dist.HashStore(), 2, 3, interval=0.01)
    watch.close()
    ((kind, (phase, at, waits)),) = fate.items()
    now = time.monotonic()
    watch._others = {
        0: _State(beat=5, steps=2, phase="failed"),
        1: _State(beat=5, steps=2, phase=phase, at=at, waits=waits),
    }
    watch._changed = {0: now, 1: now}
    watch._heard = now
    return watch._find(now + 1.0 if kind == "lost" else now - 1.0)


def test_errors_of_this_rank_are_not_those_of_a_collective() -> None:
    assert not is_collective_error(ValueError("Connection closed by peer"))
    assert not is_collective_error(RuntimeError("shapes differ"))
    assert is_collective_error(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed"))
    assert is_collective_error(dist.DistBackendError("x"))
