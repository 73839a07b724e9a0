"""What the Trace Event Format asks of a file, checked."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any

__all__ = ["check_trace"]

_REQUIRED = {
    "X": {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"},
    "M": {"name", "ph", "pid", "tid", "args"},
    "s": {"name", "cat", "ph", "ts", "pid", "tid", "id"},
    "f": {"name", "cat", "ph", "ts", "pid", "tid", "id", "bp"},
}
"""Keys of each type of event."""


def check_trace(text: str) -> list[dict[str, Any]]:
    """The complete events of a trace.

    Raises:
        AssertionError: If it is not as the format says.
    """
    data = json.loads(text)
    assert data["displayTimeUnit"] in ("ms", "ns")
    events = data["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert events[len(events) - len(timed) :] == timed, "metadata comes first"
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    threads: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        assert event.keys() == _REQUIRED[event["ph"]]
        assert type(event["pid"]) is type(event["tid"]) is int
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            place = event["pid"], event["tid"]
            threads[place].append((event["ts"], event["ts"] + event["dur"]))
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads.keys() <= named.keys()
    assert {e["pid"] for e in timed} == {e["pid"] for e in events if e["name"] == "process_name"}
    for spans in threads.values():
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end <= start + 1e-6, "spans of a thread do not overlap"
    _check_flows(timed, threads)
    return [event for event in timed if event["ph"] == "X"]


def _check_flows(
    timed: list[dict[str, Any]], threads: dict[Any, list[tuple[float, float]]]
) -> None:
    """Each flow starts and ends once, in a span of its thread."""
    starts = {event["id"]: event for event in timed if event["ph"] == "s"}
    ends = {event["id"]: event for event in timed if event["ph"] == "f"}
    assert len(starts) + len(ends) == sum(event["ph"] in "sf" for event in timed)
    assert starts.keys() == ends.keys()
    for event in (*starts.values(), *ends.values()):
        spans = threads[event["pid"], event["tid"]]
        assert any(start <= event["ts"] <= end for start, end in spans)
    assert all(starts[flow]["ts"] <= ends[flow]["ts"] for flow in starts)
