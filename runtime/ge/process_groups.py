"""Collectives of a GE graph over torch.distributed: each rank is a process.

They are issued as functional collectives, so that `runtime.traffic` records them and
`runtime.watch` knows a rank that waits in one. What only moves travels as bytes: backends lack some
data types.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.communicator import Request, group_ranks
from rolemesh.runtime.watch import is_collective_error

__all__ = ["ProcessGroups"]


class ProcessGroups:
    """The groups of torch.distributed that exist in this process; a `Communicator`.

    A collective waits for the other ranks as long as its group does.
    """

    def exchange(self, request: Request, wire: torch.Tensor) -> torch.Tensor:
        """Take part in a collective; see `Communicator.exchange`."""
        group = _group(request)
        try:
            return _exchange(request, wire, group)
        except RuntimeError as error:
            if not is_collective_error(error):
                raise
            raise RolemeshError(
                "RM030",
                what=f"{request.node} failed on rank {dist.get_rank()}",
                where=f"{request.kind} in group {request.group}",
                why=str(error),
                fix="see the other ranks of the group: one of them ended, failed or is elsewhere",
            ) from error


def _group(request: Request) -> dist.ProcessGroup:
    tag, ranks = group_ranks(request.group)
    if not dist.is_initialized():
        raise _unknown(request, "torch.distributed has no process group")
    if dist.get_rank() not in ranks:
        raise _unknown(request, f"this is rank {dist.get_rank()}")
    group = dist.distributed_c10d._find_pg_by_ranks_and_tag(tag, list(ranks))
    if group is None or tuple(dist.get_process_group_ranks(group)) != ranks:
        raise _unknown(request, f"no group of these ranks, in this order, has the tag {tag!r}")
    return group


def _unknown(request: Request, why: str) -> RolemeshError:
    return RolemeshError(
        "RM030",
        what=f"{request.node} names a group that this process is not in",
        where=f"{request.kind} in group {request.group}",
        why=why,
        fix="convert the graph in the processes that run it, after their groups are made",
    )


def _exchange(request: Request, wire: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    ops = torch.ops._c10d_functional
    name, size = group.group_name, group.size()
    reduction = _REDUCTIONS.get(request.reduction, request.reduction)
    match request.kind:
        case "all_reduce":
            return ops.wait_tensor(ops.all_reduce(wire, reduction, name))
        case "reduce_scatter":
            return ops.wait_tensor(ops.reduce_scatter_tensor(wire, reduction, size, name))
    flat = wire.reshape(-1).view(torch.uint8)
    shape = list(wire.shape)
    match request.kind:
        case "all_gather":
            shape[0] *= size
            moved = ops.all_gather_into_tensor(flat, size, name)
        case "broadcast":
            moved = ops.broadcast(flat, request.root, name)
        case "all_to_all":
            sent = _bytes(request.send_counts, wire, size)
            received = _bytes(request.receive_counts, wire, size)
            shape = [sum(received) // wire.element_size()]
            moved = ops.all_to_all_single(flat, received, sent, name)
        case _:
            raise ValueError(f"{request.node}: unknown collective {request.kind}")
    return ops.wait_tensor(moved).view(wire.dtype).reshape(shape)


def _bytes(counts: tuple[int, ...], wire: torch.Tensor, size: int) -> list[int]:
    """Bytes for each rank; equal blocks if there are no counts."""
    return [count * wire.element_size() for count in counts or [wire.numel() // size] * size]


_REDUCTIONS: Mapping[str, str] = {"prod": "product"}
"""Names of reductions in torch, where they differ."""
