"""Finding the rank that died or hangs, so that no other rank waits for it without end.

Every rank has a thread that writes its state to the store that the ranks met at, and reads the
others'. When a collective fails or times out, the rank looks at what it knows of the others and
raises RM013, naming who is to blame:

1. a rank that raised an error of its own;
2. a rank whose heartbeat stopped, or that left: it died;
3. a rank that is alive but does not wait in a collective: it hangs, or is behind.

The first rank to find out writes its verdict, which the others adopt. What bounds the time is the
timeout of the process groups; the search adds a few heartbeats to it.

Invariants: the store is used by one thread alone, over a connection of its own, and never waited on
for a key that may not exist; a call that succeeds costs two assignments.
"""

from __future__ import annotations

import atexit
import json
import linecache
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType, TracebackType

import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Watch", "is_collective_error"]


@dataclass(frozen=True)
class _State:
    """What a rank says of itself.

    Attributes:
        beat: Counts up while the process lives.
        steps: Guarded calls it has completed.
        phase: `outside` or `inside` a guarded call, `failed` in a collective, `raised` an error of
            its own, or `left`.
        at: Source line that its main thread is at, or its error.
        waits: Whether that line waits in a collective.
    """

    beat: int = 0
    steps: int = 0
    phase: str = "outside"
    at: str = ""
    waits: bool = False


class Watch:
    """One rank's heartbeat, and its view of the others.

    Args:
        store: The store the ranks met at; a connection of its own is opened.
        rank: This rank.
        world_size: Number of ranks.
        interval: Seconds between heartbeats.
        name: Tells watches apart that share a store; the same on every rank.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        interval: float = 0.5,
        name: str = "watch",
    ) -> None:
        own = store.clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"rolemesh/{name}", own)
        self._store.set_timeout(timedelta(seconds=4 * interval))
        self._rank = rank
        self._world_size = world_size
        self._interval = interval
        self._main = threading.get_ident()
        self._steps = 0
        self._phase = "outside"
        self._error = ""
        self._proposal = ""
        self._verdict = ""
        self._others: dict[int, _State] = {}
        self._changed: dict[int, float] = {}
        self._heard = time.monotonic()
        self._tick = threading.Condition()
        self._ticks = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rolemesh-watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside the store must not meet the end of Python

    @classmethod
    def of_default_group(cls, *, interval: float = 0.5, name: str = "watch") -> Watch:
        """A watch over the ranks of the default process group."""
        store = dist.distributed_c10d._get_default_store()
        return cls(store, dist.get_rank(), dist.get_world_size(), interval=interval, name=name)

    def guard(self) -> AbstractContextManager[None]:
        """Run one step of the program, the same on every rank.

        Raises:
            RolemeshError: RM013 in place of a collective's error, naming the rank to blame. Other
                errors pass, and are told to the other ranks.
        """
        return _Guard(self)

    def _enter(self) -> None:
        self._main = threading.get_ident()
        self._phase = "inside"

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            self._steps += 1
            self._phase = "outside"
        elif not isinstance(error, Exception):
            return
        elif is_collective_error(error):
            self._phase = "failed"
            raise self._blame() from error
        else:
            # Told before it is raised: the process may end at once.
            self._error = f"{type(error).__name__}: {error}".split("\n", 1)[0]
            self._phase = "raised"
            self._await_ticks(1)

    def close(self) -> None:
        """Tell the other ranks that this one has left, and stop the heartbeat."""
        atexit.unregister(self.close)
        if self._closed.is_set():
            return
        if self._phase == "outside":
            self._phase = "left"
        self._closed.set()
        self._thread.join(8 * self._interval)

    # ----------------------------------------------------------------------------------------------
    # The heartbeat thread.

    def _run(self) -> None:
        beat = 0
        while not self._closed.wait(self._interval if beat else 0.0):
            beat += 1
            with suppress(RuntimeError):  # the store is gone or slow: what was heard last remains
                self._exchange_states(beat)
            with self._tick:
                self._ticks += 1
                self._tick.notify_all()
        with suppress(RuntimeError):
            self._exchange_states(beat + 1)

    def _exchange_states(self, beat: int) -> None:
        at, waits = (self._error, False) if self._error else _place_of(self._main)
        state = _State(beat, self._steps, self._phase, at, waits)
        self._store.set(str(self._rank), json.dumps(asdict(state)))
        keys = [str(rank) for rank in range(self._world_size)]
        for rank, key in enumerate(keys):
            if rank == self._rank or not self._store.check([key]):
                continue
            heard = _State(**json.loads(self._store.get(key)))
            if rank not in self._others or heard.beat != self._others[rank].beat:
                self._changed[rank] = time.monotonic()
            self._others[rank] = heard
        if self._proposal and not self._verdict:
            self._verdict = self._store.compare_set("verdict", "", self._proposal).decode()
        elif self._store.check(["verdict"]):
            self._verdict = self._store.get("verdict").decode()
        self._heard = time.monotonic()

    # ----------------------------------------------------------------------------------------------
    # After a failure, in the thread that failed.

    def _await_ticks(self, count: int) -> None:
        """Wait until the heartbeat has gone round `count` times, or should have."""
        with self._tick:
            goal = self._ticks + count + 1  # the round under way may have read old values
            self._tick.wait_for(lambda: self._ticks >= goal, timeout=8 * self._interval)

    def _blame(self) -> RolemeshError:
        failed_at = time.monotonic()
        window = (_SILENCE + 2) * self._interval
        while not self._verdict and time.monotonic() - failed_at < window:
            self._await_ticks(0)
            if any(state.phase == "raised" for state in self._others.values()):
                break
        if not self._verdict:
            self._proposal = json.dumps(self._find(failed_at))
            self._await_ticks(1)
        found = json.loads(self._verdict or self._proposal)
        return RolemeshError("RM013", **found)

    def _find(self, failed_at: float) -> dict[str, str]:
        """The verdict from what is known; see the module docstring for the order."""
        others = {rank: self._others.get(rank) for rank in range(self._world_size)}
        del others[self._rank]
        store_lost = self._heard < failed_at
        raised = {r: s for r, s in others.items() if s is not None and s.phase == "raised"}
        silent = {
            rank: state
            for rank, state in others.items()
            if state is None
            or state.phase == "left"
            or (state.phase != "failed" and self._silence(rank) > _SILENCE * self._interval)
        }
        hanging = {
            rank: state
            for rank, state in others.items()
            if state is not None and state.phase in ("inside", "outside") and not state.waits
        }
        if raised:
            said = [f"rank {rank} raised {state.at}" for rank, state in raised.items()]
            why = "the other ranks waited for it in a collective"
        elif silent:
            said = [self._said_of_silent(rank, state) for rank, state in silent.items()]
            why = "its heartbeat stopped, and a collective cannot finish without it"
        elif store_lost:
            said = ["rank 0, which holds the store that ranks meet at, died"]
            why = "the store is gone; if a launcher held it, the launcher died"
        elif hanging:
            said = [self._said_of_hanging(rank, state) for rank, state in hanging.items()]
            why = "it is alive, but did not come to the collective that the others waited in"
        else:
            said = ["all ranks wait, in different collectives"]
            why = "; ".join(
                f"rank {rank} after {state.steps} steps at {state.at}"
                for rank, state in others.items()
                if state is not None
            )
        return {
            "what": "; ".join(said),
            "where": f"found by rank {self._rank} of {self._world_size} after "
            f"{self._steps} completed steps",
            "why": why,
            "fix": "see that rank's own log; the other ranks cannot go on, start all ranks again",
        }

    def _silence(self, rank: int) -> float:
        """Seconds without a heartbeat, up to when the store was last heard."""
        return self._heard - self._changed.get(rank, 0.0)

    def _said_of_silent(self, rank: int, state: _State | None) -> str:
        if state is None:
            return f"rank {rank} never started"
        if state.phase == "left":
            return f"rank {rank} left after {state.steps} completed steps"
        place = state.at or "an unknown place"
        return f"rank {rank} died; last heard after {state.steps} completed steps, at {place}"

    def _said_of_hanging(self, rank: int, state: _State) -> str:
        where = "in a step" if state.phase == "inside" else "between steps"
        return f"rank {rank} hangs {where} after {state.steps} completed steps, at {state.at}"


class _Guard(AbstractContextManager[None]):
    """The context of a guarded call."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __enter__(self) -> None:
        self._watch._enter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch._leave(error)


_SILENCE = 6
"""Intervals without a heartbeat after which a rank counts as dead."""


def is_collective_error(error: BaseException) -> bool:
    """Whether `error` says that a collective failed, rather than that this rank did."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, RolemeshError):
        if error.code != "RM030":  # a collective of a GE graph, with the backend's words
            return False
    elif not isinstance(error, RuntimeError):
        return False
    return any(sign in str(error) for sign in _SIGNS)


_SIGNS = (
    "gloo/",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "timed out after",
    "Broken pipe",
)
"""Parts of the messages of torch.distributed's backends."""


def _place_of(thread: int) -> tuple[str, bool]:
    """The innermost source line of a thread, and whether it waits in a collective."""
    frame: FrameType | None = sys._current_frames().get(thread)
    place = ""
    for _ in range(_DEPTH):
        if frame is None:
            break
        code = frame.f_code
        name = str(frame.f_globals.get("__name__") or "")
        number = frame.f_lineno or 0  # None between two lines
        line = linecache.getline(code.co_filename, number, frame.f_globals).strip()
        if "_c10d_functional" in line or name.startswith("torch.distributed"):
            return f"{code.co_filename}:{number} {line}"[:200], True
        if not place and name.partition(".")[0] != "torch":
            place = f"{code.co_filename}:{number} {line}"[:200]
        frame = frame.f_back
    return place, False


_DEPTH = 12
"""Frames to look at: a collective called from a program is a few below the top."""
