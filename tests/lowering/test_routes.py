"""Rows that move by their routes are those that all_gather and reduce_scatter would move.

All ranks in lock-step, with NaN in every pad and in every row that a rank does not work on.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lowering.test_mesh_ops import one_op
from torch import Tensor

from rolemesh.compiler.ir.dialect import COMBINE, DISPATCH
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Partial, Placement, Routed, Shard
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.routes import routes_of
from rolemesh.runtime.lockstep import assemble_outputs, run_lockstep, scatter_inputs

MESHES = (Mesh({"tp": 2}), Mesh({"tp": 3}), Mesh({"tp": 8}), Mesh({"dp": 2, "tp": 3}))


def on_tp(mesh: Mesh, placement: Placement) -> Layout:
    return Layout.replicated(mesh).replace(mesh.index("tp"), placement)


def worked_on(ids: Tensor, experts: int, ranks: int) -> Tensor:
    """By token and rank, whether the token has an expert there: `[N, p]`."""
    units = math.ceil(experts / ranks)
    real = (ids >= 0) & (ids < experts)
    return torch.stack([(real & (ids // units == rank)).any(1) for rank in range(ranks)], 1)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Mesh, int, int, int, Tensor, torch.dtype]:
    """A mesh, batch, tokens of a sequence, experts, ids (some name no expert), and a dtype."""
    mesh = draw(st.sampled_from(MESHES))
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 11))
    experts, choices = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    ids = torch.randint(-2, experts + 2, (batch * tokens, choices), generator=generator)
    ids = ids.to(draw(st.sampled_from((torch.int64, torch.int32))))
    return mesh, batch, tokens, experts, ids, draw(st.sampled_from((torch.float32, torch.bfloat16)))


@given(calls())
@settings(max_examples=60, deadline=None)
def test_a_dispatch_gives_a_rank_the_rows_that_it_works_on(
    call: tuple[Mesh, int, int, int, Tensor, torch.dtype],
) -> None:
    mesh, batch, tokens, experts, ids, dtype = call
    ranks, rows = mesh.axis_size("tp"), batch * tokens
    kind, shard = TensorType((rows, 5), dtype), Shard(0, batch, tokens)
    picks = TensorType(tuple(ids.shape), ids.dtype)
    routed = Routed(f"routes:x1:{experts}", 0, 1, rows)
    program = one_op(
        mesh,
        DISPATCH,
        [(kind, on_tp(mesh, shard)), (picks, Layout.replicated(mesh))],
        (kind, on_tp(mesh, routed)),
        shard=shard,
        size=experts,
        axes=("tp",),
    )
    x = torch.randn(rows, 5).to(dtype)
    received: list[int] = []
    (found,) = run_lockstep(
        program,
        scatter_inputs(program, [x, ids], poison=True),
        poison=True,
        check=True,
        ledger=lambda node, rank, size: received.append(size),
    )
    works = worked_on(ids, experts, ranks)
    for rank, local in enumerate(found):
        here = works[:, mesh.coordinate(rank)[mesh.index("tp")]]
        assert local is not None
        assert torch.equal(local[here], x[here])
        assert local[~here].isnan().all()
    assert sum(received) == _moved(works, batch, tokens, mesh) * 5 * dtype.itemsize


@given(calls())
@settings(max_examples=60, deadline=None)
def test_a_combine_sums_the_rows_that_ranks_worked_on(
    call: tuple[Mesh, int, int, int, Tensor, torch.dtype],
) -> None:
    mesh, batch, tokens, experts, ids, dtype = call
    ranks = mesh.axis_size("tp")
    kind, shard = TensorType((batch, tokens, 5), dtype), Shard(1, 1, tokens)
    picks = TensorType(tuple(ids.shape), ids.dtype)
    program = one_op(
        mesh,
        COMBINE,
        [(kind, on_tp(mesh, Partial())), (picks, Layout.replicated(mesh))],
        (kind, on_tp(mesh, shard)),
        op="sum",
        shard=shard,
        size=experts,
        axes=("tp",),
    )
    works = worked_on(ids, experts, ranks).reshape(batch, tokens, ranks)
    summands = [torch.randn(batch, tokens, 5).to(dtype) for _ in range(ranks)]
    want = torch.zeros(batch, tokens, 5, dtype=dtype)
    for position, summand in enumerate(summands):  # in rank order: the very same roundings
        want = want + torch.where(works[..., position, None], summand, 0)
        summand[~works[..., position]] = math.nan
    axis = mesh.index("tp")
    locals_ = [summands[mesh.coordinate(rank)[axis]].clone() for rank in range(mesh.size)]
    received: list[int] = []
    found = run_lockstep(
        program,
        [locals_, [ids] * mesh.size],
        poison=True,
        check=True,
        ledger=lambda node, rank, size: received.append(size),
    )
    (whole,) = assemble_outputs(program, found)
    assert whole is not None
    assert torch.equal(whole, want)
    assert sum(received) == _moved(works.flatten(0, 1), batch, tokens, mesh) * 5 * dtype.itemsize


def _moved(works: Tensor, batch: int, tokens: int, mesh: Mesh) -> int:
    """Pairs of a token and a rank that it is sent to, or comes from, and is not on already."""
    ranks = mesh.axis_size("tp")
    home = torch.arange(tokens) // math.ceil(tokens / ranks)
    away = home.repeat(batch)[:, None] != torch.arange(ranks)
    return int((works & away).sum()) * (mesh.size // ranks)


@pytest.mark.parametrize("choices", [1, 3])
def test_both_sides_of_an_exchange_know_its_sizes(choices: int) -> None:
    ids = torch.randint(0, 8, (2 * 7, choices))
    found = [
        routes_of(ids, (2, 7), shard=Shard(1, 1, 7), size=8, parts=4, index=index)
        for index in range(4)
    ]
    for mine in range(4):
        for other in range(4):
            assert found[mine].own_counts[other] == found[other].whole_counts[mine]


def test_only_tokens_count_that_have_an_expert_somewhere() -> None:
    ids = torch.full((5, 2), -1)
    found = routes_of(ids, (5,), shard=Shard(0, 1, 5), size=6, parts=4, index=1)
    assert found.own_counts == found.whole_counts == [0, 0, 0, 0]
