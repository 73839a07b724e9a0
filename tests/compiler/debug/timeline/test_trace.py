"""Timelines in the Trace Event Format."""

from __future__ import annotations

import json

from hypothesis import given
from tests.compiler.debug.small_stages import collective, node, stage
from tests.compiler.debug.timeline.test_timeline import SLOW, prefetched, stages
from tests.compiler.debug.timeline.trace_format import check_trace

from rolemesh.compiler.debug.timeline.timeline import Machine, timeline
from rolemesh.compiler.debug.timeline.trace import trace_text
from rolemesh.compiler.dump.reader import Stage


@given(stages())
def test_every_timeline_is_a_valid_trace(recorded: Stage) -> None:
    events = timeline(recorded, SLOW)
    spans = check_trace(trace_text(recorded, events, {}))
    assert len(spans) == len(events)
    moved = sum(span["args"].get("bytes", 0) for span in spans)
    assert moved == sum(event.received for event in events)


def test_spans_shorter_than_a_nanosecond_do_not_overlap() -> None:
    names = [f"n{i}" for i in range(40)]
    nodes = [node("x", "input", shape=[3])]
    nodes += [node(name, "aten.neg.default", ["x"], [3]) for name in names]
    recorded = stage(nodes, {"tp": 1})
    spans = check_trace(trace_text(recorded, timeline(recorded, Machine(memory_gbps=70)), {}))
    assert {span["dur"] for span in spans} == {0, 0.001}


def test_a_span_says_what_it_is_and_where_it_is_from() -> None:
    tp = {"tp": 2}
    gather = collective("all_gather", "mesh.all_gather", "x", tp, [2, 3], "layers.0")
    gather |= {"reason": "mm(w) needs all of it", "source": "model.py:7"}
    recorded = stage([node("x", "input", shape=[2, 3]), gather], tp)
    text = trace_text(recorded, timeline(recorded), {"timeline": "simulated"})
    spans = check_trace(text)
    assert spans[1] == {
        "name": "all_gather",
        "cat": "all_gather",
        "ph": "X",
        "ts": 0.0,
        "dur": 10.0,
        "pid": 1,
        "tid": 1,
        "args": {
            "op": "mesh.all_gather",
            "module": "layers.0",
            "source": "model.py:7",
            "bytes": 24,
            "cause": "mm(w) needs all of it",
        },
    }
    assert json.loads(text)["otherData"] == {
        "program": "role/phase",
        "stage": "partition",
        "timeline": "simulated",
    }


def test_an_arrow_leads_from_each_broadcast_to_its_wait() -> None:
    recorded = prefetched()
    events = timeline(recorded, SLOW)
    found = json.loads(trace_text(recorded, events, {}))["traceEvents"]
    of = {(e.rank, e.name): e for e in events}
    for rank in (0, 1):
        flows = [e for e in found if e["ph"] in "sf" and e["pid"] == rank]
        drawn: dict[int, dict[str, tuple[int, float]]] = {}
        for e in flows:
            drawn.setdefault(e["id"], {})[e["ph"]] = e["tid"], e["ts"]
        assert [drawn[number] for number in sorted(drawn)] == [
            {"s": (1, 0.0), "f": (0, of[rank, "wait"].start)},
            {"s": (1, of[rank, "start_1"].start), "f": (0, round(of[rank, "wait_1"].start, 3))},
        ]
