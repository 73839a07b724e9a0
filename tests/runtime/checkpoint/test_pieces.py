"""Handing a tensor out block by block gives the shards that cutting it whole gives."""

from __future__ import annotations

import random

import pytest
import torch
from tests.layouts import MESHES, random_layout

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Shard
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.chunks import holds, scatter_one
from rolemesh.runtime.checkpoint.pieces import (
    Run,
    as_rows,
    clipped,
    empty_local,
    piece,
    runs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)


def by_blocks(
    whole: torch.Tensor, layout: Layout, mesh: Mesh, rank: int, step: int
) -> torch.Tensor:
    kind = TensorType(tuple(whole.shape), whole.dtype)
    local = empty_local(kind, layout, mesh, rank)
    rows = as_rows(whole)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        held = clipped(runs(layout, kind, mesh, rank), start, start + len(block))
        if held:
            part = piece(block, start, held, layout, mesh, rank)
            assert part.is_contiguous()
            for run, value in zip(held, part.split([run.rows for run in held]), strict=True):
                as_rows(local)[run.local : run.local + run.rows] = value
    return local


@pytest.mark.parametrize("seed", range(60))
def test_blocks_make_up_the_shard(seed: int) -> None:
    choose = random.Random(seed).choice
    mesh = choose(MESHES)
    shape = [choose([1, 2, 3, 5, 6, 8, 12]) for _ in range(choose([0, 1, 1, 2, 2, 3]))]
    layout = random_layout(choose, shape, mesh, owner=True)
    numbers = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape)
    dtype = choose(DTYPES)
    whole = numbers % 2 == 0 if dtype == torch.bool else numbers.to(dtype)
    for rank in range(mesh.size):
        local = by_blocks(whole, layout, mesh, rank, choose([1, 2, 3, 7, 50]))
        if holds(layout, mesh, rank):
            expected = scatter_one(whole, layout, mesh, rank)
        else:
            expected = whole.new_empty(0)
        assert local.dtype == dtype
        assert torch.equal(local, expected), (layout, rank)


def test_rows_of_a_packed_weight_are_runs() -> None:
    mesh = Mesh({"tp": 2})
    kind = TensorType((12, 5), torch.float32)
    packed = Layout((Shard(0, 2, 6),))
    assert runs(packed, kind, mesh, 1) == (Run(3, 0, 3), Run(9, 3, 3))
    assert clipped(runs(packed, kind, mesh, 1), 4, 10) == [Run(4, 1, 2), Run(9, 3, 1)]


def test_a_rank_that_owns_nothing_gets_nothing() -> None:
    mesh = Mesh({"dp": 2, "tp": 2})
    kind = TensorType((4, 3), torch.float32)
    layout = Layout((REPLICATE, Owner(1)))
    assert [bool(runs(layout, kind, mesh, rank)) for rank in range(4)] == [False, True, False, True]
    assert empty_local(kind, layout, mesh, 0).numel() == 0


def test_whole_rows_are_not_copied() -> None:
    mesh = Mesh({"tp": 2})
    block = torch.arange(12.0).reshape(4, 3)
    part = piece(block, 2, [Run(3, 0, 2)], Layout((Shard(0, 1, 10),)), mesh, 0)
    assert part.data_ptr() == block[1:].data_ptr()
