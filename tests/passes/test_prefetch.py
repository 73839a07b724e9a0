"""Prefetch: layer-sharded weights are received ahead of use, into buffers that are reused."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from tests.models import PipelineStage
from torch import Tensor, fx

from rolemesh.compiler.api import Sharded, lockstep, shard
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.ir.dialect import BROADCAST_START, WAIT
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.pipeline import Stages
from rolemesh.passes.prefetch import Prefetch
from rolemesh.passes.verify import Verify

pytestmark = pytest.mark.xdist_group("prefetch")

LAYERS = len(PipelineStage.NUMBERS)
WEIGHT = PipelineStage.WIDTH**2 * 4
KINDS = ("q", "k", "v", "o")  # owned by one rank; without a cache, keys and values are too


def prompt(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(PipelineStage.VOCABULARY, (2, 11), generator=generator)


@functools.cache
def stage() -> tuple[PipelineStage, Traced]:
    model = PipelineStage()
    return model, trace(model, prompt(0))


def prefetched(window: int, ranks: int = 4) -> Sharded:
    return shard(stage()[1], {"tp": ranks}, "prefill", prefetch=window)


def starts(program: Program) -> list[fx.Node]:
    return [node for node in program.ops if node.target is BROADCAST_START]


def wait_of(start: fx.Node) -> fx.Node:
    (wait,) = start.users
    assert wait.target is WAIT
    return wait


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("window", [0, 1, 2])
def test_several_forwards_in_a_row_are_right(window: int, ranks: int) -> None:
    sharded = prefetched(window, ranks)
    for seed in range(3):
        got = lockstep(sharded, prompt(seed), poison=True, check=True)
        torch.testing.assert_close(got, stage()[0](prompt(seed)), rtol=1e-5, atol=1e-5)


# ---- buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 2, 10])
def test_the_pool_has_one_buffer_more_than_the_window_for_each_kind_of_weight(window: int) -> None:
    buffers = min(window + 1, LAYERS)
    assert prefetched(window).memory_analysis().pool == len(KINDS) * buffers * WEIGHT


@pytest.mark.parametrize("window", [0, 1, 2])
def test_a_rank_holds_its_share_of_the_layers_and_the_window(window: int) -> None:
    """(ceil(layers / ranks) + window + 1) layers, as docs/roles.md has it."""
    memory = prefetched(window).memory_analysis()
    model = stage()[0]
    shared = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if name.split(".")[-2] not in KINDS
    )
    layers = -(-LAYERS // 4) + window + 1
    assert memory.weights + memory.pool - shared == layers * len(KINDS) * WEIGHT


@pytest.mark.parametrize("window", [0, 1, 2])
def test_buffers_of_a_kind_are_taken_in_turn(window: int) -> None:
    program = prefetched(window).program
    for kind in KINDS:
        slots = [str(n.kwargs["slot"]) for n in starts(program) if f".{kind}." in n.kwargs["slot"]]
        assert slots == [f"layers.*.{kind}.weight#{i % (window + 1)}" for i in range(LAYERS)]


# ---- when ----------------------------------------------------------------------------------------


def test_without_a_window_a_broadcast_starts_at_its_use() -> None:
    for start in starts(prefetched(0).program):
        assert start.next is wait_of(start)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broadcast_runs_behind_as_many_layers_as_the_window_has(window: int, kind: str) -> None:
    program = prefetched(window).program
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    mine = [node for node in starts(program) if f".{kind}." in str(node.kwargs["slot"])]
    used = [position[wait_of(start)] for start in mine]
    for layer, start in enumerate(mine):
        behind = sum(position[start] < use < used[layer] for use in used)
        assert behind == min(layer, window)


def test_a_program_without_owned_weights_stays_as_it_is() -> None:
    program = shard(stage()[1], {"tp": 4}).program
    again = Prefetch(1).apply(program)
    assert again.graph is program.graph
    assert again.history == (*program.history, "prefetch")


def test_a_negative_window_is_refused() -> None:
    with pytest.raises(RolemeshError) as raised:
        Prefetch(-1)
    assert str(raised.value) == (
        "[RM018] the prefetch window is -1\n"
        "  where: option prefetch\n"
        "  why: it counts layers ahead of use\n"
        "  fix: use 0, 1 or 2"
    )


# ---- too early -----------------------------------------------------------------------------------


def moved_before(program: Program, start: fx.Node, target: fx.Node) -> Program:
    """The program with one start moved ahead of `target`."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> None:
        values[node] = graph.node_copy(node, values.__getitem__)

    for node in program.graph.nodes:
        if node is target:
            copy(start)
        if node is not start:
            copy(node)
    layouts = {values[node]: layout for node, layout in program.layouts.items()}
    return dataclasses.replace(program, graph=graph, layouts=layouts)


def too_early(place: str) -> tuple[Sharded, Program]:
    """A program that receives layer 4's query weight while layer 3's is still to be read."""
    sharded = prefetched(0)
    program = sharded.program
    first, second = [n for n in starts(program) if ".q." in str(n.kwargs["slot"])][:2]
    view = next(iter(wait_of(first).users))
    assert str(view.target) == "aten.t.default"
    target = {"before the wait": wait_of(first), "between a view and its use": view.next}[place]
    return sharded, moved_before(program, second, target)


@pytest.mark.parametrize("place", ["before the wait", "between a view and its use"])
def test_verify_refuses_a_start_that_overwrites_a_weight_in_use(place: str) -> None:
    _, program = too_early(place)
    with pytest.raises(RolemeshError) as raised:
        Verify().apply(program)
    assert raised.value.code == "RM016"
    assert "receives into buffer layers.*.q.weight#0 before %broadcast_start" in raised.value.what
    assert raised.value.why == "the earlier weight would be overwritten while it is in use"


def test_lockstep_reuses_buffers_so_that_a_start_too_early_shows() -> None:
    sharded, program = too_early("before the wait")
    wrong = dataclasses.replace(sharded, stages=Stages(sharded.stages.decided, program))
    ids = prompt(0)
    assert not torch.allclose(lockstep(wrong, ids), stage()[0](ids), atol=1e-3)  # type: ignore[arg-type]


def test_verify_accepts_the_start_after_the_last_read() -> None:
    for window in (0, 1, 2):
        program = prefetched(window).program
        assert Verify().apply(program).graph is program.graph
