"""Matrix products fused with a collective of a group of ranks.

They stand in lowered programs only, where one rank's tensors meet those of others: a program that
is still to be sharded has no ranks. `hcom` names the group; a function here takes a `Group` in its
place, through which it exchanges. Given a name, it exchanges through torch.distributed.

Products are rounded to the operands' dtype before they are exchanged, as the collective alone would
get them. Devices take fp16 and bf16.

A reference first runs its shape function on its own arguments, which `locals()` are at that point:
it refuses what neither of them knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = [
    "OPS",
    "Group",
    "all_gather_base_mm",
    "all_to_all_matmul",
    "mm_all_reduce_base",
    "mm_reduce_scatter_base",
    "process_group",
]

OPS = NpuOpTable()

_ENGINES = (None, "ai_cpu", "aiv", "ccu")
"""What may do the exchange, by `comm_mode`; it changes no value."""


@dataclass(frozen=True)
class Group:
    """The ranks that an op exchanges with.

    Attributes:
        size: Number of ranks.
        exchange: Takes the kind of a collective and this rank's part, contiguous, and gives what
            this rank gets. `all_gather` joins along dim 0, `reduce_scatter` cuts dim 0,
            `all_to_all` moves equal blocks of flat elements, `all_reduce` keeps the shape.
            Reductions are sums.
    """

    size: int
    exchange: Callable[[str, Tensor], Tensor]


def process_group(hcom: str) -> Group:
    """A process group by its name: `tag=TAG;rank_list=0,1,...`, or its name in torch.distributed.

    Raises:
        RolemeshError: RM030 if there is no such group, or this rank is not in it.
    """
    tag, named, ranks = hcom.removeprefix("tag=").partition(";rank_list=")
    try:
        if named:
            members = [int(rank) for rank in ranks.split(",")]
            find = dist.distributed_c10d._find_or_create_pg_by_ranks_and_tag
            group = find(tag, members, len(members))
        else:
            group = dist.distributed_c10d._resolve_process_group(hcom)  # type: ignore[arg-type]
    except (AssertionError, RuntimeError, ValueError) as error:
        raise RolemeshError(
            "RM030",
            what=f"{hcom!r} names no group of this rank",
            where="argument hcom",
            why=str(error),
            fix="pass the name of a group that torch.distributed knows and that this rank is in",
        ) from error
    size, name = group.size(), group.group_name
    return Group(size, lambda kind, x: _exchange(kind, x, size, name))


def _exchange(kind: str, x: Tensor, size: int, name: str) -> Tensor:
    ops = torch.ops._c10d_functional
    if kind == "all_reduce":
        started = ops.all_reduce(x, "sum", name)
    elif kind == "all_gather":
        started = ops.all_gather_into_tensor(x, size, name)
    elif kind == "reduce_scatter":
        started = ops.reduce_scatter_tensor(x, "sum", size, name)
    else:
        parts = [x.shape[0] // size] * size
        started = ops.all_to_all_single(x, parts, parts, name)
    return ops.wait_tensor(started)


def _check(
    op: str, x: Tensor, x2: Tensor, comm_mode: str | None, times: int = 1, **unknown: object
) -> None:
    """Check what all ops share; x2 has a row for each of K * `times` elements of a row of x."""
    refuse(op, comm_mode=comm_mode if comm_mode not in _ENGINES else None, **unknown)
    torch._check(
        x.dtype == x2.dtype and x.dtype in (torch.float16, torch.bfloat16),
        lambda: f"{op}: {x.dtype} by {x2.dtype}; devices take fp16 and bf16 only",
    )
    torch._check(
        x.dim() in (2, 3) and x2.dim() == 2 and x.shape[-1] * times == x2.shape[0],
        lambda: f"{op}: {list(x.shape)} by {list(x2.shape)}",
    )


def _check_rows(op: str, x: Tensor, world_size: int) -> None:
    torch._check(
        x.dim() == 2 and world_size > 0 and x.shape[0] % world_size == 0,
        lambda: f"{op}: rows of {list(x.shape)} are not equal parts for {world_size} ranks",
    )


def _check_added(
    op: str, name: str, value: Tensor | None, shape: Sequence[int], *dtypes: torch.dtype
) -> None:
    torch._check(
        value is None or (value.shape == tuple(shape) and value.dtype in dtypes),
        lambda: f"{op}: {name} is not {list(shape)} of {dtypes[0]}",
    )


def _group(op: str, hcom: str | Group, world_size: int) -> Group:
    group = hcom if isinstance(hcom, Group) else process_group(hcom)
    torch._check(
        group.size == world_size,
        lambda: f"{op}: world_size is {world_size}, the group has {group.size} ranks",
    )
    return group


def _product(x: Tensor, x2: Tensor, *added: Tensor | None) -> Tensor:
    found = x.float() @ x2.float()
    for value in added:
        found = found if value is None else found + value.float()
    return found.to(x.dtype)


def _mm_reduce_scatter_shape(
    input: Tensor,  # noqa: A002
    x2: Tensor,
    hcom: str | Group,
    world_size: int,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> Tensor:
    op = "npu_mm_reduce_scatter_base"
    _check(
        op,
        input,
        x2,
        comm_mode,
        reduce_op=None if reduce_op == "sum" else reduce_op,
        bias=bias,
        x1_scale=x1_scale,
        x2_scale=x2_scale,
        comm_turn=comm_turn or None,
        output_dtype=output_dtype,
    )
    _check_rows(op, input, world_size)
    return input.new_empty((input.shape[0] // world_size, x2.shape[1]))


@OPS.op(
    "npu_mm_reduce_scatter_base(Tensor input, Tensor x2, str hcom, int world_size, *,"
    " str reduce_op='sum', Tensor? bias=None, Tensor? x1_scale=None, Tensor? x2_scale=None,"
    " int comm_turn=0, ScalarType? output_dtype=None, str? comm_mode=None) -> Tensor",
    ge="MatmulReduceScatter",
    shape=_mm_reduce_scatter_shape,
)
def mm_reduce_scatter_base(
    input: Tensor,  # noqa: A002
    x2: Tensor,
    hcom: str | Group,
    world_size: int,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> Tensor:
    """This rank's rows of the sum over ranks of `input [M, K] @ x2 [K, N]`: `[M / ranks, N]`."""
    _mm_reduce_scatter_shape(**locals())
    group = _group("npu_mm_reduce_scatter_base", hcom, world_size)
    return group.exchange("reduce_scatter", _product(input, x2))


def _all_gather_mm_shape(
    input: Tensor,  # noqa: A002
    x2: Tensor,
    hcom: str | Group,
    world_size: int,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    op = "npu_all_gather_base_mm"
    _check(
        op,
        input,
        x2,
        comm_mode,
        bias=bias,
        x1_scale=x1_scale,
        x2_scale=x2_scale,
        gather_index=gather_index or None,
        comm_turn=comm_turn or None,
        output_dtype=output_dtype,
    )
    torch._check(input.dim() == 2, lambda: f"{op}: input has {input.dim()} dims, not 2")
    rows = input.shape[0] * world_size
    gathered = (rows, input.shape[1]) if gather_output else (0,)
    return input.new_empty((rows, x2.shape[1])), input.new_empty(gathered)


@OPS.op(
    "npu_all_gather_base_mm(Tensor input, Tensor x2, str hcom, int world_size, *,"
    " Tensor? bias=None, Tensor? x1_scale=None, Tensor? x2_scale=None, int gather_index=0,"
    " bool gather_output=True, int comm_turn=0, ScalarType? output_dtype=None,"
    " str? comm_mode=None) -> (Tensor, Tensor)",
    ge="AllGatherMatmul",
    shape=_all_gather_mm_shape,
)
def all_gather_base_mm(
    input: Tensor,  # noqa: A002
    x2: Tensor,
    hcom: str | Group,
    world_size: int,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """All ranks' rows of `input [M, K]` times `x2 [K, N]`, and the rows.

    Returns:
        `[M * ranks, N]`, and `[M * ranks, K]`; an empty tensor if it is not asked for.
    """
    _all_gather_mm_shape(**locals())
    group = _group("npu_all_gather_base_mm", hcom, world_size)
    gathered = group.exchange("all_gather", input.contiguous())
    return _product(gathered, x2), gathered if gather_output else input.new_empty(0)


def _mm_all_reduce_shape(
    x1: Tensor,
    x2: Tensor,
    hcom: str | Group,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    x3: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
    group_sizes: Sequence[int] | None = None,
    y_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    dequant_scale_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    comm_quant_mode: int = 0,
    comm_mode: str | None = None,
) -> Tensor:
    op = "npu_mm_all_reduce_base"
    _check(
        op,
        x1,
        x2,
        comm_mode,
        reduce_op=None if reduce_op == "sum" else reduce_op,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        dequant_scale=dequant_scale,
        pertoken_scale=pertoken_scale,
        comm_quant_scale_1=comm_quant_scale_1,
        comm_quant_scale_2=comm_quant_scale_2,
        antiquant_group_size=antiquant_group_size or None,
        comm_turn=comm_turn or None,
        group_sizes=group_sizes,
        y_dtype=y_dtype,
        x1_dtype=x1_dtype,
        x2_dtype=x2_dtype,
        dequant_scale_dtype=dequant_scale_dtype,
        pertoken_scale_dtype=pertoken_scale_dtype,
        comm_quant_mode=comm_quant_mode or None,
    )
    result = x1.new_empty((*x1.shape[:-1], x2.shape[1]))
    _check_added(op, "bias", bias, (x2.shape[1],), x1.dtype)
    _check_added(op, "x3", x3, result.shape, x1.dtype)
    return result


@OPS.op(
    "npu_mm_all_reduce_base(Tensor x1, Tensor x2, str hcom, *, str reduce_op='sum',"
    " Tensor? bias=None, Tensor? antiquant_scale=None, Tensor? antiquant_offset=None,"
    " Tensor? x3=None, Tensor? dequant_scale=None, Tensor? pertoken_scale=None,"
    " Tensor? comm_quant_scale_1=None, Tensor? comm_quant_scale_2=None,"
    " int antiquant_group_size=0, int comm_turn=0, int[]? group_sizes=None, int? y_dtype=None,"
    " int? x1_dtype=None, int? x2_dtype=None, int? dequant_scale_dtype=None,"
    " int? pertoken_scale_dtype=None, int comm_quant_mode=0, str? comm_mode=None) -> Tensor",
    ge="MatmulAllReduce",
    shape=_mm_all_reduce_shape,
)
def mm_all_reduce_base(
    x1: Tensor,
    x2: Tensor,
    hcom: str | Group,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    x3: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
    antiquant_group_size: int = 0,
    comm_turn: int = 0,
    group_sizes: Sequence[int] | None = None,
    y_dtype: int | None = None,
    x1_dtype: int | None = None,
    x2_dtype: int | None = None,
    dequant_scale_dtype: int | None = None,
    pertoken_scale_dtype: int | None = None,
    comm_quant_mode: int = 0,
    comm_mode: str | None = None,
) -> Tensor:
    """Sum over ranks of `x1 [..., K] @ x2 [K, N] + bias [N] + x3 [..., N]`.

    Every rank adds its bias and its x3: one that is meant once is passed on one rank only.
    """
    _mm_all_reduce_shape(**locals())
    group = hcom if isinstance(hcom, Group) else process_group(hcom)
    return group.exchange("all_reduce", _product(x1, x2, bias, x3))


def _all_to_all_matmul_shape(
    x1: Tensor,
    x2: Tensor,
    hcom: str | Group,
    world_size: int,
    bias: Tensor | None = None,
    all2all_axes: Sequence[int] | None = None,
    all2all_out_flag: bool = True,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    op = "npu_all_to_all_matmul"
    axes = None if list(all2all_axes or (-2, -1)) == [-2, -1] else all2all_axes
    _check(op, x1, x2, comm_mode, world_size, all2all_axes=axes)
    _check_rows(op, x1, world_size)
    _check_added(op, "bias", bias, (x2.shape[1],), x1.dtype, torch.float32)
    rows = x1.shape[0] // world_size
    columns = (rows, x2.shape[0]) if all2all_out_flag else (0,)
    return x1.new_empty((rows, x2.shape[1])), x1.new_empty(columns)


@OPS.op(
    "npu_all_to_all_matmul(Tensor x1, Tensor x2, str hcom, int world_size, Tensor? bias=None,"
    " int[]? all2all_axes=None, bool all2all_out_flag=True, str? comm_mode=None)"
    " -> (Tensor, Tensor)",
    ge="AlltoAllMatmul",
    shape=_all_to_all_matmul_shape,
)
def all_to_all_matmul(
    x1: Tensor,
    x2: Tensor,
    hcom: str | Group,
    world_size: int,
    bias: Tensor | None = None,
    all2all_axes: Sequence[int] | None = None,
    all2all_out_flag: bool = True,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns of all ranks for this rank's rows, times `x2`.

    Rank r gets the r-th of equal parts of the rows of each rank's `x1 [M, K]`, and puts what came
    from rank s into columns `s * K` and on.

    Returns:
        `[M / ranks, K * ranks] @ x2 [K * ranks, N] + bias [N]`, and its left operand; an empty
        tensor if it is not asked for.
    """
    _all_to_all_matmul_shape(**locals())
    group = _group("npu_all_to_all_matmul", hcom, world_size)
    blocks = group.exchange("all_to_all", x1.reshape(-1)).view(world_size, -1, x1.shape[1])
    columns = blocks.transpose(0, 1).reshape(-1, x2.shape[0])
    return _product(columns, x2, bias), columns if all2all_out_flag else x1.new_empty(0)
