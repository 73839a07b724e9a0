"""Ascend's matrix products that are fused with a collective.

What they compute stands in `lowering/npu/matmul_collectives.py`; here are the names of their GE
definitions, and how they exchange.
"""

from __future__ import annotations

from torch import Tensor

from rolemesh.lowering.npu.matmul_collectives import (
    Group,
    all_gather_base_mm,
    all_to_all_matmul,
    mm_all_reduce_base,
    mm_reduce_scatter_base,
)
from rolemesh.runtime.ge.communicator import Communicator, Request, group_ranks
from rolemesh.runtime.ge.ops.checks import only
from rolemesh.runtime.ge.ops.table import GE_DTYPES, Attributes, OpTable

__all__ = ["OPS"]

OPS = OpTable()

_UNDEFINED = 28
"""`torchair.ge.DataType.DT_UNDEFINED`."""


def _group(a: Attributes, communicator: Communicator) -> Group:
    name = a.str("group")

    def exchange(kind: str, x: Tensor) -> Tensor:
        reduction = "sum" if "reduce" in kind else ""
        return communicator.exchange(Request(kind, name, a.where, reduction), x)

    return Group(len(group_ranks(name)[1]), exchange)


@OPS.op("MatmulReduceScatter", equal=("x1", "x2", "bias"), collective=True)
def matmul_reduce_scatter(
    a: Attributes, communicator: Communicator, x1: Tensor, x2: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`npu_mm_reduce_scatter_base`."""
    only(a, is_trans_a=False, is_trans_b=False)
    return mm_reduce_scatter_base(
        x1,
        x2,
        _group(a, communicator),
        a.int("rank_size"),
        reduce_op=a.str("reduce_op", "sum"),
        bias=bias,
        comm_turn=a.int("comm_turn", 0),
    )


@OPS.op("AllGatherMatmul", equal=("x1", "x2", "bias"), collective=True)
def all_gather_matmul(
    a: Attributes, communicator: Communicator, x1: Tensor, x2: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`npu_all_gather_base_mm`."""
    only(a, is_trans_a=False, is_trans_b=False)
    return all_gather_base_mm(
        x1,
        x2,
        _group(a, communicator),
        a.int("rank_size"),
        bias=bias,
        gather_index=a.int("gather_index", 0),
        gather_output=a.bool("is_gather_out", True),
        comm_turn=a.int("comm_turn", 0),
    )


@OPS.op("MatmulAllReduce", equal=("x1", "x2", "bias", "x3"), collective=True)
def matmul_all_reduce(
    a: Attributes,
    communicator: Communicator,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
) -> Tensor:
    """`npu_mm_all_reduce_base`."""
    only(a, is_trans_a=False, is_trans_b=False, group_size=0, y_dtype=_UNDEFINED)
    return mm_all_reduce_base(
        x1,
        x2,
        _group(a, communicator),
        reduce_op=a.str("reduce_op", "sum"),
        bias=bias,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        x3=x3,
        dequant_scale=dequant_scale,
        pertoken_scale=pertoken_scale,
        comm_quant_scale_1=comm_quant_scale_1,
        comm_quant_scale_2=comm_quant_scale_2,
        antiquant_group_size=a.int("antiquant_group_size", 0),
        comm_turn=a.int("comm_turn", 0),
        comm_quant_mode=a.int("comm_quant_mode", 0),
        comm_mode=a.str("comm_mode", "ai_cpu"),
    )


@OPS.op("AlltoAllMatmul", equal=("x1", "x2"), collective=True)
def all_to_all_product(
    a: Attributes,
    communicator: Communicator,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    comm_scale: Tensor | None = None,
    x1_offset: Tensor | None = None,
    x2_offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`npu_all_to_all_matmul`, which has no scales and offsets."""
    only(
        a,
        x1_quant_mode=0,
        x2_quant_mode=0,
        comm_quant_mode=0,
        x1_quant_dtype=_UNDEFINED,
        comm_quant_dtype=_UNDEFINED,
        transpose_x1=False,
        transpose_x2=False,
        group_size=0,
    )
    if any(v is not None for v in (x1_scale, x2_scale, comm_scale, x1_offset, x2_offset)):
        raise ValueError(f"{a.where}: no semantics for scales and offsets")
    number = a.int("y_dtype", _UNDEFINED)
    if number != _UNDEFINED and GE_DTYPES.get(number) is not x1.dtype:
        raise ValueError(f"{a.where}: no semantics for y_dtype={number} of {x1.dtype} operands")
    return all_to_all_matmul(
        x1,
        x2,
        _group(a, communicator),
        a.int("world_size"),
        bias=bias,
        all2all_axes=a.ints("all2all_axes", (-2, -1)),
        all2all_out_flag=a.bool("alltoall_out_flag", True),
        comm_mode=a.str("comm_mode", "ai_cpu"),
    )
