"""Values on the wire: what a rank puts into an exchange, and what it makes of what comes back.

A collective is `pack -> exchanges -> unpack`: pack makes a contiguous wire tensor, every exchange
moves equal contiguous blocks along dim 0, unpack makes the result. Blocks are padded, so no
exchange is ever uneven. Several values of one dtype may share a wire: each block then has their
elements one after the other, without gaps.

Chunks on the wire are those of `lowering.chunks.cut`, in joint rank order (major to minor).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rolemesh.compiler.ir.placement import Segmented, Shard
from rolemesh.lowering.chunks import chunk_units, cut, join

__all__ = [
    "pack_blocks",
    "pack_broadcast",
    "pack_chunks",
    "pack_many",
    "pack_whole",
    "unpack_blocks",
    "unpack_blocks_of",
    "unpack_gathered",
    "unpack_plain",
    "unpack_plain_of",
]


def pack_whole(x: torch.Tensor, *, moves: bool) -> torch.Tensor:
    """The wire tensor of a collective that takes `x` as it is (`all_gather`, `all_reduce`)."""
    return _to_wire(x, moves).contiguous()


def pack_chunks(x: torch.Tensor, *, shard: Shard, parts: int, moves: bool) -> torch.Tensor:
    """The padded chunks of `x` one after the other along dim 0."""
    x = _to_wire(x, moves)
    if _is_outermost(shard, x.shape) and statically_known_true(shard.size % parts == 0):
        rows = x.shape[shard.dim] // parts
        chunks = (parts, *x.shape[1 : shard.dim], rows, *x.shape[shard.dim + 1 :])
        return (x if shard.dim == 0 else x.reshape(chunks)).contiguous()
    return torch.cat(cut(x, shard, parts))


def pack_blocks(x: torch.Tensor, *, shard: Shard, parts: int) -> torch.Tensor:
    """The padded chunks of `x` stacked in a new dim 0, so that a block is one row of the wire."""
    wire = pack_chunks(x, shard=shard, parts=parts, moves=True)
    return wire.reshape(parts, wire.shape[0] // parts, *wire.shape[1:])


def pack_broadcast(x: torch.Tensor, *, shape: Sequence[int], is_owner: bool) -> torch.Tensor:
    """The owner's tensor; on other ranks a fresh one of `shape`: they may hold none."""
    return _to_wire(x if is_owner else x.new_empty(shape), moves=True).contiguous()


def pack_many(
    *values: torch.Tensor, shards: Sequence[Shard] | None, parts: int, moves: bool
) -> torch.Tensor:
    """The wire tensor of several values: in each block, their elements one after the other.

    Args:
        *values: The values, of one dtype.
        shards: What cuts each value into its blocks; None to take them as they are, as one block.
        parts: Number of blocks.
        moves: Whether the exchange only moves elements.
    """
    if shards is None:
        return torch.cat([_to_wire(x, moves).flatten() for x in values])
    wires = [
        pack_chunks(x, shard=shard, parts=parts, moves=moves)
        for x, shard in zip(values, shards, strict=True)
    ]
    return torch.cat([wire.reshape(parts, wire.numel() // parts) for wire in wires], 1)


def unpack_gathered(
    wire: torch.Tensor, *, shard: Shard | Segmented, parts: int, dtype: torch.dtype
) -> torch.Tensor:
    """The whole tensor from all chunks, without pads."""
    stacked = wire.reshape(parts, wire.shape[0] // parts, *wire.shape[1:])
    return unpack_blocks(stacked, shard=shard, dtype=dtype)


def unpack_blocks(
    wire: torch.Tensor, *, shard: Shard | Segmented, dtype: torch.dtype
) -> torch.Tensor:
    """The blocks stacked in dim 0 of the wire, joined as chunks of `shard`."""
    wire = _from_wire(wire, dtype)
    parts, shape = wire.shape[0], wire.shape[1:]
    if isinstance(shard, Segmented) or not _is_outermost(shard, shape):
        return join(wire.unbind(0), shard)
    units, rows = parts * chunk_units(shard.size, parts), parts * shape[shard.dim]
    whole = wire.reshape(*shape[: shard.dim], rows, *shape[shard.dim + 1 :])
    if statically_known_true(units == shard.size):
        return whole
    return whole.narrow(shard.dim, 0, rows // units * shard.size)


def unpack_plain(wire: torch.Tensor, *, dtype: torch.dtype, count: int = 1) -> torch.Tensor:
    """The wire tensor itself, divided by `count` for an average."""
    value = _from_wire(wire, dtype)
    return value / count if count > 1 else value


def unpack_blocks_of(
    wire: torch.Tensor,
    *,
    start: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    parts: int,
    elements: int,
    shard: Shard | Segmented,
) -> torch.Tensor:
    """One of several values that were moved as blocks together.

    Args:
        wire: The wire tensor, `parts` blocks of `elements` elements.
        start: Where in each block the value's part begins.
        shape: Shape of its part.
        dtype: Its dtype.
        parts: Number of blocks.
        elements: Elements of a block.
        shard: What its parts are chunks of.
    """
    rows = wire.reshape(parts, elements).narrow(1, start, math.prod(shape))
    return unpack_blocks(rows.reshape(parts, *shape), shard=shard, dtype=dtype)


def unpack_plain_of(
    wire: torch.Tensor, *, start: int, shape: Sequence[int], dtype: torch.dtype, count: int = 1
) -> torch.Tensor:
    """One of several values that were reduced together; `start` is where it begins."""
    piece = wire.flatten().narrow(0, start, math.prod(shape))
    return unpack_plain(piece.reshape(shape), dtype=dtype, count=count)


def _is_outermost(shard: Shard, shape: Sequence[int]) -> bool:
    """Whether chunks of a tensor of `shape` are rows of memory one after the other."""
    before = shape[: shard.dim]
    return shard.outer == 1 and all(statically_known_true(size == 1) for size in before)


def _to_wire(x: torch.Tensor, moves: bool) -> torch.Tensor:
    """Backends take neither booleans nor 8-bit floats; the latter only move, as bytes."""
    if x.dtype is torch.bool:
        return x.to(torch.uint8)
    if moves and x.dtype.is_floating_point and x.dtype.itemsize == 1:
        return x.view(torch.uint8)
    return x


def _from_wire(wire: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if wire.dtype == dtype:
        return wire
    return wire.to(dtype) if dtype is torch.bool else wire.view(dtype)
