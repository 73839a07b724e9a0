"""Products fused with a collective: against the plain product and what the ranks exchange.

Ranks are threads that meet in a stand-in for their group; one test runs real ranks over gloo.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu import matmul_collectives as fused
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.lowering.npu.matmul_collectives import Group
from rolemesh.runtime.launch import run_processes

define_npu_ops()
npu = torch.ops.npu
HALVES = (torch.float16, torch.bfloat16)
WORLD = "tag=;rank_list=0,1,2"


def f(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def on_threads(size: int, run: Callable[[int, Group], object]) -> list[object]:
    """What each rank's call returns; a rank's group gives it what the others put in."""
    wires: list[Tensor | None] = [None] * size
    barrier = threading.Barrier(size, timeout=20)

    def of_rank(rank: int) -> Group:
        def exchange(kind: str, x: Tensor) -> Tensor:
            assert x.is_contiguous()
            wires[rank] = x
            barrier.wait()
            given = [wire for wire in wires if wire is not None]
            barrier.wait()
            if kind == "all_gather":
                return torch.cat(given)
            if kind == "all_to_all":
                return torch.cat([wire.chunk(size)[rank] for wire in given])
            total = torch.stack(given).sum(0)
            return total.chunk(size)[rank].clone() if kind == "reduce_scatter" else total

        return Group(size, exchange)

    with ThreadPoolExecutor(size) as pool:
        runs = [pool.submit(run, rank, of_rank(rank)) for rank in range(size)]
        return [done.result() for done in runs]


def shapes(found: object) -> list[object]:
    results = found if isinstance(found, tuple) else (found,)
    return [(t.shape, t.dtype) for t in results]


def check_shapes(found: object, op: torch._ops.OpOverload, *args: object, **kwargs: object) -> None:
    """Results without data are as the real ones."""
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    kinds = {k: a.to("meta") if isinstance(a, Tensor) else a for k, a in kwargs.items()}
    assert shapes(op(*meta, **kinds)) == shapes(found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_product_then_reduce_scatter(dtype: torch.dtype, transposed: bool, size: int) -> None:
    x = [f(6, 8, dtype=dtype, seed=rank) for rank in range(size)]
    w = [f(5, 8, dtype=dtype, seed=rank).t() if transposed else f(8, 5, dtype=dtype, seed=rank)
         for rank in range(size)]  # fmt: skip
    found = on_threads(
        size, lambda rank, group: fused.mm_reduce_scatter_base(x[rank], w[rank], group, size)
    )
    total = torch.stack([a @ b for a, b in zip(x, w, strict=True)]).sum(0)
    torch.testing.assert_close(torch.cat(found), total)
    check_shapes(found[0], npu.npu_mm_reduce_scatter_base.default, x[0], w[0], WORLD, size)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("gather_output", [False, True])
def test_all_gather_then_product(dtype: torch.dtype, gather_output: bool) -> None:
    x = [f(4, 3, dtype=dtype, seed=rank).mT for rank in range(3)]
    w = [f(4, 5, dtype=dtype, seed=rank) for rank in range(3)]
    options = {"gather_output": gather_output}
    found = on_threads(
        3, lambda rank, group: fused.all_gather_base_mm(x[rank], w[rank], group, 3, **options)
    )
    for rank, (y, gathered) in enumerate(found):
        torch.testing.assert_close(y, torch.cat(x) @ w[rank])
        assert torch.equal(gathered, torch.cat(x) if gather_output else x[0].new_empty(0))
    op = npu.npu_all_gather_base_mm.default
    check_shapes(found[0], op, x[0], w[0], WORLD, 3, **options)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [(6,), (2, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_x3", [False, True])
def test_product_then_all_reduce(
    dtype: torch.dtype, rows: tuple[int, ...], with_bias: bool, with_x3: bool
) -> None:
    """Every rank adds its bias and its x3 before the sum."""

    def given(rank: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return (
            f(*rows, 8, dtype=dtype, seed=rank),
            f(8, 5, dtype=dtype, seed=rank),
            f(5, dtype=dtype, seed=rank) if with_bias else None,
            f(*rows, 5, dtype=dtype, seed=rank + 9) if with_x3 else None,
        )

    def run(rank: int, group: Group) -> Tensor:
        x, w, bias, x3 = given(rank)
        return fused.mm_all_reduce_base(x, w, group, bias=bias, x3=x3)

    found = on_threads(3, run)
    total = torch.zeros(*rows, 5)
    for rank in range(3):
        x, w, *added = given(rank)
        total += x.float() @ w.float() + sum(v.float() for v in added if v is not None)
    for y in found:
        torch.testing.assert_close(y, total.to(dtype), rtol=1e-2, atol=3e-2)
    x, w, bias, x3 = given(0)
    check_shapes(found[0], npu.npu_mm_all_reduce_base.default, x, w, WORLD, bias=bias, x3=x3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [None, torch.float32, "own"])
@pytest.mark.parametrize("out_flag", [False, True])
def test_all_to_all_then_product(dtype: torch.dtype, bias: object, out_flag: bool) -> None:
    """Rank r has rows r of all ranks, side by side."""
    x = [f(6, 4, dtype=dtype, seed=rank) for rank in range(3)]
    w = [f(12, 5, dtype=dtype, seed=rank) for rank in range(3)]
    kind = dtype if bias == "own" else bias
    added = f(5, dtype=kind) if isinstance(kind, torch.dtype) else None

    def run(rank: int, group: Group) -> object:
        return fused.all_to_all_matmul(
            x[rank], w[rank], group, 3, added, [-2, -1], all2all_out_flag=out_flag
        )

    found = on_threads(3, run)
    for rank, (y, columns) in enumerate(found):
        left = torch.cat([part[2 * rank : 2 * rank + 2] for part in x], 1)
        expected = left.float() @ w[rank].float() + (0 if added is None else added.float())
        torch.testing.assert_close(y, expected.to(dtype))
        assert torch.equal(columns, left if out_flag else left.new_empty(0))
    op = npu.npu_all_to_all_matmul.default
    check_shapes(found[0], op, x[0], w[0], WORLD, 3, added, all2all_out_flag=out_flag)


def ranks_over_gloo() -> None:
    rank = dist.get_rank()
    world = dist.group.WORLD
    assert world is not None
    for name in ("tag=;rank_list=0,1,2", world.group_name):
        for dtype in HALVES:
            x, w = f(6, 4, dtype=dtype), f(4, 5, dtype=dtype)
            wide = f(12, 5, dtype=dtype)
            mine = x * (rank + 1)
            all_ranks = [x * (r + 1) for r in range(3)]
            total = sum((part.float() @ w.float()).to(dtype).float() for part in all_ranks)
            near = {"rtol": 1e-2, "atol": 5e-2}
            y = npu.npu_mm_reduce_scatter_base(mine, w, name, 3)
            torch.testing.assert_close(y, total[2 * rank : 2 * rank + 2].to(dtype), **near)
            y = npu.npu_mm_all_reduce_base(mine, w, name)
            torch.testing.assert_close(y, total.to(dtype), **near)
            y, gathered = npu.npu_all_gather_base_mm(mine, w, name, 3)
            assert torch.equal(gathered, torch.cat(all_ranks))
            torch.testing.assert_close(y, torch.cat(all_ranks) @ w, **near)
            y, columns = npu.npu_all_to_all_matmul(mine, wide, name, 3)
            left = torch.cat([part[2 * rank : 2 * rank + 2] for part in all_ranks], 1)
            assert torch.equal(columns, left)
            torch.testing.assert_close(y, left @ wide, **near)
    # A group of two of the ranks, made by its tag when it is first named.
    if rank > 0:
        y = npu.npu_mm_all_reduce_base(f(2, 4), f(4, 5), "tag=two;rank_list=1,2")
        torch.testing.assert_close(y, (f(2, 4) @ f(4, 5)) * 2, rtol=1e-2, atol=5e-2)
    else:
        with pytest.raises(RolemeshError, match="RM030"):
            npu.npu_mm_all_reduce_base(f(2, 4), f(4, 5), "tag=two;rank_list=1,2")
    with pytest.raises(RuntimeError, match="world_size is 2, the group has 3 ranks"):
        npu.npu_mm_reduce_scatter_base(f(6, 4), f(4, 5), WORLD, 2)
    for op in (*ALL, "npu_all_to_all_matmul"):
        size = () if op == "npu_mm_all_reduce_base" else (3,)
        args = (f(6, 4), f(12 if "all_to_all" in op else 4, 5), WORLD, *size)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(npu, op).default, args, test_utils=checks)


@pytest.mark.processes
def test_over_process_groups() -> None:
    run_processes(ranks_over_gloo, 3, fork=True)


@pytest.mark.parametrize("name", ["tag=;rank_list=0,1", "nobody", "tag=x;rank_list=a,b"])
def test_a_group_must_exist(name: str) -> None:
    with pytest.raises(RolemeshError) as error:
        npu.npu_mm_all_reduce_base(f(6, 4), f(4, 5), name)
    assert error.value.code == "RM030"
    assert f"{name!r} names no group of this rank" in str(error.value)


ALL = ("npu_mm_reduce_scatter_base", "npu_all_gather_base_mm", "npu_mm_all_reduce_base")


@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        *((op, {"comm_turn": 1}, "comm_turn=1") for op in ALL),
        *((op, {"comm_mode": "other"}, "comm_mode='other'") for op in ALL),
        *((op, {"reduce_op": "max"}, "reduce_op='max'") for op in (ALL[0], ALL[2])),
        *((op, {"bias": f(5)}, "bias=a tensor") for op in ALL[:2]),
        *((op, {"x1_scale": f(6, 1)}, "x1_scale=a tensor") for op in ALL[:2]),
        *((op, {"x2_scale": f(1, 5)}, "x2_scale=a tensor") for op in ALL[:2]),
        *((op, {"output_dtype": torch.float16}, "output_dtype=torch.float16") for op in ALL[:2]),
        (ALL[1], {"gather_index": 1}, "gather_index=1"),
        (ALL[2], {"antiquant_scale": f(5)}, "antiquant_scale=a tensor"),
        (ALL[2], {"antiquant_offset": f(5)}, "antiquant_offset=a tensor"),
        (ALL[2], {"dequant_scale": f(5)}, "dequant_scale=a tensor"),
        (ALL[2], {"pertoken_scale": f(6)}, "pertoken_scale=a tensor"),
        (ALL[2], {"comm_quant_scale_1": f(5)}, "comm_quant_scale_1=a tensor"),
        (ALL[2], {"comm_quant_scale_2": f(5)}, "comm_quant_scale_2=a tensor"),
        (ALL[2], {"antiquant_group_size": 32}, "antiquant_group_size=32"),
        (ALL[2], {"group_sizes": [1, 1, 1]}, "group_sizes="),
        (ALL[2], {"comm_quant_mode": 1}, "comm_quant_mode=1"),
        *(
            (ALL[2], {name: 5}, f"{name}=5")
            for name in ("y_dtype", "x1_dtype", "x2_dtype", "dequant_scale_dtype",
                         "pertoken_scale_dtype")
        ),
        ("npu_all_to_all_matmul", {"all2all_axes": [-1, -2]}, "all2all_axes="),
        ("npu_all_to_all_matmul", {"comm_mode": "other"}, "comm_mode='other'"),
    ],
)  # fmt: skip
def test_refused(op: str, options: dict[str, object], message: str) -> None:
    size = () if op == ALL[2] else (2,)
    for device in ("cpu", "meta"):
        with pytest.raises(RolemeshError, match=message.replace("[", r"\[")) as error:
            getattr(npu, op)(f(6, 4).to(device), f(4, 5).to(device), WORLD, *size, **options)
        assert error.value.code == "RM028"


@pytest.mark.parametrize("op", [*ALL, "npu_all_to_all_matmul"])
def test_operands_must_belong_together(op: str) -> None:
    size = () if op == ALL[2] else (2,)
    run = getattr(npu, op)
    wide = 8 if op == "npu_all_to_all_matmul" else 4
    for x, w, message in (
        (f(6, 4, dtype=torch.float32), f(wide, 5, dtype=torch.float32), "fp16 and bf16 only"),
        (f(6, 4), f(wide, 5, dtype=torch.bfloat16), "fp16 and bf16 only"),
        (f(6, 4), f(wide + 1, 5), r"\[6, 4\] by"),
        (f(6, 4), f(1, wide, 5), r"\[6, 4\] by"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(x, w, WORLD, *size)
    if op in (ALL[0], "npu_all_to_all_matmul"):
        with pytest.raises(RuntimeError, match=r"rows of \[5, 4\] are not equal parts for 2 ranks"):
            run(f(5, 4), f(wide, 5), WORLD, 2)


def test_what_is_added_must_fit() -> None:
    x, w = f(6, 4), f(4, 5)
    for options, message in (
        ({"bias": f(6)}, r"bias is not \[5\] of torch.float16"),
        ({"bias": f(5, dtype=torch.float32)}, r"bias is not \[5\] of torch.float16"),
        ({"x3": f(5)}, r"x3 is not \[6, 5\] of torch.float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            npu.npu_mm_all_reduce_base(x, w, WORLD, **options)
    with pytest.raises(RuntimeError, match=r"bias is not \[5\]"):
        npu.npu_all_to_all_matmul(x, f(8, 5), WORLD, 2, f(6))
