"""Spread: the layouts that follow from a state's, through the rules of the ops around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.passes.programs import Builder, Spec, check_values, ops_of
from torch import fx

from rolemesh.compiler.ir.placement import REPLICATE, Placement, Segment, Segmented, Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.passes.rules import default_rules
from rolemesh.passes.spread import spread

aten = torch.ops.aten

HEADS, WIDTH, GROUPS, STATE, HIDDEN, BATCH = 8, 3, 2, 5, 7, 2
INNER, SHARED = HEADS * WIDTH, GROUPS * STATE


def mixer(b: Builder) -> Program:
    """A state by heads: a packed projection, a convolution, and keys that four heads share."""
    x = b.input("x", (BATCH, HIDDEN))
    projected = b.op(aten.mm.default, x, b.weight("w_in", (HIDDEN, INNER + SHARED + HEADS + 2)))
    values, step, gate = (
        b.op(aten.slice.Tensor, projected, 1, start, end)
        for start, end in ((0, 34), (34, 42), (42, 44))
    )
    wide = b.op(aten.unsqueeze.default, values, 2)
    weight, bias = b.weight("conv", (INNER + SHARED, 1, 1)), b.weight("bias", (INNER + SHARED,))
    mixed = b.op(
        aten.convolution.default, wide, weight, bias, [1], [0], [1], False, [0], INNER + SHARED
    )
    flat = b.op(aten.reshape.default, mixed, [BATCH, INNER + SHARED])
    inner, keys = b.op(aten.split_with_sizes.default, flat, [INNER, SHARED], 1)
    inner = b.op(aten.reshape.default, inner, [BATCH, HEADS, WIDTH, 1])
    keys = b.op(aten.reshape.default, keys, [BATCH, GROUPS, 1, STATE])
    keys = b.op(aten.expand.default, keys, [BATCH, GROUPS, HEADS // GROUPS, STATE])
    keys = b.op(aten.reshape.default, keys, [BATCH, HEADS, 1, STATE])
    state = b.input("state", (BATCH, HEADS, WIDTH, STATE), mutated=True)
    decay = b.op(aten.add.Tensor, step, b.weight("decay", (HEADS,)))
    decay = b.op(aten.reshape.default, decay, [BATCH, HEADS, 1, 1])
    new = b.op(aten.add.Tensor, b.op(aten.mul.Tensor, state, decay), inner)
    new = b.op(aten.mul.Tensor, new, keys)
    read = b.op(aten.sum.dim_IntList, new, [3])
    read = b.op(aten.reshape.default, read, [BATCH, INNER])
    out = b.op(aten.mm.default, read, b.weight("w_out", (INNER, HIDDEN)))
    total = b.op(aten.add.Tensor, out, b.op(aten.sum.dim_IntList, gate, [1], True))
    return b.program(new, total, mutates={0: "state"})


def found(program: Program, start: str, placement: Placement, ranks: int) -> dict[str, Placement]:
    by_name = {node.name: node for node in program.graph.nodes}
    follows = spread(program, by_name[start], placement, ranks, default_rules())
    return {n.name: placement for n, placement in follows.items() if n.op == "placeholder"}


SHARES = {2: 1, 4: 2, 8: 4}
"""Neighbours of a rank, itself included, with one group of keys."""


@pytest.mark.parametrize("ranks", sorted(SHARES))
def test_weights_follow_a_state(ranks: int) -> None:
    program = mixer(Builder(tp=ranks))
    follows = found(program, "state", Shard(1, 1, HEADS), ranks)
    channels = (Segment(INNER, 1, HEADS), Segment(SHARED, 1, GROUPS, SHARES[ranks]))
    packed = (*channels, Segment(HEADS, 1, HEADS), Segment(2, 1, 0))
    evened = {
        name: placement.evened(ranks) if isinstance(placement, Segmented) else placement
        for name, placement in follows.items()
    }
    assert evened == {
        "state": Shard(1, 1, HEADS),
        "w_in": Segmented(1, packed).evened(ranks),
        "conv": Segmented(0, channels).evened(ranks),
        "bias": Segmented(0, channels).evened(ranks),
        "decay": Shard(0, 1, HEADS),
        "w_out": Shard(0, 1, HEADS),
    }


def test_keys_of_groups_that_ranks_do_not_share_evenly_stay_whole() -> None:
    follows = found(mixer(Builder(tp=3)), "state", Shard(1, 1, HEADS), 3)
    channels = (Segment(INNER, 1, HEADS), Segment(SHARED, 1, 0))
    assert follows["conv"] == Segmented(0, channels)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_a_state_by_heads_costs_one_sum(ranks: int) -> None:
    follows = found(mixer(Builder(tp=ranks)), "state", Shard(1, 1, HEADS), ranks)
    program = mixer(_Laid(follows, tp=ranks))
    assert [op for op in ops_of(check_values(program)).split() if "all_" in op] == ["all_reduce"]


class _Laid(Builder):
    """A builder whose inputs lie as a table says."""

    def __init__(self, layouts: dict[str, Placement], **axes: int) -> None:
        super().__init__(**axes)
        self.table = layouts

    def input(
        self, name: str, shape: Sequence[int], spec: Spec | None = None, **options: Any
    ) -> fx.Node:
        return super().input(name, shape, self.table.get(name, REPLICATE), **options)


def test_a_state_that_is_only_written_follows_its_new_value() -> None:
    b = Builder(tp=2)
    b.input("state", (3, 4), mutated=True)
    w = b.weight("w", (5, 4))
    new = b.op(aten.mm.default, b.input("x", (3, 5)), w)
    program = b.program(new, mutates={0: "state"})
    assert found(program, "w", Shard(1, 1, 4), 2)["state"] == Shard(1, 1, 4)
    assert found(program, "state", Shard(1, 1, 4), 2)["w"] == Shard(1, 1, 4)


def test_what_an_op_joins_follows_the_whole() -> None:
    b = Builder(tp=2)
    parts = [b.weight("a", (3, 8)), b.weight("b", (3, 4)), b.weight("c", (3, 1))]
    joined = b.op(aten.cat.default, parts, 1)
    program = b.program(joined)
    whole = Segmented(1, (Segment(8, 1, 4), Segment(4, 1, 4), Segment(1, 1, 0)))
    assert found(program, joined.name, whole, 2) == {"a": Shard(1, 1, 4), "b": Shard(1, 1, 4)}


@pytest.mark.parametrize("ranks", [2, 3])
def test_joined_features_need_no_traffic(ranks: int) -> None:
    b = Builder(tp=ranks)
    parts: list[fx.Node] = [
        b.input("a", (3, 8), Shard(1, 1, 4)),
        b.input("b", (3, 6), Shard(1, 1, 3)),
        b.input("c", (3, 1)),
    ]
    whole = Segmented(1, (Segment(8, 1, 4), Segment(6, 1, 3), Segment(1, 1, 0)))
    joined = b.op(aten.cat.default, parts, 1)
    program = check_values(b.program(joined, pinned={0: whole}))
    assert ops_of(program) == ""
