"""The Hcom ops ask for the right collectives, and give what torch.distributed would."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.communicator import Communicator, Request
from rolemesh.runtime.ge.ops.collectives import OPS
from rolemesh.runtime.ge.ops.table import Attributes
from rolemesh.runtime.ge.rendezvous import run_ranks

GROUP = "tag=world;rank_list=0,1,2"


class Recorder:
    """Notes requests, and gives back what it is given."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def exchange(self, request: Request, wire: torch.Tensor) -> torch.Tensor:
        assert wire.is_contiguous()
        self.requests.append(request)
        return wire.clone()


def call(kind: str, to: Communicator, *inputs: object, **attributes: object) -> object:
    op = OPS.ops[kind]
    assert op.collective
    return op.function(Attributes({"group": GROUP, **attributes}, "the op"), to, *inputs)


def on_ranks(
    kind: str, inputs: Sequence[Sequence[object]], **attributes: object
) -> list[torch.Tensor]:
    def body(rank: int, to: Communicator) -> torch.Tensor:
        result = call(kind, to, *inputs[rank], **attributes)
        assert isinstance(result, torch.Tensor)
        return result

    return run_ranks(len(inputs), body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_gather_joins_along_dim_0(dtype: torch.dtype) -> None:
    given = [torch.randn(5, 2).to(dtype).t() for _ in range(3)]
    for result in on_ranks("HcomAllGather", [[x] for x in given], rank_size=3, fusion=0):
        assert torch.equal(result, torch.cat(given))


@pytest.mark.parametrize("reduction", ["sum", "max", "min", "prod"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(reduction: str, dtype: torch.dtype) -> None:
    given = [torch.randint(-3, 4, (4, 6)).to(dtype).t() for _ in range(3)]
    stacked = torch.stack(given)
    whole = {
        "sum": stacked.sum(0),
        "max": stacked.amax(0),
        "min": stacked.amin(0),
        "prod": given[0] * given[1] * given[2],
    }[reduction]
    wires = [[x] for x in given]
    for result in on_ranks("HcomAllReduce", wires, reduction=reduction, fusion=1):
        assert torch.equal(result, whole)
    parts = on_ranks("HcomReduceScatter", wires, reduction=reduction, rank_size=3)
    for part, expected in zip(parts, whole.chunk(3), strict=True):
        assert torch.equal(part, expected)


def test_broadcast_takes_a_list() -> None:
    given = [[torch.randn(2, 3), torch.randn(5).bfloat16()] for _ in range(3)]

    def body(rank: int, to: Communicator) -> tuple[torch.Tensor, ...]:
        result = call("HcomBroadcast", to, given[rank], root_rank=2)
        assert isinstance(result, tuple)
        return result

    for result in run_ranks(3, body):
        assert all(map(torch.equal, result, given[2]))


def test_all_to_all_exchanges_blocks_of_dim_0() -> None:
    given = [torch.randn(6, 2) for _ in range(3)]
    for rank, result in enumerate(on_ranks("HcomAllToAll", [[x] for x in given])):
        assert torch.equal(result, torch.cat([x.chunk(3)[rank] for x in given]))


ROWS = [[1, 0, 2], [0, 3, 1], [2, 2, 0]]
"""Rows that each rank sends to each rank."""


def counts_and_places(rows: Sequence[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.tensor(rows) * width
    return counts, counts.cumsum(0) - counts


@pytest.mark.parametrize("shape", [(4, 2), (3,), ()])
def test_all_to_all_v_keeps_the_trailing_dims(shape: tuple[int, ...]) -> None:
    width = torch.Size(shape).numel()
    given = [torch.randn(sum(rows), *shape) for rows in ROWS]
    inputs = [
        [
            given[rank],
            *counts_and_places(ROWS[rank], width),
            *counts_and_places([rows[rank] for rows in ROWS], width),
        ]
        for rank in range(3)
    ]
    for rank, result in enumerate(on_ranks("HcomAllToAllV", inputs)):
        expected = torch.cat([given[i].split(ROWS[i])[rank] for i in range(3)])
        assert result.shape == expected.shape
        assert torch.equal(result, expected)


def test_all_to_all_v_reads_and_writes_where_displacements_say() -> None:
    """Rank i sends one element to each rank, in reversed order, and puts them in reversed order."""
    ones, places = torch.tensor([1, 1, 1]), torch.tensor([2, 1, 0])
    inputs = [[torch.arange(3) + 10 * rank, ones, places, ones, places] for rank in range(3)]
    results = [result.tolist() for result in on_ranks("HcomAllToAllV", inputs)]
    assert results == [[22, 12, 2], [21, 11, 1], [20, 10, 0]]


def test_requests_name_the_op_and_its_group() -> None:
    to = Recorder()
    x, equal = torch.arange(6.0), torch.tensor([2, 2, 2])
    places = torch.tensor([0, 2, 4])
    call("HcomAllGather", to, x, rank_size=3)
    call("HcomReduceScatter", to, x, rank_size=3, reduction="max")
    call("HcomBroadcast", to, [x], root_rank=1)
    call("HcomAllToAll", to, x)
    call("HcomAllToAllV", to, x, equal, places, equal, places)
    assert to.requests == [
        Request("all_gather", GROUP, "the op"),
        Request("reduce_scatter", GROUP, "the op", "max"),
        Request("broadcast", GROUP, "the op", root=1),
        Request("all_to_all", GROUP, "the op"),
        Request(
            "all_to_all", GROUP, "the op", send_counts=(2, 2, 2), receive_counts=(2, 2, 2)
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes", "said"),
    [
        (
            "HcomReduceScatter",
            [torch.ones(4)],
            {"reduction": "sum"},
            "shape \\[4\\] in blocks for 3",
        ),
        (
            "HcomReduceScatter",
            [torch.ones(())],
            {"reduction": "sum"},
            "shape \\[\\] in blocks for 3",
        ),
        ("HcomAllToAll", [torch.ones(4, 3)], {}, "shape \\[4, 3\\] in blocks for 3 ranks"),
        ("HcomAllReduce", [torch.ones(3)], {"reduction": "avg"}, "reduction 'avg' is none of sum"),
        ("HcomBroadcast", [[torch.ones(3)]], {"root_rank": 3}, "root_rank 3 in a group of 3"),
        ("HcomBroadcast", [[torch.ones(3)]], {}, "attribute root_rank is missing"),
    ],
)
def test_what_no_collective_takes(
    kind: str, inputs: Sequence[object], attributes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        call(kind, Recorder(), *inputs, **attributes)


@pytest.mark.parametrize(
    ("sent", "received", "said"),
    [
        (([2, 2], [0, 2]), ([2, 2, 2], [0, 2, 4]), "send_counts \\[2, 2\\]"),
        (([2, 2, 2], [0, 2, 4]), ([2, 2, 2], [0, 2]), "recv_displacements \\[0, 2\\]"),
        (([2, 2, -2], [0, 2, 4]), ([2, 2, 2], [0, 2, 4]), "send_counts \\[2, 2, -2\\]"),
        (([2, 2, 2], [0, 2, 5]), ([2, 2, 2], [0, 2, 4]), "of 6 elements"),
        (([2, 2, 1], [0, 2, 4]), ([2, 2, 1], [0, 2, 4]), "5 elements make no rows of 3"),
    ],
)
def test_counts_that_do_not_fit(
    sent: tuple[list[int], list[int]], received: tuple[list[int], list[int]], said: str
) -> None:
    numbers = [torch.tensor(values) for values in (*sent, *received)]
    with pytest.raises(ValueError, match=said):
        call("HcomAllToAllV", Recorder(), torch.ones(2, 3), *numbers)


@pytest.mark.parametrize("kind", ["HcomAllGather", "HcomReduceScatter"])
def test_rank_size_must_be_that_of_the_group(kind: str) -> None:
    with pytest.raises(RolemeshError) as caught:
        call(kind, Recorder(), torch.ones(4), rank_size=4, reduction="sum")
    assert str(caught.value) == (
        "[RM030] the op is for 4 ranks, its group has 3\n"
        "  where: group tag=world;rank_list=0,1,2\n"
        "  why: attribute rank_size and the group must agree\n"
        "  fix: convert the program again for this mesh"
    )


def test_a_group_by_an_hccl_name_is_refused() -> None:
    with pytest.raises(RolemeshError, match="RM030"):
        call("HcomAllGather", Recorder(), torch.ones(4), rank_size=4, group="hccl_world_group")
