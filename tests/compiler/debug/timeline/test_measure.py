"""The measured timeline: what real ranks did, by the names of the simulated one."""

from __future__ import annotations

import pytest
from tests.compiler.debug.timeline.trace_format import check_trace

from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.timeline.measure import measure
from rolemesh.compiler.debug.timeline.overlap import loads
from rolemesh.compiler.debug.timeline.timeline import COMPUTE, WAIT, timeline
from rolemesh.compiler.debug.timeline.trace import trace_text
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh


def quiet(message: str) -> None:
    return


@pytest.mark.processes
def test_real_ranks_do_what_the_simulated_ones_do() -> None:
    options = CheckOptions("hf:deepseek_v32", "prefill", Mesh.parse("tp=2"), layers=2)
    stage, events = measure(options, None, quiet)
    collectives = [n.name for n in stage.nodes.values() if n.collective is not None]
    assert len(collectives) > 5
    assert any(name.endswith("_bundle_start") for name in collectives)
    for rank in (0, 1):
        moved = [e.name for e in events if e.rank == rank and e.stream != COMPUTE]
        assert sorted(moved) == sorted(collectives)
    simulated = timeline(stage)
    said, done = (sorted((e.rank, e.name, e.kind, e.received) for e in found)
                  for found in (simulated, events))  # fmt: skip
    assert said == done
    assert {rank.rank for rank in loads(events)} == {0, 1}
    check_trace(trace_text(stage, events, {"timeline": "measured"}))

    of = {(e.rank, e.name): e for e in events}
    for name in collectives:
        here, there = of[0, name], of[1, name]
        if here.kind != "broadcast":  # nobody has all of it before everybody has come
            assert min(here.end, there.end) > max(here.start, there.start)
    for event in events:
        if event.kind == WAIT:
            (started,) = stage.nodes[event.name].operands
            assert of[event.rank, started].start < event.end


@pytest.mark.parametrize(
    ("phase", "what"), [(None, "no phase is named"), ("warmup", "there is no phase 'warmup'")]
)
def test_a_phase_must_be_there(phase: str | None, what: str) -> None:
    options = CheckOptions("hf:llama", "pd_mixed", Mesh.parse("tp=2"), layers=1)
    with pytest.raises(RolemeshError) as caught:
        measure(options, phase, quiet)
    assert what in caught.value.what
    assert caught.value.why == "there are prefill, decode"
    assert caught.value.code == "RM018"
