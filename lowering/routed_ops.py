"""`rolemesh::dispatch` and `rolemesh::combine`: one rank's part in the ops of the mesh dialect.

    dispatch(x [.., H], ids [N, k]) -> [N, H]
    combine(x [.., O], ids [N, k]) -> a chunk of x

Each is an all_to_all whose sizes follow from the ids (`rolemesh.lowering.routes`), between tensors
of fixed shapes; so a graph holds it as one node, and a compiler sees no size that depends on data.
The host reads the sizes: where ids are on a device, it waits for them. The exchange has ended when
the op returns.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload

from rolemesh.compiler.ir.dialect import COMBINE, DISPATCH, MeshOp
from rolemesh.compiler.ir.placement import Shard
from rolemesh.lowering.chunks import chunk_units
from rolemesh.lowering.composite.op import register_shape
from rolemesh.lowering.routes import (
    combine_pack,
    combine_unpack,
    dispatch_pack,
    dispatch_unpack,
    routes_of,
)

__all__ = ["define_routed_ops", "order_with_collectives", "received_bytes_of", "routed_ops"]

_ARGUMENTS = (
    "(Tensor x, Tensor ids, SymInt[] shard, int size, int parts, int index, str group) -> Tensor"
)


def _dispatch(
    x: Tensor, ids: Tensor, shard: Sequence[int], size: int, parts: int, index: int, group: str
) -> Tensor:
    tokens, cut = ids.shape[0], Shard(*shard)
    routes = routes_of(ids, (tokens,), shard=cut, size=size, parts=parts, index=index)
    wire = dispatch_pack(x, routes)
    received = _exchange(wire, routes.own_counts, routes.whole_counts, group)
    return dispatch_unpack(received, routes, tokens=tokens)


def _combine(
    x: Tensor, ids: Tensor, shard: Sequence[int], size: int, parts: int, index: int, group: str
) -> Tensor:
    cut = Shard(*shard)
    routes = routes_of(ids, x.shape[:-1], shard=cut, size=size, parts=parts, index=index)
    wire = combine_pack(x, routes)
    received = _exchange(wire, routes.whole_counts, routes.own_counts, group)
    return combine_unpack(received, routes, shape=_chunk(x.shape, cut, parts))


def _exchange(wire: Tensor, sent: list[int], kept: list[int], group: str) -> Tensor:
    """The rows that the other ranks of a group have for this one, by rank."""
    received = wire.new_empty(sum(kept), wire.shape[1])
    members = dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(group))
    # Rows only move: as bytes they have a dtype that every backend takes.
    dist.all_to_all_single(
        received.view(torch.uint8), wire.view(torch.uint8), kept, sent, group=members
    )
    return received


def _chunk(shape: Sequence[int], shard: Shard, parts: int) -> list[int]:
    units = chunk_units(shard.size, parts)
    found = list(shape)
    found[shard.dim] = shape[shard.dim] // shard.size * units
    return found


def _dispatch_shape(
    x: Tensor, ids: Tensor, shard: Sequence[int], size: int, parts: int, index: int, group: str
) -> Tensor:
    return x.new_empty(ids.shape[0], x.shape[-1])


def _combine_shape(
    x: Tensor, ids: Tensor, shard: Sequence[int], size: int, parts: int, index: int, group: str
) -> Tensor:
    return x.new_empty(_chunk(x.shape, Shard(*shard), parts))


@functools.cache
def define_routed_ops() -> torch.library.Library:
    """Define the ops; a second call does nothing. They go away with what is returned."""
    library = torch.library.Library("rolemesh", "FRAGMENT")
    for name, kernel, shape in (
        ("dispatch", _dispatch, _dispatch_shape),
        ("combine", _combine, _combine_shape),
    ):
        library.define(f"{name}{_ARGUMENTS}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        register_shape(library, name, shape)
    return library


def routed_ops() -> Mapping[MeshOp, OpOverload]:
    """The op of torch for each op of the mesh dialect that moves rows by their routes."""
    define_routed_ops()
    ops = torch.ops.rolemesh
    return {DISPATCH: ops.dispatch.default, COMBINE: ops.combine.default}


def received_bytes_of(op: OpOverload, arguments: Mapping[str, object]) -> int:
    """Bytes that a rank receives from others in a call of one of the ops."""
    x, ids, shard, size, parts, index = (
        arguments[name] for name in ("x", "ids", "shard", "size", "parts", "index")
    )
    assert isinstance(x, Tensor)
    assert isinstance(ids, Tensor)
    assert isinstance(shard, Sequence)
    assert isinstance(size, int)
    assert isinstance(parts, int)
    assert isinstance(index, int)
    combines = op is routed_ops()[COMBINE]
    rows = x.shape[:-1] if combines else (ids.shape[0],)
    routes = routes_of(ids, rows, shard=Shard(*shard), size=size, parts=parts, index=index)
    return routes.received(index, combines=combines) * x.shape[-1] * x.itemsize


@functools.cache
def order_with_collectives() -> None:
    """Have inductor keep the order of the ops among the collectives of a graph.

    It keeps that of its own collectives, whatever it fuses on one rank and not on another.
    """
    from torch._inductor import ir
    from torch._inductor.lowering import (
        add_layout_constraint,
        constrain_to_fx_strides,
        register_lowering,
    )

    def lower(op: OpOverload, *args: Any, **kwargs: Any) -> ir.TensorBox:
        found: Any = ir._CollectiveKernel.create_out_of_place(op, *args, **kwargs)
        return ir.TensorBox.create(found)

    for op in routed_ops().values():
        add_layout_constraint(op, constrain_to_fx_strides)
        register_lowering(op, type_promotion_kind=None)(functools.partial(lower, op))
