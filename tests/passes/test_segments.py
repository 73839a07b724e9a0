"""Segments: where a projection's result is cut, and weights that are cut alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.passes.programs import Builder, check_values, ops_of
from torch import fx

from rolemesh.compiler.ir.placement import Segment, Segmented, Shard
from rolemesh.passes.segments import feature_segments

aten = torch.ops.aten

Cut = Callable[[Builder, fx.Node], list[fx.Node]]


def slices(b: Builder, y: fx.Node) -> list[fx.Node]:
    view = b.op(aten.reshape.default, y, [3, 2, 14])
    return [
        b.op(aten.slice.Tensor, view, 2, start, end) for start, end in ((0, 8), (8, 11), (-3, 14))
    ]


def split(b: Builder, y: fx.Node) -> list[fx.Node]:
    biased = b.op(aten.add.Tensor, y, b.weight("bias", (14,)))
    return list(b.op(aten.split_with_sizes.default, biased, [8, 3, 3], 1))


def nested(b: Builder, y: fx.Node) -> list[fx.Node]:
    turned = b.op(aten.transpose.int, y, 0, 1)
    first, rest = b.op(aten.split_with_sizes.default, turned, [8, 6], 0)
    wider = b.op(aten.unsqueeze.default, b.op(aten.silu.default, rest), 0)
    return [first, *b.op(aten.split.Tensor, wider, 3, 1)]


def packed(cut: Cut, placement: Segmented, ranks: int) -> tuple[Builder, fx.Node, list[fx.Node]]:
    b = Builder(tp=ranks)
    x, w = b.input("x", (6, 5)), b.weight("w", (5, 14), placement)
    y = b.op(aten.mm.default, x, w)
    return b, y, cut(b, y)


WHOLE_TAIL = Segmented(1, (Segment(8, 1, 4), Segment(3, 1, 0), Segment(3, 1, 0)))
UNEVEN = Segmented(1, (Segment(8, 1, 8), Segment(3, 1, 3), Segment(3, 1, 1)))


@pytest.mark.parametrize("cut", [slices, split, nested])
def test_cuts_are_read_off_the_graph(cut: Cut) -> None:
    _, y, pieces = packed(cut, UNEVEN, 2)
    found = feature_segments(y)
    assert [segment.length for segment in found] == [8, 3, 3]
    assert [segment.value for segment in found] == pieces


@pytest.mark.parametrize("cut", [slices, split, nested])
@pytest.mark.parametrize("placement", [WHOLE_TAIL, UNEVEN])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_packed_weight_needs_no_traffic_to_be_cut(
    cut: Cut, placement: Segmented, ranks: int
) -> None:
    b, _, pieces = packed(cut, placement, ranks)
    dims = {slices: 2, split: 1, nested: 0}
    pinned = Shard(dims[cut], 1, placement.segments[0].size)
    program = check_values(b.program(pieces[0], pinned={0: pinned}))
    # A bias is whole, and each rank cuts its part of it.
    assert ops_of(program) == ("shard" if cut is split else "")


def test_no_segments_where_features_are_read_whole() -> None:
    b = Builder(tp=2)
    y = b.op(aten.mm.default, b.input("x", (6, 5)), b.weight("w", (5, 14)))
    b.op(aten.sum.dim_IntList, y, [1])
    b.op(aten.slice.Tensor, y, 0, 0, 3)  # rows, not features
    assert feature_segments(y) == ()


def test_heads_are_not_cut_into_segments() -> None:
    """Rotary embeddings cut every head in halves: that is within the units of the weight."""
    b = Builder(tp=2)
    y = b.op(aten.mm.default, b.input("x", (6, 5)), b.weight("w", (5, 12)))
    heads = b.op(aten.reshape.default, y, [6, 3, 4])
    b.op(aten.slice.Tensor, heads, 2, 0, 2)
    b.op(aten.slice.Tensor, heads, 2, 2, 4)
    assert feature_segments(y) == ()


def test_groups_of_ranks_read_their_part_without_traffic() -> None:
    """Two key heads on four ranks, expanded to eight query heads."""
    b = Builder(tp=4)
    grouped = Segmented(1, (Segment(2, 1, 2, 2),))
    keys, q = b.input("keys", (3, 2, 5), grouped), b.input("q", (3, 8, 5), Shard(1, 1, 8))
    wide = b.op(aten.expand.default, b.op(aten.unsqueeze.default, keys, 2), [3, 2, 4, 5])
    scores = b.op(aten.mul.Tensor, b.op(aten.reshape.default, wide, [3, 8, 5]), q)
    program = check_values(b.program(scores, pinned={0: Shard(1, 1, 8)}))
    assert ops_of(program) == "part"
