"""Starting the ranks of a mesh as processes of this machine, for tests, demos and measurements.

The parent holds the store that the ranks meet at, on a port that the system chooses, so two runs
never race for a port. Every wait has a deadline, shortly before which a rank writes to its standard
error where it is; when one rank fails the others are killed; a rank whose parent is gone ends
itself.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.watch import is_collective_error

__all__ = ["Outcome", "run_processes", "run_ranks"]

_SETTLE = 1.0
"""Seconds in which ranks that fail because of another one may still report."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        rank: The rank.
        value: What the target returned.
        error: What it raised, if anything.
        trace: The traceback of that.
        exitcode: Exit code of a process that ended without a report; None if it reported, or was
            still running when it was stopped.
        reported: Whether the target returned or raised.
    """

    rank: int
    value: object = None
    error: BaseException | None = None
    trace: str = ""
    exitcode: int | None = None
    reported: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether the target returned."""
        return self.reported and self.error is None


Target = str | Callable[..., object]
"""A function by name, `module:function` or `path/to/file.py:function`; for forks, any function."""


def run_processes(
    target: Target,
    world_size: int,
    args: Sequence[object] = (),
    *,
    timeout: float = 120.0,
    collective_timeout: float | None = None,
    fork: bool = False,
) -> list[object]:
    """Run a function on every rank of a gloo group.

    Args:
        target: What to run. It is called with `args`; the default process group is initialised.
        world_size: Number of ranks.
        args: Arguments, which must pickle unless ranks are forks.
        timeout: Seconds for the whole run.
        collective_timeout: Seconds a collective may wait; `timeout` if None.
        fork: Start ranks as copies of this process rather than anew, so that they share what it
            has loaded and compiled. It must have no process group yet.

    Returns:
        What each rank returned.

    Raises:
        RolemeshError: RM013 naming the rank that raised, died or did not finish, with its
            traceback. An RM013 that ranks raised about another rank is passed on.
    """
    outcomes = run_ranks(
        target, world_size, args, timeout=timeout, collective_timeout=collective_timeout, fork=fork
    )
    failed = [outcome for outcome in outcomes if not outcome.succeeded]
    if not failed:
        return [outcome.value for outcome in outcomes]
    first = min(failed, key=_blame)
    if isinstance(first.error, RolemeshError) and first.error.code == "RM013":
        raise first.error
    if first.error is not None:
        how = f"raised {type(first.error).__name__}: {first.error}"
    elif first.exitcode is not None:
        how = f"died with exit code {first.exitcode}"
    else:
        how = f"did not finish in {timeout:g} s"
    raise RolemeshError(
        "RM013",
        what=f"rank {first.rank} {how}",
        where=f"{_name(target)} on {world_size} ranks",
        why=first.trace.rstrip() or "it ended without a report",
        fix="" if first.error is not None else "see what that rank wrote to its standard error",
    ) from first.error


def run_ranks(
    target: Target,
    world_size: int,
    args: Sequence[object] = (),
    *,
    timeout: float = 120.0,
    collective_timeout: float | None = None,
    stop_early: bool = True,
    fork: bool = False,
) -> list[Outcome]:
    """Run a function on every rank and say how each one ended; see `run_processes`.

    Args:
        target: As in `run_processes`.
        world_size: Number of ranks.
        args: As in `run_processes`.
        timeout: Seconds for the whole run.
        collective_timeout: Seconds a collective may wait; `timeout` if None.
        stop_early: Kill the other ranks soon after the first failure, rather than let them find
            out for themselves.
        fork: As in `run_processes`.
    """
    context = multiprocessing.get_context("fork" if fork else "spawn")
    deadline = time.monotonic() + timeout
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        with _nothing_to_collect():
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                seconds = (timeout, collective_timeout or timeout)
                options = (rank, world_size, target, tuple(args), seconds, theirs)
                process: BaseProcess = context.Process(target=_main, args=options, daemon=True)  # type: ignore[attr-defined]
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
        # Only now: a copy made while the store's thread serves another rank has its locks for ever.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for connection in connections:
            with suppress(OSError):  # what became of a rank that is gone is found below
                connection.send(store.port)
        return _collect(processes, connections, deadline, stop_early)
    finally:
        for connection in connections:
            with suppress(OSError):
                connection.send_bytes(b"")  # tells a rank that has reported to end
            connection.close()
        for process in processes:
            process.join(max(0.0, min(5.0, deadline - time.monotonic())))
            if process.exitcode is None:
                process.kill()
                process.join(5.0)


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """Let copies of this process collect nothing that it made.

    A process group that waits for collection here has threads. A copy has not, and would wait for
    them for ever.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _collect(
    processes: list[BaseProcess],
    connections: list[Connection],
    deadline: float,
    stop_early: bool,
) -> list[Outcome]:
    outcomes = [Outcome(rank) for rank in range(len(processes))]
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting:
        left = deadline - time.monotonic()
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, left))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            outcomes[rank] = _outcome(rank, processes[rank], connection)
            if stop_early and not outcomes[rank].succeeded:
                deadline = min(deadline, time.monotonic() + _SETTLE)
    for rank in waiting.values():
        processes[rank].kill()
    return outcomes


def _outcome(rank: int, process: BaseProcess, connection: Connection) -> Outcome:
    try:
        value, error, trace = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        process.join(5.0)
        return Outcome(rank, exitcode=process.exitcode)
    return Outcome(rank, value, error, trace, reported=True)


def _blame(outcome: Outcome) -> tuple[int, int]:
    """Sorts causes before what follows from them."""
    error = outcome.error
    if outcome.exitcode is not None:
        return 0, outcome.rank
    if error is None:
        return 3, outcome.rank
    if isinstance(error, RolemeshError) and error.code == "RM013":
        return 2, outcome.rank
    return (4 if is_collective_error(error) else 1), outcome.rank


# --------------------------------------------------------------------------------------------------
# In the rank's process.


def _main(
    rank: int,
    world_size: int,
    target: Target,
    args: tuple[object, ...],
    seconds: tuple[float, float],
    connection: Connection,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    faulthandler.dump_traceback_later(0.9 * seconds[0], file=2)
    torch.set_num_threads(1)  # the ranks share this machine's cores
    value: object = None
    error: BaseException | None = None
    trace = ""
    start, wait = map(_delta, seconds)
    try:
        store = dist.TCPStore("127.0.0.1", connection.recv(), is_master=False, timeout=start)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("rolemesh", store),
            rank=rank,
            world_size=world_size,
            timeout=start,
        )
        dist.barrier()  # ranks do not start together, which the timeout must not count
        dist.distributed_c10d._set_pg_timeout(wait)
        value = _load(target)(*args)
    except BaseException as raised:  # noqa: BLE001 - it is raised again by the parent
        error, trace = raised, traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    connection.send_bytes(_report(value, error, trace))
    with suppress(EOFError, OSError):
        connection.recv_bytes()  # other ranks may still read what this one sent them
    sys.stdout.flush()
    sys.stderr.flush()
    # Removes named semaphores, which _exit would leak.
    multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]
    os._exit(0)  # a gloo group with a dead member may not be torn down in bounded time


def _delta(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _report(value: object, error: BaseException | None, trace: str) -> bytes:
    try:
        report = pickle.dumps((value, error, trace))
        pickle.loads(report)
    except Exception as failure:  # noqa: BLE001 - anything may refuse to pickle
        cause = error if error is not None else failure
        plain = RuntimeError(f"{type(cause).__name__}: {cause}")
        report = pickle.dumps((None, plain, trace or f"the result does not pickle: {failure}"))
    return report


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _name(target: Target) -> str:
    return target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"


def _load(target: Target) -> Callable[..., object]:
    if not isinstance(target, str):
        return target
    place, _, name = target.rpartition(":")
    if not place.endswith(".py"):
        return getattr(importlib.import_module(place), name)
    spec = importlib.util.spec_from_file_location("rolemesh_rank_target", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
