"""A timeline as JSON of the Trace Event Format, which Perfetto and chrome://tracing open.

The format is that of the document "Trace Event Format" of the Chromium project: an object with
`traceEvents`, whose times are microseconds. A rank is a process, a stream one of its threads. Used
are complete events (`X`), metadata events that name processes and threads (`M`), and flow events
from each `broadcast_start` to its `wait` (`s`, `f`).

Invariants: metadata comes first, other events are sorted by time; times are whole nanoseconds, so
that events of a thread do not overlap by rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from rolemesh.compiler.debug.timeline.timeline import COMMUNICATION, COMPUTE, WAIT, Event
from rolemesh.compiler.dump.reader import Stage

__all__ = ["trace_text"]

_Json = dict[str, object]


def trace_text(stage: Stage, events: Sequence[Event], about: Mapping[str, object]) -> str:
    """The JSON, with a line for each event.

    Args:
        stage: The stage that was simulated or run.
        events: Its timeline.
        about: What else to say, such as the machine; it is kept in `otherData`.
    """
    other = {"program": stage.program, "stage": stage.name, **about}
    head = json.dumps({"displayTimeUnit": "ns", "otherData": other}, ensure_ascii=False)
    lines = [*_names(events), *sorted(_spans(stage, events), key=_time)]
    body = ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    return f'{head[:-1]}, "traceEvents": [\n{body}\n]}}\n'


def _time(line: _Json) -> float:
    time = line["ts"]
    assert isinstance(time, float)
    return time


def _threads(events: Sequence[Event]) -> list[str]:
    """Streams in the order of their threads."""
    present = {event.stream for event in events}
    return [COMPUTE, COMMUNICATION, *sorted(present - {COMPUTE, COMMUNICATION})]


def _names(events: Sequence[Event]) -> Iterator[_Json]:
    for rank in sorted({event.rank for event in events}):
        yield _named("process_name", rank, 0, {"name": f"rank {rank}"})
        yield _named("process_sort_index", rank, 0, {"sort_index": rank})
        for thread, stream in enumerate(_threads(events)):
            yield _named("thread_name", rank, thread, {"name": stream})
            yield _named("thread_sort_index", rank, thread, {"sort_index": thread})


def _named(what: str, rank: int, thread: int, args: _Json) -> _Json:
    return {"name": what, "ph": "M", "pid": rank, "tid": thread, "args": args}


def _spans(stage: Stage, events: Sequence[Event]) -> Iterator[_Json]:
    threads = {stream: number for number, stream in enumerate(_threads(events))}
    started = {(e.rank, e.name): e for e in events if e.stream != COMPUTE}
    flow = 0
    for event in events:
        node = stage.nodes[event.name]
        place: _Json = {"pid": event.rank, "tid": threads[event.stream]}
        first, last = round(event.start * 1000), round(event.end * 1000)
        args: _Json = {"op": node.op, "module": event.module, "source": node.source}
        if event.stream != COMPUTE:
            args |= {"bytes": event.received, "cause": node.reason}
        yield {
            "name": event.name,
            "cat": event.kind,
            "ph": "X",
            "ts": first / 1000,
            "dur": (last - first) / 1000,
            **place,
            "args": args,
        }
        if event.kind == WAIT:
            source = started[event.rank, node.operands[0]]
            sent = round(source.start * 1000)
            flow += 1
            link: _Json = {"name": "prefetch", "cat": "flow", "id": flow}
            begun: _Json = {"pid": event.rank, "tid": threads[source.stream]}
            yield {**link, "ph": "s", "ts": sent / 1000, **begun}
            # A flow ends in the span that its time lies in, and not before it starts.
            yield {**link, "ph": "f", "bp": "e", "ts": max(first, sent) / 1000, **place}
