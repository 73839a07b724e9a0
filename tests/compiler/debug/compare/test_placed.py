"""Values as ranks hold them: what counts, what does not, and whose part differs."""

from __future__ import annotations

import math

import pytest
import torch

from rolemesh.compiler.debug.compare.placed import gap, pick_names, place, reassemble
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Routed,
    Segment,
    Segmented,
    Shard,
)

TP = Mesh({"tp": 3})
BOTH = Mesh({"dp": 2, "tp": 3})
PICKS = torch.tensor([4, 0, 3, 1, 4, 2, 0])
SEVERAL = torch.stack([PICKS, PICKS.flip(0)], 1)
ROUTED = Routed("ids:chosen:5", 0, 1, 7)
ROUTES = Routed("routes:several:5", 0, 1, 7)
WHOLE = torch.arange(1.0, 71.0).reshape(7, 10)


def picks(name: str) -> torch.Tensor:
    return {"chosen": PICKS, "several": SEVERAL}[name]


LAYOUTS: dict[str, tuple[Mesh, tuple[Placement, ...]]] = {
    "whole": (TP, (REPLICATE,)),
    "uneven": (TP, (Shard(0, 1, 7),)),
    "units": (TP, (Shard(1, 2, 5),)),
    "owner": (TP, (Owner(2),)),
    "sum": (TP, (Partial("sum"),)),
    "max": (TP, (Partial("max"),)),
    "avg": (TP, (Partial("avg"),)),
    "segments": (TP, (Segmented(1, (Segment(4, 1, 4), Segment(6, 1, 3))),)),
    "routed": (TP, (ROUTED,)),
    "routes": (TP, (ROUTES,)),
    "two axes": (BOTH, (Shard(0, 1, 7), Shard(1, 1, 10))),
    "one dim on both": (BOTH, (Shard(0, 1, 7), Shard(0, 1, 7))),
    "sum of shards": (BOTH, (Shard(1, 1, 10), Partial("sum"))),
    "sums on both": (BOTH, (Partial("sum"), Partial("sum"))),
    "routed shards": (BOTH, (Shard(1, 1, 10), ROUTED)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("poison", [False, True])
def test_what_ranks_hold_makes_up_the_value(name: str, poison: bool) -> None:
    mesh, placements = LAYOUTS[name]
    layout = Layout(placements)
    locals_ = place(WHOLE, layout, mesh, picks, poison=poison)
    assert {tuple(x.shape) for x in locals_} == {layout.local_shape(WHOLE.shape, mesh)}
    torch.testing.assert_close(reassemble(locals_, layout, WHOLE.shape, mesh, picks), WHOLE)
    assert gap(WHOLE, locals_, layout, mesh, picks, 1e-6).equal


@pytest.mark.parametrize("name", ["uneven", "units", "owner", "routed", "routes", "two axes"])
def test_what_ranks_must_not_read_is_poisoned_and_does_not_count(name: str) -> None:
    mesh, placements = LAYOUTS[name]
    locals_ = place(WHOLE, Layout(placements), mesh, picks, poison=True)
    assert any(bool(x.isnan().any()) for x in locals_)
    assert gap(WHOLE, locals_, Layout(placements), mesh, picks, 0.0).max_abs == 0.0


@pytest.mark.parametrize("name", [n for n in LAYOUTS if "sum" not in n and n not in ("max", "avg")])
def test_a_wrong_element_is_blamed_on_the_rank_that_holds_it(name: str) -> None:
    mesh, placements = LAYOUTS[name]
    layout = Layout(placements)
    for rank in range(mesh.size):
        locals_ = place(WHOLE, layout, mesh, picks, poison=True)
        held = locals_[rank].flatten().nan_to_num().nonzero()
        if not held.numel():  # it owns nothing of this value
            continue
        locals_[rank].view(-1)[held[-1]] += 7.0
        found = gap(WHOLE, locals_, layout, mesh, picks, 1e-3)
        assert (found.equal, found.ranks, found.max_abs) == (False, (rank,), 7.0)
        assert found.max_rel == pytest.approx(0.1)
        assert gap(WHOLE, locals_, layout, mesh, picks, 1e-3, rank).ranks == ()
        assert not gap(WHOLE, locals_, layout, mesh, picks, 1e-3, rank).equal
        other = (rank + 1) % mesh.size
        assert gap(WHOLE, locals_, layout, mesh, picks, 1e-3, other).equal
        assert gap(WHOLE, locals_, layout, mesh, picks, 0.2).equal


def test_a_pending_sum_is_blamed_on_all_ranks() -> None:
    layout = Layout((Partial("sum"),))
    locals_ = place(WHOLE, layout, TP, picks, poison=True)
    locals_[1] += 1.0
    assert gap(WHOLE, locals_, layout, TP, picks, 1e-3).ranks == (0, 1, 2)


def test_a_pending_sum_lies_on_several_ranks_so_that_only_linear_ops_pass() -> None:
    layout = Layout((Partial("sum"),))
    locals_ = place(-WHOLE, layout, TP, picks, poison=False)
    squashed = [torch.relu(x) for x in locals_]
    assert not gap(torch.relu(-WHOLE), squashed, layout, TP, picks, 1e-3).equal


def test_an_infinity_in_a_pending_sum_stays_one() -> None:
    whole = torch.tensor([1.0, math.inf, -math.inf])
    layout = Layout((Partial("sum"),))
    locals_ = place(whole, layout, TP, picks, poison=False)
    torch.testing.assert_close(reassemble(locals_, layout, (3,), TP, picks), whole)


def test_another_shape_or_dtype_differs() -> None:
    layout = Layout((REPLICATE,))
    for wrong in (WHOLE[:-1], WHOLE.double()):
        found = gap(WHOLE, [WHOLE, wrong, WHOLE], layout, TP, picks, 1e-3)
        assert (found.equal, found.max_abs, found.ranks) == (False, math.inf, (1,))


def test_integers_must_be_equal() -> None:
    layout = Layout((Shard(0, 1, 7),))
    locals_ = place(PICKS, layout, TP, picks, poison=True)
    assert gap(PICKS, locals_, layout, TP, picks, 1.0).equal
    locals_[0][0] += 1
    assert gap(PICKS, locals_, layout, TP, picks, 1.0).ranks == (0,)


def test_routed_rows_name_their_ids() -> None:
    assert pick_names(Layout((ROUTED, Shard(1, 1, 10)))) == ["chosen"]
    assert pick_names(Layout((Partial("sum"),))) == []
