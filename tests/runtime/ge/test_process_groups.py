"""Collectives over process groups give what a rendezvous gives, and say which group failed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.communicator import Communicator, Request
from rolemesh.runtime.ge.process_groups import ProcessGroups
from rolemesh.runtime.ge.rendezvous import run_ranks
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.launch import run_ranks as launch_ranks
from rolemesh.runtime.traffic import record_traffic

RANKS = 4
SENT = [[1, 0, 2, 1], [0, 3, 1, 0], [2, 2, 0, 5], [0, 0, 1, 1]]
"""Elements that each rank sends to each rank."""
MOVED = (torch.float32, torch.bfloat16, torch.bool, torch.int16, torch.float8_e4m3fn)
REDUCED = (torch.float32, torch.bfloat16, torch.int64)


def cases(rank: int, world: str, part: str) -> Iterator[tuple[Request, torch.Tensor]]:
    """What a rank takes part in: values are small integers, so that no order of sums matters."""
    for dtype in MOVED:
        x = (torch.arange(24) * 3 % 7 + rank).reshape(8, 3).to(dtype)
        for group in (world, part):
            yield Request("all_gather", group, "g"), x
            yield Request("broadcast", group, "b", root=1), x
            yield Request("all_to_all", group, "a"), x.reshape(-1)
        counts = tuple(SENT[rank])
        yield (
            Request(
                "all_to_all",
                world,
                "v",
                send_counts=counts,
                receive_counts=tuple(row[rank] for row in SENT),
            ),
            x.reshape(-1)[: sum(counts)],
        )
        yield Request("all_gather", world, "empty"), x[:0]
    for dtype in REDUCED:
        for reduction in ("sum", "max", "min", "prod"):
            for group in (world, part):
                x = (torch.arange(12) % 3 + rank).reshape(4, 3).to(dtype)
                yield Request("all_reduce", group, "r", reduction), x
                yield Request("reduce_scatter", group, "s", reduction), x
        yield Request("all_reduce", world, "scalar", "sum"), torch.tensor(rank).to(dtype)


def parts() -> list[list[int]]:
    return [[0, 3], [1, 2]]


def name(tag: str, ranks: list[int]) -> str:
    return f"tag={tag};rank_list={','.join(map(str, ranks))}"


Result = tuple[torch.dtype, torch.Tensor]
"""A data type, and values as float64: 8-bit floats do not pickle."""


def result(tensor: torch.Tensor) -> Result:
    return tensor.dtype, tensor.double()


def worker() -> tuple[list[Result], list[tuple[str, float, int]]]:
    """All cases of this rank over gloo, and the traffic of the first ones."""
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in parts()]
    group = groups[rank in parts()[1]]
    tag_of = dist.distributed_c10d._get_group_tag
    assert dist.group.WORLD is not None
    world = name(tag_of(dist.group.WORLD), list(range(RANKS)))
    part = name(tag_of(group), dist.get_process_group_ranks(group))
    communicator: Communicator = ProcessGroups()
    backwards = name(tag_of(group), dist.get_process_group_ranks(group)[::-1])
    assert refused(backwards).why.startswith("no group of these ranks, in this order")
    results = []
    with record_traffic() as records:
        for request, wire in cases(rank, world, part):
            before = wire.clone()
            results.append(result(communicator.exchange(request, wire)))
            assert torch.equal(wire.double(), before.double())
    return results, [tuple(record) for record in records[:3]]


@pytest.mark.processes
def test_gloo_gives_what_a_rendezvous_gives() -> None:
    def thread(rank: int, to: Communicator) -> list[Result]:
        part = name("part", parts()[rank in parts()[1]])
        world = name("world", list(range(RANKS)))
        return [result(to.exchange(*case)) for case in cases(rank, world, part)]

    expected = run_ranks(RANKS, thread)
    found = run_processes(worker, RANKS, fork=True)
    for rank, outcome in enumerate(found):
        assert isinstance(outcome, tuple)
        results, traffic = outcome
        assert len(results) == len(expected[rank])
        for (dtype, mine), (expected_dtype, other) in zip(results, expected[rank], strict=True):
            assert dtype == expected_dtype
            assert torch.equal(mine, other)
        # 8 x 3 floats from each of 3 others, from the root, and 3 of 4 blocks.
        assert traffic == [
            ("all_gather", 288.0, 4),
            ("broadcast", 0.0 if rank == 1 else 96.0, 4),
            ("all_to_all", 72.0, 4),
        ]


def waiter() -> tuple[str, str, float]:
    """What rank 0 raises when rank 1 does not come, its cause, and how long that takes."""
    assert dist.group.WORLD is not None
    world = name(dist.distributed_c10d._get_group_tag(dist.group.WORLD), [0, 1])
    started = time.monotonic()
    if dist.get_rank() == 0:
        error = refused(world)
        return str(error), type(error.__cause__).__name__, time.monotonic() - started
    time.sleep(4.0)
    return "", "", 0.0


@pytest.mark.processes
def test_a_missing_rank_is_an_error_in_the_time_of_the_group() -> None:
    (outcome, _) = launch_ranks(
        waiter, 2, timeout=60.0, collective_timeout=1.5, stop_early=False, fork=True
    )
    assert outcome.succeeded, outcome.trace
    assert isinstance(outcome.value, tuple)
    text, cause, seconds = outcome.value
    assert text.startswith(
        "[RM030] HcomAllGather 'g' failed on rank 0\n  where: all_gather in group tag="
    )
    assert "imed out" in text
    assert cause in ("RuntimeError", "DistBackendError")
    assert seconds < 4.0


@pytest.fixture
def alone() -> Iterator[str]:
    """A process group of this process only; its name."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    try:
        yield name(dist.distributed_c10d._get_group_tag(dist.group.WORLD), [0])
    finally:
        dist.destroy_process_group()


def refused(group: str) -> RolemeshError:
    with pytest.raises(RolemeshError) as caught:
        ProcessGroups().exchange(Request("all_gather", group, "HcomAllGather 'g'"), torch.ones(2))
    assert caught.value.code == "RM030"
    return caught.value


def test_a_group_of_one(alone: str) -> None:
    result = ProcessGroups().exchange(Request("all_gather", alone, "g"), torch.ones(2))
    assert result.tolist() == [1.0, 1.0]


def test_groups_that_do_not_exist(alone: str) -> None:
    assert str(refused("tag=nope;rank_list=0")) == (
        "[RM030] HcomAllGather 'g' names a group that this process is not in\n"
        "  where: all_gather in group tag=nope;rank_list=0\n"
        "  why: no group of these ranks, in this order, has the tag 'nope'\n"
        "  fix: convert the graph in the processes that run it, after their groups are made"
    )
    assert refused(alone.replace("=0", "=0,1")).why.startswith("no group of these ranks")
    assert refused(alone.replace("=0", "=0,0")).why.startswith("no group of these ranks")
    assert refused(alone.replace("rank_list=0", "rank_list=1")).why == "this is rank 0"
    assert refused("hccl").what == "'hccl' names no group of ranks"


def test_no_process_group() -> None:
    assert refused("tag=;rank_list=0").why == "torch.distributed has no process group"


def test_errors_that_are_not_of_the_backend_pass(alone: str) -> None:
    with pytest.raises(RuntimeError, match="Invalid scalar type"):
        ProcessGroups().exchange(
            Request("all_reduce", alone, "r", "sum"), torch.ones(2, dtype=torch.int16)
        )
    with pytest.raises(ValueError, match="unknown collective gossip"):
        ProcessGroups().exchange(Request("gossip", alone, "g"), torch.ones(2))
