"""The simulated timeline: a small one as text, what always holds, and prefetch of a program."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.compiler.debug.small_stages import collective, node, stage
from tests.compiler.recorded import recorded_run
from tests.conftest import Golden

from rolemesh.compiler.debug.timeline.overlap import OUTSIDE, loads, loads_text
from rolemesh.compiler.debug.timeline.timeline import (
    COMMUNICATION,
    COMPUTE,
    WAIT,
    Event,
    Machine,
    timeline,
)
from rolemesh.compiler.dump.reader import Stage
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh

pytestmark = pytest.mark.xdist_group("recorded")

SLOW = Machine(tflops=1e-3, memory_gbps=0.5, link_gbps=0.25, latency_us=3.0)
"""Rates at which tiny models take a while to compute."""


def prefetched() -> Stage:
    """Two layers, each with an op and a broadcast weight; the second starts ahead of its use."""
    tp = {"tp": 2}
    first, second = "layers.0.proj", "layers.1.proj"
    nodes = [
        node("x", "input", shape=[6, 100]),
        node("w0", "input", shape=[100, 100]),
        node("w1", "input", shape=[100, 100]),
        collective("start", "mesh.broadcast_start", "w0", tp, [100, 100], first, owner=0),
        node("wait", "mesh.wait", ["start"], [100, 100], module=first),
        collective("start_1", "mesh.broadcast_start", "w1", tp, [100, 100], second, owner=1),
        node("t", "aten.t.default", ["wait"], [100, 100], module=first),
        node("mm", "aten.mm.default", ["x", "t"], [6, 100], flops=120_000, module=first),
        collective("all_reduce", "mesh.all_reduce", "mm", tp, [6, 100], first),
        node("relu", "aten.relu.default", ["all_reduce"], [6, 100], module=first),
        node("wait_1", "mesh.wait", ["start_1"], [100, 100], module=second),
        node("mm_1", "aten.mm.default", ["relu", "wait_1"], [6, 100], flops=120_000, module=second),
    ]
    return stage(nodes, tp)


def text(events: Sequence[Event]) -> str:
    return "\n".join(
        f"rank {e.rank}  {e.stream:13}  {e.start:7.1f} .. {e.end:7.1f}  {e.name:10}  {e.kind:10}"
        f"  {e.received:6}  {e.module}"
        for e in events
    )


def test_a_small_timeline(golden: Golden) -> None:
    machine = Machine(tflops=1e-3, memory_gbps=10, link_gbps=0.4, latency_us=5)
    events = timeline(prefetched(), machine)
    golden("timeline", f"{text(events)}\n\n{loads_text(loads(events))}")


def test_an_op_takes_the_longer_of_arithmetic_and_memory() -> None:
    machine = Machine(tflops=2, memory_gbps=4)
    assert machine.compute_us(6e6, 4e3) == pytest.approx(3)
    assert machine.compute_us(6e6, 2e4) == pytest.approx(5)
    nodes = [node("x", "input", shape=[300]), node("y", "aten.mul.Tensor", ["x", "x"], [300])]
    (event,) = timeline(stage(nodes, {"tp": 1}), machine)
    assert event.duration == pytest.approx(2 * 1200 / 4e3)  # an operand used twice is read once


@pytest.mark.parametrize("op", ["aten.embedding.default", "aten.index_select.default", "mesh.take"])
def test_a_lookup_reads_of_its_table_what_it_returns(op: str) -> None:
    nodes = [
        node("table", "input", shape=[1000, 8]),
        node("ids", "input", shape=[3], dtype="int64"),
        node("rows", op, ["table", "ids"], [3, 8]),
    ]
    (event,) = timeline(stage(nodes, {"tp": 1}), Machine(memory_gbps=1))
    assert event.duration == pytest.approx((2 * 3 * 8 * 4 + 3 * 8) / 1e3)


def test_what_is_expanded_is_read_once() -> None:
    nodes = [
        node("x", "input", shape=[7], dtype="bfloat16"),
        node("wide", "aten.expand.default", ["x"], [100, 7], dtype="bfloat16"),
        node("y", "aten.exp.default", ["wide"], [100, 7], dtype="bfloat16"),
    ]
    (event,) = timeline(stage(nodes, {"tp": 1}), Machine(memory_gbps=1))
    assert event.duration == pytest.approx((7 + 700) * 2 / 1e3)


def test_symbolic_sizes_have_their_hints() -> None:
    symbols = [{"name": "T", "hint": 13}]
    nodes = [
        node("x", "input", shape=[2, "((T + 3)//4)"], dtype="int64"),
        node("y", "aten.neg.default", ["x"], [2, "((T + 3)//4)"], dtype="int64", flops="1000*T"),
    ]
    recorded = stage(nodes, {"tp": 4}, symbols=symbols)
    assert timeline(recorded, Machine(memory_gbps=1))[0].duration == pytest.approx(2 * 64 / 1e3)
    assert timeline(recorded, Machine(tflops=1e-3))[0].duration == pytest.approx(13)


def test_a_stage_that_is_not_partitioned_is_refused() -> None:
    with pytest.raises(RolemeshError) as caught:
        timeline(stage([], {"tp": 2}, history=["capture", "seed"]))
    assert str(caught.value) == (
        "[RM018] stage 'seed' has no timeline\n"
        "  where: role/phase\n"
        "  why: what a rank runs is known from the stage partition on\n"
        "  fix: name partition or a later stage, such as last"
    )


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_machine_has_rates(rate: float) -> None:
    with pytest.raises(RolemeshError, match=r"RM018.*link_gbps is"):
        Machine(link_gbps=rate)
    assert Machine(latency_us=0).collective_us(2e3) == pytest.approx(0.01)


# --------------------------------------------------------------------------------------------------
# What holds for every stage.

SYNCHRONOUS = ("mesh.all_gather", "mesh.all_reduce", "mesh.reduce_scatter", "mesh.broadcast")


@st.composite
def stages(draw: st.DrawFn) -> Stage:
    """Chains of ops, views and collectives over one or two axes, with broadcasts in flight."""
    mesh = draw(st.sampled_from([{"tp": 3}, {"dp": 2, "tp": 2}, {"tp": 1}]))
    nodes = [node("x", "input", shape=[5, 7])]
    flying: list[str] = []
    values = ["x"]
    for number in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(["op", "op", "view", "collective", "start", "wait"]))
        name, operand = f"n{number}", draw(st.sampled_from(values))
        shape = [draw(st.integers(1, 2000)), 7]
        module = f"layers.{draw(st.integers(0, 2))}"
        axis = draw(st.sampled_from(list(mesh)))
        if kind == "start":
            owner = draw(st.integers(0, mesh[axis] - 1))
            over = {axis: mesh[axis]}
            nodes.append(
                collective(name, "mesh.broadcast_start", operand, over, shape, module, owner)
            )
            flying.append(name)
            continue
        if kind == "wait" and flying:
            nodes.append(node(name, "mesh.wait", [flying.pop(0)], shape, module=module))
        elif kind == "collective":
            op = draw(st.sampled_from(SYNCHRONOUS))
            one = op == "mesh.broadcast" or draw(st.booleans())
            over = {axis: mesh[axis]} if one else mesh
            owner = 0 if op == "mesh.broadcast" else None
            nodes.append(collective(name, op, operand, over, shape, module, owner))
        elif kind == "view":
            nodes.append(node(name, "aten.transpose.int", [operand], shape, module=module))
        else:
            flops = draw(st.integers(0, 10**6))
            nodes.append(
                node(name, "aten.mm.default", [operand, "x"], shape, flops=flops, module=module)
            )
        values.append(name)
    return stage(nodes, mesh)


def producers(recorded: Stage, name: str) -> set[str]:
    """Nodes with events that a node reads, through views."""
    found: set[str] = set()
    for operand in recorded.nodes[name].operands:
        if recorded.nodes[operand].op in ("aten.transpose.int", "input"):
            found |= producers(recorded, operand)
        else:
            found.add(operand)
    return found


@given(stages())
def test_streams_run_one_thing_at_a_time_and_nothing_before_what_it_reads(recorded: Stage) -> None:
    events = timeline(recorded, SLOW)
    streams: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        streams[event.rank, event.stream].append(event)
    for found in streams.values():
        for before, after in itertools.pairwise(found):
            assert before.end <= after.start
    of = {(event.rank, event.name): event for event in events}
    assert len(of) == len(events)
    for event in events:
        for name in producers(recorded, event.name):
            ready = of[event.rank, name].end
            assert ready <= (event.end if event.kind == WAIT else event.start) + 1e-9


@given(stages())
def test_ranks_of_a_group_exchange_together(recorded: Stage) -> None:
    mesh = Mesh(recorded.mesh)
    of = {(event.rank, event.name): event for event in timeline(recorded, SLOW)}
    for entry in recorded.nodes.values():
        for axis in entry.collective["axes"] if entry.collective else ():
            for rank in range(mesh.size):
                times = {
                    (of[r, entry.name].start, of[r, entry.name].end) for r in mesh.group(axis, rank)
                }
                assert len(times) == 1


@given(stages())
def test_bytes_are_those_of_the_ledger(recorded: Stage) -> None:
    mesh = Mesh(recorded.mesh)
    want = [0] * mesh.size
    for entry in recorded.nodes.values():
        if entry.collective is not None:
            owner = entry.data["kwargs"].get("owner")
            axis = mesh.index(entry.collective["axes"][0])
            for rank in range(mesh.size):
                if owner != mesh.coordinate(rank)[axis]:
                    want[rank] += entry.collective["bytes"]
    events = timeline(recorded)
    assert [sum(e.received for e in events if e.rank == r) for r in range(mesh.size)] == want
    assert all((e.received > 0) <= (e.stream == COMMUNICATION) for e in events)
    received = {rank.rank: rank.received for rank in loads(events)}
    assert all(received.get(rank, 0) == want[rank] for rank in range(mesh.size))


@given(stages())
def test_times_add_up(recorded: Stage) -> None:
    events = timeline(recorded, SLOW)
    for rank in loads(events):
        mine = [event for event in events if event.rank == rank.rank]
        moving = sum(event.duration for event in mine if event.stream == COMMUNICATION)
        assert rank.exposed + rank.overlapped == pytest.approx(moving)
        assert rank.total >= rank.compute + rank.exposed - 1e-6
        assert min(rank.exposed, rank.overlapped) > -1e-9
        for part in ("compute", "exposed", "overlapped", "received"):
            layers = sum(getattr(layer, part) for layer in rank.layers.values())
            assert layers == pytest.approx(getattr(rank, part))


@given(
    stages(),
    st.sampled_from(["tflops", "memory_gbps", "link_gbps"]),
    st.floats(1, 100),
    st.floats(0, 1),
)
def test_a_faster_machine_is_never_slower(
    recorded: Stage, rate: str, times: float, latency: float
) -> None:
    def total(machine: Machine) -> float:
        return max((event.end for event in timeline(recorded, machine)), default=0.0)

    slow = total(SLOW)
    assert total(replace(SLOW, **{rate: getattr(SLOW, rate) * times})) <= slow + 1e-9
    assert total(replace(SLOW, latency_us=SLOW.latency_us * latency)) <= slow + 1e-9


# --------------------------------------------------------------------------------------------------
# A real program.


def test_prefetched_broadcasts_run_behind_the_layer_before() -> None:
    program = recorded_run("hf:deepseek_v32", "prefill").program("prefill")
    last = program.stage()
    events = [event for event in timeline(last, SLOW) if event.rank == 0]
    begun = min(e.start for e in events if e.stream == COMPUTE and "layers.1." in e.module)
    ahead = [e for e in events if e.kind == "broadcast" and "layers.1." in e.module]
    assert len(ahead) == 2
    assert all(event.start < begun for event in ahead)
    with_, without = (loads(timeline(program.stage(s), SLOW)) for s in ("prefetch", "partition"))
    assert all(rank.overlapped == pytest.approx(0) for rank in without)
    assert all(rank.overlapped > 0 for rank in with_)
    assert max(rank.total for rank in with_) < max(rank.total for rank in without)


def test_owners_receive_less() -> None:
    program = recorded_run("hf:deepseek_v32", "prefill").program("prefill")
    stage_ = program.stage()
    moved = [n.collective["bytes"] for n in stage_.nodes.values() if n.collective is not None]
    assert sum(moved) == program.entry["stages"][-1]["bytes"]
    ranks = loads(timeline(stage_))
    assert {rank.rank: rank.received < sum(moved) for rank in ranks} == {
        0: True,
        1: True,
        2: False,
        3: False,
    }  # two layers, whose weights ranks 0 and 1 own
    assert set(ranks[0].layers) == {OUTSIDE, "model.layers.0", "model.layers.1"}
