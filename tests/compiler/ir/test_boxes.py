"""Boxes of layouts: against tensors that are really cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.layouts import random_layout
from tests.manifests import ALL_MESHES

from rolemesh.compiler.ir.boxes import Distribution, Run, distribute, select, slab
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Partial, Segment, Segmented, Shard
from rolemesh.lowering import chunks

EXTENTS = (0, 1, 2, 3, 4, 5, 6, 8, 12)


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Mesh, Distribution]:
    mesh = draw(st.sampled_from(ALL_MESHES))
    shape = tuple(draw(st.lists(st.sampled_from(EXTENTS), max_size=3)))
    layout = random_layout(lambda options: draw(st.sampled_from(options)), shape, mesh, owner=True)
    return mesh, distribute(layout, shape, mesh)


def filled(found: Distribution, x: torch.Tensor, rank: int, local: torch.Tensor) -> torch.Tensor:
    """A local tensor filled by boxes alone; NaN where there is none."""
    result = torch.full_like(local, torch.nan)
    for grid in found.held[rank]:
        assert grid.shape == tuple(local.shape)
        pick = [
            torch.cat([torch.arange(r.start, r.start + r.length) for r in rs]) for rs in grid.runs
        ]
        put = [
            torch.cat([torch.arange(r.local, r.local + r.length) for r in rs]) for rs in grid.runs
        ]
        if not grid.runs:
            return x.clone()
        result[torch.meshgrid(*put, indexing="ij")] = x[torch.meshgrid(*pick, indexing="ij")]
        assert grid.elements == int((~result.isnan()).sum())
    return result


@given(distributions())
def test_boxes_are_the_cuts_of_the_store(case: tuple[Mesh, Distribution]) -> None:
    mesh, found = case
    layout = found.layout
    assert layout is not None
    x = torch.arange(torch.Size(found.shape).numel(), dtype=torch.float64).reshape(found.shape)
    locals_ = chunks.poison_pads(chunks.scatter(x, layout, mesh), layout, mesh)
    for rank, local in enumerate(locals_):
        if not chunks.holds(layout, mesh, rank):
            assert found.held[rank] == ()
        else:
            assert torch.equal(filled(found, x, rank, local).nan_to_num(-1), local.nan_to_num(-1))


@given(distributions())
def test_runs_are_maximal(case: tuple[Mesh, Distribution]) -> None:
    for grids in case[1].held:
        for runs in (runs for grid in grids for runs in grid.runs):
            for a, b in pairwise(runs):
                assert a.local + a.length <= b.local
                assert (a.start + a.length, a.local + a.length) != (b.start, b.local)


@given(distributions(), st.data())
def test_a_slab_is_a_narrowed_tensor(case: tuple[Mesh, Distribution], data: st.DataObject) -> None:
    _, found = case
    dims = [dim for dim, extent in enumerate(found.shape) if extent]
    if not dims:
        return
    dim = data.draw(st.sampled_from(dims))
    start = data.draw(st.integers(0, found.shape[dim] - 1))
    length = data.draw(st.integers(1, found.shape[dim] - start))
    part = slab(found, dim, start, length)
    assert part.shape[dim] == length
    for whole, cut in zip(found.held, part.held, strict=True):
        places = {
            r.start + i: r.local + i for g in whole for r in g.runs[dim] for i in range(r.length)
        }
        mine = {r.start + i: r.local + i for g in cut for r in g.runs[dim] for i in range(r.length)}
        assert mine == {n - start: at for n, at in places.items() if start <= n < start + length}


def test_segments_and_owners() -> None:
    mesh = Mesh({"dp": 2, "tp": 4})
    shared = Segmented(0, (Segment(8, 1, 8), Segment(4, 1, 2, 2), Segment(3, 1, 0)))
    found = distribute(Layout((Owner(1), shared)), (15,), mesh)
    assert found.held[:4] == ((), (), (), ())
    (grid,) = found.held[6]
    assert grid.shape == (7,)
    assert grid.runs == ((Run(4, 2, 0), Run(10, 5, 2)),)


def test_what_no_stored_tensor_has_is_refused() -> None:
    mesh = Mesh({"tp": 2})
    with pytest.raises(ValueError, match=r"no tensor is stored as \+sum"):
        distribute(Layout((Partial(),)), (4,), mesh)
    with pytest.raises(ValueError, match=r"owner\(2\) names a rank of an axis that has 2"):
        distribute(Layout((Owner(2),)), (4,), mesh)
    with pytest.raises(RolemeshError, match="RM009"):
        distribute(Layout((Shard(0, 1, 3),)), (4,), mesh)


def test_select_joins_neighbours() -> None:
    runs = (Run(0, 4, 0), Run(8, 4, 4))
    assert select(runs, [(0, 2, 0), (2, 6, 2)]) == (Run(0, 4, 0), Run(8, 2, 4))
    assert select(runs, [(6, 8, 0), (0, 1, 5)]) == (Run(10, 2, 0), Run(0, 1, 5))
    assert distribute(Layout((REPLICATE,)), (), Mesh({"tp": 2})).held[1][0].runs == ()
