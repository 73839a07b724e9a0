"""Push-back: producers make what their users want, where that is free or saves traffic."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Golden
from tests.passes.programs import Builder, check_values, decide, ops_of, traffic
from torch import fx

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.rule import Split, Whole
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.cost import CostTable
from rolemesh.passes.partition import Partition
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack

aten = torch.ops.aten


def masked(b: Builder) -> tuple[Program, list[fx.Node]]:
    """A causal mask made from positions, and scores whose rows are cut."""
    rows = b.op(aten.unsqueeze.default, b.op(aten.arange.default, 8), 1)
    mask = b.op(aten.le.Tensor, b.op(aten.arange.default, 8), rows)
    scores = b.op(aten.masked_fill.Scalar, b.input("scores", (8, 8), P("tp")), mask, 0.0)
    return b.program(scores, pinned={0: P("tp")}), [rows, mask]


def test_a_mask_is_made_for_the_rows_at_hand(golden: Golden) -> None:
    program, made = masked(Builder(tp=2))
    before = Propagate().apply(program)
    assert all(before.layout(node).is_replicated for node in made)
    after = decide(program)
    assert [after.layout(node) for node in made] == [Layout((Shard(0, 1, 8),))] * 2
    assert after.decisions[made[1]].reasons == ("all users want this chunk",)
    golden("push_back_mask", str(check_values(program)))


def test_a_mask_is_whole_without_it() -> None:
    program, made = masked(Builder(tp=2))
    assert decide(program).decisions[made[1]].choices == (Split(0, 1, 8),)
    assert ops_of(check_values(program)) == "shard"  # of the range itself


def test_users_that_want_different_chunks() -> None:
    b = Builder(tp=2)
    x = b.op(aten.relu.default, b.input("x", (8, 8)))
    y = b.op(aten.add.Tensor, x, b.input("rows", (8, 8), P("tp")))
    z = b.op(aten.add.Tensor, x, b.input("columns", (8, 8), P(None, "tp")))
    program = b.program(y, z, pinned={0: P("tp"), 1: P(None, "tp")})
    assert decide(program).layout(x).is_replicated
    assert ops_of(check_values(program)) == "shard shard"


def test_a_user_that_wants_it_whole() -> None:
    b = Builder(tp=2)
    x = b.op(aten.relu.default, b.input("x", (8, 8)))
    y = b.op(aten.add.Tensor, x, b.input("rows", (8, 8), P("tp")))
    program = b.program(x, y, pinned={1: P("tp")})
    assert decide(program).layout(x).is_replicated
    check_values(program)


def test_results_of_one_op_agree() -> None:
    b = Builder(tp=2)
    parts = b.op(aten.split.Tensor, b.op(aten.relu.default, b.input("x", (8, 8))), 4, 1)
    outs = [
        b.op(aten.add.Tensor, part, b.input(f"y{i}", (8, 4), P("tp")))
        for i, part in enumerate(parts)
    ]
    program = b.program(*outs, pinned={0: P("tp"), 1: P("tp")})
    assert [decide(program).layout(part) for part in parts] == [Layout((Shard(0, 1, 8),))] * 2
    assert ops_of(check_values(program)) == "shard"


def test_results_of_one_op_disagree() -> None:
    b = Builder(tp=2)
    first, second = b.op(aten.split.Tensor, b.op(aten.relu.default, b.input("x", (8, 8))), 4, 1)
    y = b.op(aten.add.Tensor, first, b.input("y", (8, 4), P("tp")))
    z = b.op(aten.add.Tensor, second, b.input("z", (8, 4), P(None, "tp")))
    program = b.program(y, z, pinned={0: P("tp"), 1: P(None, "tp")})
    assert decide(program).layout(first).is_replicated
    check_values(program)


def test_what_cannot_be_cut_is_cut_afterwards() -> None:
    b = Builder(tp=2)
    x = b.op(aten.cumsum.default, b.input("x", (8, 8)), 0)
    y = b.op(aten.add.Tensor, x, b.input("rows", (8, 8), P("tp")))
    program = b.program(y, pinned={0: P("tp")})
    assert isinstance(decide(program).decisions[x].choices[0], Whole)
    assert ops_of(check_values(program)) == "shard"


def test_a_chunk_is_not_bought_with_traffic() -> None:
    """The operand lies in another layout: exchanging it would cost, and it is needed whole too."""
    b = Builder(tp=2)
    source = b.input("x", (8, 8), P(None, "tp"))
    x = b.op(aten.cumsum.default, source, 1)
    y = b.op(aten.add.Tensor, x, b.input("rows", (8, 8), P("tp")))
    program = b.program(y, pinned={0: P("tp")})
    check_values(program)
    decision = decide(program).decisions[x]
    if isinstance(decision.choices[0], Split):
        assert decision.reasons != ("all users want this chunk",)


def test_a_value_is_gathered_before_it_is_repeated() -> None:
    b = Builder(tp=2)
    x = b.input("x", (8, 4), P("tp"))
    y = b.op(aten.expand.default, b.op(aten.unsqueeze.default, x, 1), [8, 6, 4])
    y = b.op(aten.cumsum.default, b.op(aten.reshape.default, y, [48, 4]), 0)
    program = b.program(y)
    partitioned = check_values(program)
    assert traffic(partitioned) == {"all_gather": 1}
    (gather,) = (node for node in partitioned.ops if "shard" in node.kwargs)
    assert gather.meta["type"].shape == (8, 4)


def test_each_axis_is_pushed_alone() -> None:
    b = Builder(dp=2, tp=2)
    x = b.op(aten.relu.default, b.input("x", (8, 8)))
    y = b.op(aten.add.Tensor, x, b.input("y", (8, 8), P("dp", "tp")))
    program = b.program(y, pinned={0: P("dp", "tp")})
    assert decide(program).layout(x) == Layout((Shard(0, 1, 8), Shard(1, 1, 8)))
    assert ops_of(check_values(program)) == "shard shard"


@pytest.mark.parametrize("spec", [P(("dp", "tp")), P(("tp", "dp"))])
def test_two_axes_on_one_dim(spec: P) -> None:
    b = Builder(dp=2, tp=2)
    x = b.op(aten.relu.default, b.input("x", (8, 8)))
    y = b.op(aten.add.Tensor, x, b.input("y", (8, 8), spec))
    check_values(b.program(y, pinned={0: spec}))


def test_it_adds_only_itself_to_the_history() -> None:
    program, _ = masked(Builder(tp=2))
    decided = Propagate().apply(program)
    after = PushBack().apply(decided)
    assert after.history == ("propagate", "push_back")
    assert after.graph is decided.graph
    assert decided.layouts is not after.layouts


def expanded(b: Builder) -> tuple[Program, fx.Node]:
    """Rows written to a cache, all of which are expanded by a weight, and read whole."""
    cache = b.input("cache", (10, 6), mutated=True)
    at = b.input("positions", (4,), dtype=torch.int64)
    keys = b.op(aten.index_copy.default, cache, 0, at, b.input("rows", (4, 6), P("tp")))
    product = b.op(aten.mm.default, keys, b.weight("up.weight", (6, 7)))
    scores = b.op(aten.mm.default, b.input("query", (8, 10), P("tp")), product)
    return b.program(keys, scores, mutates={0: "cache"}, pinned={1: P("tp")}), product


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_product_of_a_cache_is_made_in_parts_where_bytes_are_cheap(ranks: int) -> None:
    """10 x 6 x 7 x 2 operations, of which a rank saves the part that it receives of 280 bytes."""
    program, product = expanded(Builder(tp=ranks))
    before = Propagate().apply(program)
    assert before.layout(product).is_replicated
    received = 280 * (ranks - 1) / ranks if ranks == 2 else 12 * 28 * 2 / 3
    price = 840 * (ranks - 1) / ranks / received
    for factor, parts in ((0.99, True), (1.01, False)):
        after = PushBack(CostTable(flops_per_byte=price * factor)).apply(before)
        assert after.layout(product).is_replicated is not parts
        partitioned = Partition().apply(after)
        assert traffic(partitioned)["all_gather"] == (2 if parts else 1)
