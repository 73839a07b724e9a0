"""Packing and unpacking copy nothing where chunks are rows of memory one after the other."""

from __future__ import annotations

import pytest
import torch

from rolemesh.compiler.ir.placement import Shard
from rolemesh.lowering.chunks import cut
from rolemesh.lowering.wires import pack_chunks, unpack_blocks, unpack_gathered

F32 = torch.float32


@pytest.mark.parametrize(
    ("shape", "shard", "shares"),
    [
        ((6, 5, 4), Shard(0, 1, 6), True),
        ((1, 6, 4), Shard(1, 1, 6), True),
        ((1, 1, 6), Shard(2, 1, 3), True),
        ((2, 6, 4), Shard(1, 1, 6), False),
        ((1, 12, 4), Shard(1, 2, 6), False),
    ],
)
def test_even_chunks_that_lie_in_a_row_are_views(
    shape: tuple[int, ...], shard: Shard, shares: bool
) -> None:
    x = torch.randn(shape)
    wire = pack_chunks(x, shard=shard, parts=3, moves=True)
    assert torch.equal(wire, torch.cat(cut(x, shard, 3)))
    assert (wire.data_ptr() == x.data_ptr()) == shares
    whole = unpack_gathered(wire, shard=shard, parts=3, dtype=F32)
    assert torch.equal(whole, x)
    assert (whole.data_ptr() == wire.data_ptr()) == shares


def test_pads_at_the_end_are_cut_off_without_a_copy() -> None:
    x, shard = torch.randn(1, 7, 4), Shard(1, 1, 7)
    wire = torch.stack(cut(x, shard, 3))
    whole = unpack_blocks(wire, shard=shard, dtype=F32)
    assert torch.equal(whole, x)
    assert whole.data_ptr() == wire.data_ptr()
