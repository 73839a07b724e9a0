"""GE's products fused with collectives: what they ask a communicator for, and what they make of it.

Attributes are as torchair's converters write them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu import matmul_collectives
from rolemesh.runtime.ge.communicator import Communicator, Request
from rolemesh.runtime.ge.ops.fused_matmul_collectives import OPS
from rolemesh.runtime.ge.ops.table import Attributes, Result

GROUP = "tag=tp;rank_list=0,1,2"


def f(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


class Meeting:
    """Communicators of all ranks of one group, one thread each."""

    def __init__(self, size: int) -> None:
        self.requests: list[Request] = []
        self.wires: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(size, timeout=20)

    def of(self, rank: int) -> Communicator:
        return _Rank(self, rank)


class _Rank:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting = meeting
        self.rank = rank

    def exchange(self, request: Request, wire: Tensor) -> Tensor:
        meeting = self.meeting
        assert wire.is_contiguous()
        meeting.wires[self.rank] = wire
        meeting.requests.append(request)
        meeting.barrier.wait()
        wires = [wire for _, wire in sorted(meeting.wires.items())]
        meeting.barrier.wait()
        if request.kind == "all_gather":
            return torch.cat(wires)
        if request.kind == "all_to_all":
            assert wire.dim() == 1
            return torch.cat([part.chunk(len(wires))[self.rank] for part in wires])
        total = torch.stack(wires).sum(0)
        return total.chunk(len(wires))[self.rank] if request.kind == "reduce_scatter" else total


def ge(
    kind: str, attributes: dict[str, object], communicator: Communicator, **inputs: object
) -> Result:
    op = OPS.ops[kind]
    assert op.collective
    assert set(op.required) <= set(inputs) <= set(op.inputs), kind
    attributes = {"group": GROUP, **attributes}
    return op.function(Attributes(attributes, f"{kind} (n)"), communicator, **inputs)


def on_ranks(run: Callable[[int, Communicator], Result]) -> tuple[list[Result], Request]:
    """Results of three ranks, and the one request that all of them made."""
    meeting = Meeting(3)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run, rank, meeting.of(rank)) for rank in range(3)]
        found = [done.result() for done in runs]
    assert len(meeting.requests) == 3
    assert len(set(meeting.requests)) == 1
    return found, meeting.requests[0]


HALVES = (torch.float16, torch.bfloat16)
MATMUL = {"is_trans_a": False, "is_trans_b": False, "comm_turn": 0}


@pytest.mark.parametrize("dtype", HALVES)
def test_matmul_reduce_scatter(dtype: torch.dtype) -> None:
    x = [f(6, 8, dtype=dtype, seed=rank) for rank in range(3)]
    w = [f(8, 5, dtype=dtype, seed=rank) for rank in range(3)]
    attributes = {**MATMUL, "reduce_op": "sum", "rank_size": 3}
    found, request = on_ranks(
        lambda rank, c: ge("MatmulReduceScatter", attributes, c, x1=x[rank], x2=w[rank])
    )
    total = torch.stack([a @ b for a, b in zip(x, w, strict=True)]).sum(0)
    torch.testing.assert_close(torch.cat(found), total)
    assert request == Request("reduce_scatter", GROUP, "MatmulReduceScatter (n)", "sum")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gathers", [False, True])
def test_all_gather_matmul(dtype: torch.dtype, gathers: bool) -> None:
    x = [f(2, 8, dtype=dtype, seed=rank) for rank in range(3)]
    w = f(8, 5, dtype=dtype)
    attributes = {**MATMUL, "gather_index": 0, "rank_size": 3, "is_gather_out": gathers}
    found, request = on_ranks(
        lambda rank, c: ge("AllGatherMatmul", attributes, c, x1=x[rank], x2=w)
    )
    for y, rows in found:
        torch.testing.assert_close(y, torch.cat(x) @ w)
        assert torch.equal(rows, torch.cat(x) if gathers else torch.empty(0, dtype=dtype))
    assert request == Request("all_gather", GROUP, "AllGatherMatmul (n)")


ALL_REDUCE = {
    **MATMUL,
    "reduce_op": "sum",
    "antiquant_group_size": 0,
    "group_size": 0,
    "y_dtype": 28,
    "comm_quant_mode": 0,
    "comm_mode": "ai_cpu",
}


@pytest.mark.parametrize("dtype", HALVES)
def test_matmul_all_reduce(dtype: torch.dtype) -> None:
    x, w = f(2, 3, 8, dtype=dtype), f(8, 5, dtype=dtype)
    bias, x3 = f(5, dtype=dtype), f(2, 3, 5, dtype=dtype)

    def run(rank: int, communicator: Communicator) -> Result:
        only_first = {"bias": bias, "x3": x3} if rank == 0 else {}
        return ge("MatmulAllReduce", ALL_REDUCE, communicator, x1=x * rank, x2=w, **only_first)

    found, request = on_ranks(run)
    expected = 3 * (x.float() @ w.float()) + bias.float() + x3.float()
    for y in found:
        torch.testing.assert_close(y, expected.to(dtype), rtol=1e-2, atol=5e-2)
    assert request == Request("all_reduce", GROUP, "MatmulAllReduce (n)", "sum")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("flag", [None, False])
def test_all_to_all_matmul(dtype: torch.dtype, with_bias: bool, flag: bool | None) -> None:
    """The converter leaves out what has its default."""
    x = [f(6, 4, dtype=dtype, seed=rank) for rank in range(3)]
    w, bias = f(12, 5, dtype=dtype), f(5, dtype=torch.float32) if with_bias else None
    attributes: dict[str, object] = {
        "world_size": 3,
        "y_dtype": 1 if dtype == torch.float16 else 27,
    }
    if flag is not None:
        attributes["alltoall_out_flag"] = flag
    found, request = on_ranks(
        lambda rank, c: ge("AlltoAllMatmul", attributes, c, x1=x[rank], x2=w, bias=bias)
    )
    for rank, (y, columns) in enumerate(found):
        left = torch.cat([part[2 * rank : 2 * rank + 2] for part in x], 1)
        expected = left.float() @ w.float() + (0 if bias is None else bias)
        torch.testing.assert_close(y, expected.to(dtype))
        assert torch.equal(columns, left if flag is None else left.new_empty(0))
    assert request == Request("all_to_all", GROUP, "AlltoAllMatmul (n)")


class Nobody:
    """A communicator that must not be asked."""

    def exchange(self, request: Request, wire: Tensor) -> Tensor:
        raise AssertionError(request)


@pytest.mark.parametrize(
    ("kind", "attributes", "error", "message"),
    [
        *(
            (kind, {name: True}, ValueError, rf"{kind} \(n\): no semantics for {name}=True")
            for kind in ("MatmulReduceScatter", "AllGatherMatmul", "MatmulAllReduce")
            for name in ("is_trans_a", "is_trans_b")
        ),
        *(
            (kind, {"comm_turn": 1}, RolemeshError, "comm_turn=1")
            for kind in ("MatmulReduceScatter", "AllGatherMatmul", "MatmulAllReduce")
        ),
        ("MatmulReduceScatter", {"reduce_op": "max"}, RolemeshError, "reduce_op='max'"),
        ("MatmulAllReduce", {"reduce_op": "max"}, RolemeshError, "reduce_op='max'"),
        ("AllGatherMatmul", {"gather_index": 1}, RolemeshError, "gather_index=1"),
        ("MatmulAllReduce", {"group_size": 1}, ValueError, "group_size=1"),
        ("MatmulAllReduce", {"y_dtype": 0}, ValueError, "y_dtype=0"),
        ("MatmulAllReduce", {"antiquant_group_size": 1}, RolemeshError, "antiquant_group_size=1"),
        ("MatmulAllReduce", {"comm_quant_mode": 1}, RolemeshError, "comm_quant_mode=1"),
        ("AlltoAllMatmul", {"transpose_x1": True}, ValueError, "transpose_x1=True"),
        ("AlltoAllMatmul", {"transpose_x2": True}, ValueError, "transpose_x2=True"),
        ("AlltoAllMatmul", {"x1_quant_mode": 1}, ValueError, "x1_quant_mode=1"),
        ("AlltoAllMatmul", {"y_dtype": 0}, ValueError, "y_dtype=0 of torch.float16 operands"),
        ("AlltoAllMatmul", {"all2all_axes": [0, 1]}, RolemeshError, "all2all_axes"),
        ("MatmulReduceScatter", {"rank_size": 2}, RuntimeError, "the group has 3 ranks"),
        ("AllGatherMatmul", {"rank_size": 2}, RuntimeError, "the group has 3 ranks"),
        ("AlltoAllMatmul", {"world_size": 6}, RuntimeError, "the group has 3 ranks"),
        ("MatmulAllReduce", {"group": "hccl_world"}, RolemeshError, "RM030"),
    ],
)
def test_refused(
    kind: str, attributes: dict[str, object], error: type[Exception], message: str
) -> None:
    size = {"world_size": 3} if kind == "AlltoAllMatmul" else {"rank_size": 3}
    rows = 4 * int(str(attributes.get("world_size", 3))) if kind == "AlltoAllMatmul" else 4
    with pytest.raises(error, match=message):
        ge(kind, {**size, **attributes}, Nobody(), x1=f(6, 4), x2=f(rows, 5))


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("MatmulReduceScatter", ("bias",)),
        ("AllGatherMatmul", ("bias",)),
        (
            "MatmulAllReduce",
            ("antiquant_scale", "antiquant_offset", "dequant_scale", "pertoken_scale",
             "comm_quant_scale_1", "comm_quant_scale_2"),
        ),
        ("AlltoAllMatmul", ("x1_scale", "x2_scale", "comm_scale", "x1_offset", "x2_offset")),
    ],
)  # fmt: skip
def test_refused_inputs(kind: str, inputs: tuple[str, ...]) -> None:
    for name in inputs:
        with pytest.raises((RolemeshError, ValueError), match=f"{name}=|scales and offsets"):
            ge(
                kind,
                {"rank_size": 3, "world_size": 3},
                Nobody(),
                x1=f(6, 4),
                x2=f(12 if kind == "AlltoAllMatmul" else 4, 5),
                **{name: f(5)},
            )


def test_every_torch_op_has_its_ge_op() -> None:
    assert {op.ge for op in matmul_collectives.OPS.ops.values()} == set(OPS.ops)
