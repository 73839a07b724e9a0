"""Collectives: the Hcom ops of a graph.

torchair makes them in `ge_converter/c10d_functional` and `ge_converter/experimental/hcom_*`.
Displacements and counts are in elements of the flat tensor; a broadcast's root is a position in the
group, not a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.communicator import Communicator, Request, group_ranks
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()

_REDUCTIONS = ("sum", "max", "min", "prod")


@OPS.op("HcomAllGather", collective=True)
def hcom_all_gather(a: Attributes, communicator: Communicator, x: Tensor) -> Tensor:
    """The tensors of all ranks, joined along dim 0."""
    _group_size(a)
    request = Request("all_gather", a.str("group"), a.where)
    return communicator.exchange(request, x.contiguous())


@OPS.op("HcomReduceScatter", collective=True)
def hcom_reduce_scatter(a: Attributes, communicator: Communicator, x: Tensor) -> Tensor:
    """This rank's block of dim 0 of the reduction over all ranks."""
    _require_blocks(a, x)
    request = Request("reduce_scatter", a.str("group"), a.where, _reduction(a))
    return communicator.exchange(request, x.contiguous())


@OPS.op("HcomAllReduce", collective=True)
def hcom_all_reduce(a: Attributes, communicator: Communicator, x: Tensor) -> Tensor:
    """The reduction over all ranks."""
    request = Request("all_reduce", a.str("group"), a.where, _reduction(a))
    return communicator.exchange(request, x.contiguous())


@OPS.op("HcomBroadcast", dynamic=("x",), collective=True)
def hcom_broadcast(
    a: Attributes, communicator: Communicator, x: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The tensors of one rank."""
    root = a.int("root_rank")
    if not 0 <= root < _group_size(a):
        raise ValueError(f"{a.where}: root_rank {root} in a group of {_group_size(a)}")
    request = Request("broadcast", a.str("group"), a.where, root=root)
    return tuple(communicator.exchange(request, tensor.contiguous()) for tensor in x)


@OPS.op("HcomAllToAll", collective=True)
def hcom_all_to_all(a: Attributes, communicator: Communicator, x: Tensor) -> Tensor:
    """Block j of dim 0 goes to rank j, and block i of the result comes from rank i."""
    _require_blocks(a, x)
    request = Request("all_to_all", a.str("group"), a.where)
    return communicator.exchange(request, x.contiguous().reshape(-1)).reshape(x.shape)


@OPS.op("HcomAllToAllV", collective=True)
def hcom_all_to_all_v(
    a: Attributes,
    communicator: Communicator,
    send_data: Tensor,
    send_counts: Tensor,
    send_displacements: Tensor,
    recv_counts: Tensor,
    recv_displacements: Tensor,
) -> Tensor:
    """As many elements to and from each rank as the counts say.

    The definition has no shape for what is received: all dims but the first are those of what is
    sent.
    """
    sent = _pieces(a, "send", send_counts, send_displacements)
    received = _pieces(a, "recv", recv_counts, recv_displacements)
    flat = send_data.contiguous().reshape(-1)
    if any(start + count > flat.numel() for start, count in sent):
        raise ValueError(f"{a.where}: sends {sent} of {flat.numel()} elements (start, count)")
    request = Request(
        "all_to_all",
        a.str("group"),
        a.where,
        send_counts=tuple(count for _, count in sent),
        receive_counts=tuple(count for _, count in received),
    )
    wire = torch.cat([flat[start : start + count] for start, count in sent])
    arrived = communicator.exchange(request, wire)
    result = arrived.new_zeros(max(start + count for start, count in received))
    counts = [count for _, count in received]
    for (start, count), piece in zip(received, arrived.split(counts), strict=True):
        result[start : start + count] = piece
    row = send_data.shape[1:].numel()
    if row == 0 or result.numel() % row:
        raise ValueError(f"{a.where}: {result.numel()} elements make no rows of {row}")
    return result.reshape(-1, *send_data.shape[1:])


def _group_size(a: Attributes) -> int:
    """Size of the op's group.

    Raises:
        RolemeshError: RM030 if the op says that the group has another size.
    """
    _, ranks = group_ranks(a.str("group"))
    if a.int("rank_size", len(ranks)) != len(ranks):
        raise RolemeshError(
            "RM030",
            what=f"{a.where} is for {a.int('rank_size')} ranks, its group has {len(ranks)}",
            where=f"group {a.str('group')}",
            why="attribute rank_size and the group must agree",
            fix="convert the program again for this mesh",
        )
    return len(ranks)


def _require_blocks(a: Attributes, x: Tensor) -> None:
    """Refuse a tensor whose dim 0 cannot be cut into one block per rank."""
    size = _group_size(a)
    if not x.dim() or x.shape[0] % size:
        raise ValueError(f"{a.where}: shape {list(x.shape)} in blocks for {size} ranks")


def _reduction(a: Attributes) -> str:
    reduction = a.str("reduction")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{a.where}: reduction {reduction!r} is none of {', '.join(_REDUCTIONS)}")
    return reduction


def _pieces(
    a: Attributes, which: str, counts: Tensor, displacements: Tensor
) -> list[tuple[int, int]]:
    """Start and length of the piece for each rank."""
    starts, lengths = integers(displacements), integers(counts)
    size = _group_size(a)
    if len(starts) != size or len(lengths) != size or min(*starts, *lengths) < 0:
        raise ValueError(
            f"{a.where}: {which}_counts {lengths} and {which}_displacements {starts} "
            f"for {size} ranks"
        )
    return list(zip(starts, lengths, strict=True))
