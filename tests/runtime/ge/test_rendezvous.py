"""Ranks as threads: right and repeatable results, and errors at once when ranks do not meet."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.communicator import Communicator, Request
from rolemesh.runtime.ge.rendezvous import Rendezvous, run_ranks

ALL = "tag=world;rank_list=0,1,2"
GATHER = Request("all_gather", ALL, "HcomAllGather 'gather'")

Body = Callable[[int, Communicator], object]


def exchanged(request: Request, wires: list[torch.Tensor]) -> list[torch.Tensor]:
    return run_ranks(len(wires), lambda rank, to: to.exchange(request, wires[rank]), timeout=20.0)


def failure(body: Body, size: int = 3, timeout: float = 20.0, bound: float = 5.0) -> BaseException:
    started = time.monotonic()
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - callers look at it
        run_ranks(size, body, timeout=timeout)
    assert time.monotonic() - started < bound
    return caught.value


def refusals(body: Body, size: int = 3, timeout: float = 20.0) -> list[RolemeshError | None]:
    """What each rank raised."""
    found: list[RolemeshError | None] = [None] * size

    def recording(rank: int, communicator: Communicator) -> None:
        try:
            body(rank, communicator)
        except RolemeshError as error:
            found[rank] = error
            raise

    failure(recording, size, timeout)
    assert all(error is None or error.code == "RM030" for error in found)
    return found


def wires(*shape: int, dtype: torch.dtype = torch.float32, size: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape).mul(8).to(dtype) for _ in range(size)]


# --------------------------------------------------------------------------------------------------
# Results.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_all_gather(dtype: torch.dtype) -> None:
    given = wires(2, 5, dtype=dtype)
    for result in exchanged(GATHER, given):
        assert torch.equal(result, torch.cat(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "max", "min", "prod"])
def test_reductions_are_made_in_rank_order(reduction: str, dtype: torch.dtype) -> None:
    given = wires(6, 5, dtype=dtype)
    a, b, c = given
    expected = {
        "sum": (a + b) + c,
        "prod": (a * b) * c,
        "max": torch.stack(given).amax(0),
        "min": torch.stack(given).amin(0),
    }[reduction]
    if reduction == "sum":
        assert not torch.equal(expected, a + (b + c))
    request = replace(GATHER, kind="all_reduce", reduction=reduction)
    for result in exchanged(request, given):
        assert result.dtype == dtype
        assert torch.equal(result, expected)
    request = replace(GATHER, kind="reduce_scatter", reduction=reduction)
    assert torch.equal(torch.cat(exchanged(request, given)), expected)


def test_broadcast_sends_from_a_position_in_the_group() -> None:
    group = "tag=;rank_list=2,0"
    given = wires(4, 3)

    def body(rank: int, to: Communicator) -> torch.Tensor:
        if rank == 1:
            return given[rank]
        return to.exchange(Request("broadcast", group, "b", root=0), given[rank])

    results = run_ranks(3, body)
    assert torch.equal(results[0], given[2])
    assert torch.equal(results[2], given[2])


def test_all_to_all_in_equal_blocks() -> None:
    given = [torch.arange(6) + 10 * rank for rank in range(3)]
    request = replace(GATHER, kind="all_to_all")
    results = exchanged(request, given)
    assert [result.tolist() for result in results] == [
        [0, 1, 10, 11, 20, 21],
        [2, 3, 12, 13, 22, 23],
        [4, 5, 14, 15, 24, 25],
    ]


SENT = [[1, 0, 2], [0, 3, 1], [2, 2, 0]]
"""Elements that each rank sends to each rank."""


def uneven(rank: int) -> Request:
    return replace(
        GATHER,
        kind="all_to_all",
        send_counts=tuple(SENT[rank]),
        receive_counts=tuple(row[rank] for row in SENT),
    )


def test_all_to_all_in_uneven_blocks() -> None:
    given = [torch.arange(sum(SENT[rank])) + 10 * rank for rank in range(3)]
    results = run_ranks(3, lambda rank, to: to.exchange(uneven(rank), given[rank]))
    assert [result.tolist() for result in results] == [
        [0, 20, 21],
        [10, 11, 12, 22, 23],
        [1, 2, 13],
    ]


@pytest.mark.parametrize("kind", ["all_gather", "all_reduce", "reduce_scatter", "broadcast"])
def test_results_have_memory_of_their_own(kind: str) -> None:
    given = wires(3, 2)
    reduction = "sum" if "reduce" in kind else ""
    results = exchanged(replace(GATHER, kind=kind, reduction=reduction), given)
    places = {tensor.untyped_storage().data_ptr() for tensor in [*given, *results]}
    assert len(places) == 6
    nbytes = {tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in results}
    assert nbytes == {True}


def test_groups_meet_on_their_own() -> None:
    def body(rank: int, to: Communicator) -> list[float]:
        row = f"tag=row;rank_list={rank // 2 * 2},{rank // 2 * 2 + 1}"
        column = f"tag=column;rank_list={rank % 2},{rank % 2 + 2}"
        x = torch.tensor([float(rank)])
        for _ in range(rank % 2):  # groups need not be in step with each other
            x = x + 0
        joined = to.exchange(Request("all_gather", row, "r"), x)
        return to.exchange(Request("all_gather", column, "c"), joined).tolist()

    expected = [0.0, 1.0, 2.0, 3.0]
    assert run_ranks(4, body) == [expected] * 4


def test_many_collectives_one_after_the_other() -> None:
    def body(rank: int, to: Communicator) -> float:
        x = torch.tensor([float(rank)])
        for _ in range(200):
            x = to.exchange(replace(GATHER, kind="all_reduce", reduction="sum"), x) / 3
        return x.item()

    assert run_ranks(3, body) == pytest.approx([1.0] * 3)


def test_ranks_compute_in_turn_in_the_same_order_every_time() -> None:
    order: list[list[int]] = []
    running: list[int] = []

    def body(rank: int, to: Communicator) -> None:
        for _ in range(5):
            running.append(rank)
            time.sleep(0.001)
            assert running == [rank]
            running.clear()
            order[-1].append(rank)
            to.exchange(GATHER, torch.ones(1))

    for _ in range(3):
        order.append([])
        run_ranks(3, body)
    assert order[0] == order[1] == order[2]


def test_ranks_have_the_context_of_their_caller() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="default")
    variable.set("caller")

    def body(rank: int, to: Communicator) -> str:
        seen = variable.get()
        variable.set(f"rank {rank}")
        return seen

    assert run_ranks(3, body) == ["caller"] * 3
    assert variable.get() == "caller"


def test_a_communicator_serves_every_run_of_its_rendezvous() -> None:
    rendezvous = Rendezvous(2)
    group = "tag=;rank_list=0,1"
    kept = [rendezvous.communicator(rank) for rank in range(2)]
    for number in range(3):

        def body(rank: int, to: Communicator, number: int = number) -> list[float]:
            x = torch.tensor([float(rank + number)])
            return kept[rank].exchange(Request("all_gather", group, "g"), x).tolist()

        assert rendezvous.run(body) == [[float(number), number + 1.0]] * 2


# --------------------------------------------------------------------------------------------------
# Ranks that do not meet.


def test_a_rank_that_fails_is_the_cause() -> None:
    def body(rank: int, to: Communicator) -> None:
        if rank == 1:
            raise ZeroDivisionError("of its own")
        to.exchange(GATHER, torch.ones(1))

    error = failure(body)
    assert isinstance(error, ZeroDivisionError)
    assert error.__notes__ == ["on rank 1 of 3"]


def test_what_ranks_that_wait_for_a_failed_one_say() -> None:
    def body(rank: int, to: Communicator) -> None:
        if rank == 1:
            raise RolemeshError("RM030", what="no such group", where="here")
        to.exchange(GATHER, torch.ones(1))

    waiting = refusals(body)
    assert str(waiting[0]) == (
        "[RM030] HcomAllGather 'gather' cannot take place on rank 0\n"
        "  where: all_gather in group tag=world;rank_list=0,1,2\n"
        "  why: rank 1 does not take part: it failed: RolemeshError: [RM030] no such group\n"
        "  fix: all ranks of a group must issue the same collectives in the same order"
    )
    assert waiting[2] is not None
    assert "on rank 2" in waiting[2].what


@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_finishes_without_the_others(late: bool) -> None:
    def body(rank: int, to: Communicator) -> None:
        if rank == (2 if late else 0):
            return
        to.exchange(GATHER, torch.ones(1))

    said = refusals(body)
    missing = said.pop(2 if late else 0)
    assert missing is None
    for error in said:
        assert error is not None
        assert error.why == f"rank {2 if late else 0} does not take part: it has finished"


def test_a_rank_that_finishes_is_missed_in_its_groups_only() -> None:
    def body(rank: int, to: Communicator) -> object:
        if rank == 0:
            return None
        return to.exchange(Request("all_gather", "tag=;rank_list=1,2", "g"), torch.ones(1)).tolist()

    assert run_ranks(3, body) == [None, [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("other", "wire", "said"),
    [
        (
            replace(GATHER, kind="all_reduce", reduction="sum", node="HcomAllReduce 'r'"),
            torch.ones(2, 3),
            "rank 1 asks for all_reduce sum of torch.float32 [2, 3] in HcomAllReduce 'r'",
        ),
        (GATHER, torch.ones(3, 2), "rank 1 asks for all_gather of torch.float32 [3, 2]"),
        (GATHER, torch.ones(2, 3).half(), "rank 1 asks for all_gather of torch.float16 [2, 3]"),
        (
            replace(GATHER, kind="broadcast", root=1),
            torch.ones(2, 3),
            "rank 1 asks for broadcast from position 1 of torch.float32 [2, 3]",
        ),
    ],
    ids=["kind", "shape", "dtype", "broadcast"],
)
def test_ranks_whose_requests_differ(other: Request, wire: torch.Tensor, said: str) -> None:
    def body(rank: int, to: Communicator) -> None:
        if rank == 1:
            to.exchange(other, wire)
        else:
            to.exchange(GATHER, torch.ones(2, 3))

    for rank, error in enumerate(refusals(body)):
        assert error is not None
        if rank < 2:
            assert "rank 0 asks for all_gather of torch.float32 [2, 3] in HcomAll" in error.why
            assert said in error.why


def test_the_same_op_may_have_another_name_on_each_rank() -> None:
    def body(rank: int, to: Communicator) -> list[float]:
        return to.exchange(replace(GATHER, node=f"op {rank}"), torch.ones(1)).tolist()

    assert run_ranks(3, body) == [[1.0] * 3] * 3


def test_counts_that_do_not_fit_each_other() -> None:
    def body(rank: int, to: Communicator) -> None:
        request = uneven(rank)
        if rank == 2:
            request = replace(request, receive_counts=(2, 2, 0))
        to.exchange(request, torch.ones(sum(SENT[rank])))

    for error in refusals(body):
        assert error is not None
        assert error.why == "rank 1 sends 1 elements to rank 2, which expects 2"


def test_counts_that_do_not_fit_the_wire() -> None:
    def body(rank: int, to: Communicator) -> None:
        to.exchange(uneven(rank), torch.ones(sum(SENT[rank]) + (rank == 1)))

    for error in refusals(body):
        assert error is not None
        assert error.why == "rank 1 sends [0, 3, 1] of 5 elements"


@pytest.mark.parametrize("ranks", ["1,2", "0,1,2,3", "0,0,1"])
def test_groups_that_a_rank_is_not_in(ranks: str) -> None:
    request = replace(GATHER, group=f"tag=;rank_list={ranks}")
    error = refusals(lambda rank, to: to.exchange(request, torch.ones(1)))[0]
    assert error is not None
    assert error.what == "HcomAllGather 'gather' names a group that rank 0 of 3 is not in"
    assert error.why == f"its ranks are [{', '.join(ranks.split(','))}]"


def test_names_that_are_no_groups() -> None:
    request = replace(GATHER, group="hccl_world_group")
    error = refusals(lambda rank, to: to.exchange(request, torch.ones(1)))[0]
    assert error is not None
    assert error.what == "'hccl_world_group' names no group of ranks"


def test_ranks_that_wait_for_each_other_in_different_groups() -> None:
    def body(rank: int, to: Communicator) -> None:
        pair = sorted([rank, (rank + 1) % 3])
        group = f"tag=;rank_list={pair[0]},{pair[1]}"
        to.exchange(Request("all_gather", group, f"op {rank}"), torch.ones(1))

    for error in refusals(body):
        assert error is not None
        assert error.why == (
            "all ranks wait, in different groups: rank 0 in op 0 of group tag=;rank_list=0,1; "
            "rank 1 in op 1 of group tag=;rank_list=1,2; rank 2 in op 2 of group tag=;rank_list=0,2"
        )


def test_ranks_that_wait_in_other_groups_when_the_last_one_ends() -> None:
    def body(rank: int, to: Communicator) -> None:
        if rank < 2:
            group = f"tag={rank};rank_list=0,1"
            to.exchange(Request("all_gather", group, f"op {rank}"), torch.ones(1))

    said = refusals(body)
    assert said[2] is None
    assert said[0] is not None
    assert said[0].why.startswith("all ranks wait, in different groups: rank 0 in op 0 of")


def test_a_rank_that_hangs() -> None:
    release = threading.Event()

    def body(rank: int, to: Communicator) -> None:
        if rank == 1:
            release.wait(20.0)
        to.exchange(GATHER, torch.ones(1))

    try:
        error = failure(body, timeout=0.3)
    finally:
        release.set()
    assert isinstance(error, RolemeshError)
    assert error.code == "RM030"
    assert error.what in (
        "HcomAllGather 'gather' cannot take place on rank 0",
        "rank 2 could not start in 0.3 s",
    )
    assert "rank 1 has not come to its next collective" in error.why


def test_a_rank_that_was_given_up_does_not_disturb_the_next_run() -> None:
    rendezvous = Rendezvous(2, timeout=0.2)
    release, late = threading.Event(), []
    request = Request("all_gather", "tag=;rank_list=0,1", "g")

    def hanging(rank: int, to: Communicator) -> None:
        if rank == 1:
            release.wait(20.0)
            try:
                to.exchange(request, torch.ones(1))
            except RolemeshError as error:
                late.append(error.what)

    def body(rank: int, to: Communicator) -> list[float]:
        if rank == 1:
            release.set()
            while not late:
                time.sleep(0.001)
        return to.exchange(request, torch.ones(1)).tolist()

    def failing(rank: int, to: Communicator) -> None:
        hanging(rank, to)
        if rank == 0:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rendezvous.run(failing)
    rendezvous.timeout = 20.0
    assert rendezvous.run(body) == [[1.0, 1.0]] * 2
    assert late == ["g is not called from inside a run of its ranks"]


def test_a_communicator_outside_of_a_run() -> None:
    communicator = Rendezvous(1).communicator(0)
    request = Request("all_gather", "tag=;rank_list=0", "HcomAllGather 'g'")
    with pytest.raises(RolemeshError) as caught:
        communicator.exchange(request, torch.ones(1))
    assert str(caught.value) == (
        "[RM030] HcomAllGather 'g' is not called from inside a run of its ranks\n"
        "  where: all_gather in group tag=;rank_list=0\n"
        "  why: rank 0 takes part in none that goes on\n"
        "  fix: a graph keeps the communicator it was loaded with: run it with the same rendezvous"
    )


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())

    def body(rank: int, to: Communicator) -> None:
        if rank == 2:
            raise ZeroDivisionError
        to.exchange(GATHER, torch.ones(1))

    failure(body)
    for thread in set(threading.enumerate()) - before:
        thread.join(2.0)
    assert set(threading.enumerate()) == before
