"""Propagation: what each op is decided to do, and why."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Golden
from tests.passes.programs import Builder, check_values, decide, node_named, ops_of, traffic

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import REPLICATE, Partial, Routed, Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.rule import Linear, Lookup, Route, Split, Whole
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.cost import CostTable
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.rules.registry import MissingRuleWarning

aten = torch.ops.aten


def decisions_text(program: Program) -> str:
    """One line an op: its layout, its choice on each axis, and why."""
    lines = []
    for node in program.ops:
        if node not in program.decisions:
            continue
        decision = program.decisions[node]
        kind = program.layout(node).text(node.meta["type"], program.the_mesh)
        reasons = "; ".join(
            f"{axis}: {type(choice).__name__.lower()}" + (f" ({reason})" if reason else "")
            for axis, choice, reason in zip(
                program.the_mesh.names, decision.choices, decision.reasons, strict=True
            )
        )
        lines.append(f"{node.name:<14} {kind:<28} {reasons}")
    return "\n".join(lines)


def mlp(b: Builder, tokens: P, up: P, down: P, *, width: int = 16) -> Program:
    """`x + silu(x @ up) @ down`, the residual block of a transformer."""
    x = b.input("x", (8, width), tokens)
    y = b.op(aten.mm.default, x, b.weight("up", (width, 4 * width), up))
    y = b.op(aten.silu.default, y)
    y = b.op(aten.mm.default, y, b.weight("down", (4 * width, width), down))
    return b.program(b.op(aten.add.Tensor, x, y), pinned={0: tokens}, name="mlp")


MLPS = {
    "megatron": ({"tp": 2}, P(), P(None, "tp"), P("tp")),
    "sequence_parallel": ({"tp": 2}, P("tp"), P(None, "tp"), P("tp")),
    "data_parallel": ({"tp": 2}, P("tp"), P(), P()),
    "two_axes": ({"dp": 2, "tp": 2}, P("dp"), P(None, "tp"), P("tp")),
}


@pytest.mark.parametrize("name", MLPS)
def test_decisions_of_an_mlp(name: str, golden: Golden) -> None:
    axes, *specs = MLPS[name]
    golden(f"propagate_{name}", decisions_text(Propagate().apply(mlp(Builder(**axes), *specs))))


def test_megatron_has_one_all_reduce() -> None:
    program = check_values(mlp(Builder(tp=2), P(), P(None, "tp"), P("tp")))
    assert traffic(program) == {"all_reduce": 1}


def test_sequence_parallel_gathers_and_scatters() -> None:
    program = check_values(mlp(Builder(tp=2), P("tp"), P(None, "tp"), P("tp")))
    assert ops_of(program) == "all_gather reduce_scatter"


def test_data_parallel_moves_nothing() -> None:
    program = check_values(mlp(Builder(tp=2), P("tp"), P(), P()))
    assert ops_of(program) == ""


def test_data_and_tensor_parallel_reduce_over_one_axis() -> None:
    program = check_values(mlp(Builder(dp=2, tp=2), P("dp"), P(None, "tp"), P("tp")))
    assert ops_of(program) == "all_reduce"
    (reduce,) = (n for n in program.ops if ops_of(program) and "axes" in n.kwargs)
    assert reduce.kwargs["axes"] == ("tp",)


def test_a_bias_after_a_pending_sum_is_added_once() -> None:
    b = Builder(tp=2)
    x, w = b.input("x", (4, 6), P(None, "tp")), b.weight("w", (6, 8), P("tp"))
    y = b.op(aten.add.Tensor, b.op(aten.mm.default, x, w), b.weight("bias", (8,)))
    decided = decide(program := b.program(y))
    assert decided.layout(node_named(decided, "mm_default")) == Layout((Partial(),))
    assert decided.layout(node_named(decided, "add_tensor")).is_replicated
    assert traffic(check_values(program)) == {"all_reduce": 1}


def test_a_fused_bias_keeps_the_summed_dim_whole() -> None:
    b = Builder(tp=2)
    x, w = b.input("x", (4, 6), P(None, "tp")), b.weight("w", (6, 8), P("tp"))
    program = b.program(b.op(aten.addmm.default, b.weight("bias", (8,)), x, w))
    assert not any(
        isinstance(p, Partial) for entry in decide(program).layouts.values() for p in
        entry[0].placements
    )  # fmt: skip
    check_values(program)


def test_a_pending_sum_with_two_users_is_resolved_once() -> None:
    b = Builder(tp=2)
    x, w = b.input("x", (4, 6), P(None, "tp")), b.weight("w", (6, 8), P("tp"))
    y = b.op(aten.mm.default, x, w)
    program = b.program(b.op(aten.neg.default, y), b.op(aten.mul.Tensor, y, 3.0))
    assert traffic(check_values(program)) == {"all_reduce": 1}


def test_a_pending_sum_is_resolved_before_it_is_cut() -> None:
    b = Builder(tp=2)
    x, w = b.input("x", (4, 6), P(None, "tp")), b.weight("w", (6, 8), P("tp"))
    y = b.op(aten.mm.default, x, w)
    program = b.program(*b.op(aten.split_with_sizes.default, y, [1, 4, 3], 1))
    assert traffic(check_values(program)) == {"all_reduce": 1}


def test_a_pending_sum_passes_linear_ops() -> None:
    b = Builder(tp=2)
    x, w = b.input("x", (4, 6), P(None, "tp")), b.weight("w", (6, 8), P("tp"))
    y = b.op(aten.mm.default, x, w)
    y = b.op(aten.reshape.default, b.op(aten.mul.Tensor, y, 0.5), [2, 2, 8])
    y = b.op(aten.sum.dim_IntList, y, [1])
    program = b.program(y)
    decided = decide(program)
    assert isinstance(decided.decisions[y].choices[0], Linear)
    (moved,) = (n for n in check_values(program).ops if "op" in n.kwargs)
    assert moved.meta["type"].shape == (2, 8)  # after the sum, where the value is smallest


def test_the_sum_of_two_pending_sums_is_pending() -> None:
    b = Builder(tp=2)
    x = b.input("x", (4, 6), P(None, "tp"))
    terms = [b.op(aten.mm.default, x, b.weight(f"w{i}", (6, 8), P("tp"))) for i in range(2)]
    y = b.op(aten.add.Tensor, *terms)
    program = b.program(y)
    assert decide(program).layout(y) == Layout((Partial(),))
    assert traffic(check_values(program)) == {"all_reduce": 1}


def test_a_pending_maximum_passes_nothing() -> None:
    b = Builder(tp=2)
    x = b.input("x", (4, 6), P(None, "tp"))
    top = b.op(aten.amax.default, x, [1])
    program = b.program(b.op(aten.neg.default, top))
    decided = decide(program)
    assert decided.layout(top) == Layout((Partial("max"),))
    assert isinstance(decided.decisions[node_named(decided, "neg_default")].choices[0], Whole)
    assert traffic(check_values(program)) == {"all_reduce": 1}


def test_a_pending_sum_goes_where_the_tokens_are() -> None:
    b = Builder(tp=2)
    x = b.input("x", (4, 6), P("tp"))
    y = b.op(aten.mm.default, x, b.weight("up", (6, 8), P(None, "tp")))
    y = b.op(aten.mm.default, y, b.weight("down", (8, 6), P("tp")))
    program = b.program(b.op(aten.relu.default, y))
    assert ops_of(check_values(program)) == "all_gather reduce_scatter all_gather"


@pytest.mark.parametrize("dim", [0, 1])
def test_a_weight_sharded_on_either_dim(dim: int) -> None:
    """Stored `[out, in]` and transposed in the graph, as `nn.Linear` does."""
    b = Builder(tp=2)
    x = b.input("x", (4, 60))
    w = b.weight("w", (8, 60), P("tp") if dim == 0 else P(None, "tp"))
    y = b.op(aten.mm.default, x, b.op(aten.t.default, w))
    program = b.program(y)
    want = Shard(1, 1, 8) if dim == 0 else Partial()
    assert decide(program).layout(y) == Layout((want,))
    check_values(program)


def test_heads_follow_through_a_reshape() -> None:
    b = Builder(tp=4)
    x = b.input("x", (2, 3, 60), P(None, None, "tp", units={2: 10}))
    y = b.op(aten.reshape.default, x, [2, 3, 10, 6])
    y = b.op(aten.transpose.int, y, 1, 2)
    program = b.program(y, pinned={0: P(None, "tp")})
    decided = decide(program)
    assert decided.layout(y) == Layout((Shard(1, 1, 10),))
    assert ops_of(check_values(program)) == ""


def test_a_table_cut_by_rows_is_looked_up_in_place() -> None:
    b = Builder(tp=2)
    ids = b.input("ids", (5,), dtype=torch.int64)
    rows = b.op(aten.index.Tensor, b.weight("experts", (4, 6), P("tp")), [ids])
    y = b.op(aten.relu.default, rows)
    program = b.program(y)
    decided = decide(program)
    assert isinstance(decided.decisions[rows].choices[0], Lookup)
    assert isinstance(decided.decisions[y].choices[0], Route)
    assert decided.layout(y) == Layout((Routed("ids:ids:4", 0, 1, 5),))
    assert ops_of(check_values(program)) == "take owned_rows mask_rows all_reduce"


def test_a_vocabulary_cut_by_rows_gives_a_pending_sum() -> None:
    b = Builder(tp=2)
    ids = b.input("ids", (2, 3), dtype=torch.int64)
    y = b.op(aten.embedding.default, b.weight("table", (50, 6), P("tp")), ids)
    program = b.program(y)
    assert decide(program).layout(y) == Layout((Partial(),))
    assert ops_of(check_values(program)) == "take all_reduce"


def test_a_mutated_input_keeps_its_layout() -> None:
    b = Builder(tp=2)
    cache = b.input("cache", (2, 8, 4), P("tp"), mutated=True)
    new = b.input("new", (2, 1, 4))
    at = b.input("at", (1,), dtype=torch.int64)
    y = b.op(aten.index_copy.default, cache, 1, at, new)
    program = b.program(y, mutates={0: "cache"})
    assert decide(program).layout(y) == Layout((Shard(0, 1, 2),))
    assert ops_of(check_values(program)) == "shard"


def test_a_pinned_output_is_made_where_it_must_be() -> None:
    b = Builder(tp=2)
    y = b.op(aten.relu.default, b.input("x", (4, 6)))
    program = b.program(y, pinned={0: P("tp")})
    decided = decide(program)
    assert decided.decisions[y].choices == (Split(0, 1, 4),)
    assert ops_of(check_values(program)) == "shard"


def test_an_op_that_cannot_give_its_pin_is_cut_afterwards() -> None:
    b = Builder(tp=2)
    y = b.op(aten.cumsum.default, b.input("x", (4, 6)), 1)
    program = b.program(y, pinned={0: P(None, "tp")})
    assert decide(program).decisions[y].choices == (Whole(),)
    assert ops_of(check_values(program)) == "shard"


def test_two_axes_share_a_dim_as_digits() -> None:
    b = Builder(dp=2, tp=2)
    x = b.input("x", (8, 3), P(("dp", "tp")))
    y = b.op(aten.relu.default, x)
    program = b.program(y, pinned={0: P(("dp", "tp"))})
    assert decide(program).layout(y) == Layout((Shard(0, 1, 8), Shard(0, 1, 8)))
    assert ops_of(check_values(program)) == ""


def test_axes_do_not_take_overlapping_digits() -> None:
    b = Builder(dp=2, tp=2)
    x, y = b.input("x", (4, 3), P("dp")), b.input("y", (4, 3), P("tp"))
    z = b.op(aten.add.Tensor, x, y)
    program = b.program(z)
    layout = decide(program).layout(z)
    layout.check((4, 3), program.the_mesh)
    check_values(program)


def test_prices_decide() -> None:
    """Whether the activations or the weight move depends on what an exchange costs."""
    b = Builder(tp=2)
    x, w = b.input("x", (64, 48), P("tp")), b.weight("w", (48, 64), P("tp"))
    y = b.op(aten.mm.default, x, w)
    program = b.program(y)

    def factor(costs: CostTable) -> str:
        (choice,) = Propagate(costs).apply(program).decisions[y].choices
        return "mkn"[choice.factor] if isinstance(choice, Split) else "whole"

    assert factor(CostTable()) == "m"  # gathers the weight
    assert factor(CostTable(all_gather=100)) == "k"  # exchanges x, and sums the products


def test_reasons_name_the_alternative() -> None:
    b = Builder(tp=2)
    x, w = b.input("x", (64, 16), P("tp")), b.weight("w", (16, 16), P(None, "tp"))
    y = b.op(aten.mm.default, x, w)
    (reason,) = Propagate().apply(b.program(y)).decisions[y].reasons
    assert reason.startswith("follows %x; following w ")


def test_an_op_without_a_rule_runs_whole() -> None:
    b = Builder(tp=2)
    x = b.input("x", (4, 4), P("tp"))
    y = b.op(aten.linalg_matrix_exp.default, x)
    program = b.program(y)
    with pytest.warns(MissingRuleWarning, match=r"\[RM010\] aten.linalg_matrix_exp"):
        decided = Propagate().apply(program)
    assert decided.layout(y).is_replicated
    assert decided.decisions[y].choices == (Whole(),)


def test_every_value_has_a_layout_and_every_op_a_decision() -> None:
    program = mlp(Builder(dp=2, tp=2), P("dp"), P(None, "tp"), P("tp"))
    decided = Propagate().apply(program)
    assert set(decided.layouts) == {n for n in program.graph.nodes if n.op != "output"}
    assert set(decided.decisions) == set(program.ops)
    assert decided.history == ("propagate",)
    assert program.decisions == {}


def test_results_of_an_op_with_several() -> None:
    b = Builder(tp=2)
    first, second = b.op(aten.split.Tensor, b.input("x", (6, 8), P("tp")), 4, 1)
    program = b.program(first, second)
    decided = decide(program)
    assert decided.layout(first) == decided.layout(second) == Layout((Shard(0, 1, 6),))
    check_values(program)


def test_an_axis_of_one_rank_does_nothing() -> None:
    program = mlp(Builder(dp=1, tp=2), P("dp"), P(None, "tp"), P(("dp", "tp")))
    decided = decide(program)
    assert all(isinstance(d.choices[0], Whole) for d in decided.decisions.values())
    assert ops_of(check_values(program)) == "all_reduce"
    alone = mlp(Builder(tp=1), P("tp"), P(None, "tp"), P("tp"))
    assert ops_of(check_values(alone)) == ""


def test_replicated_programs_stay_replicated() -> None:
    program = mlp(Builder(tp=2), P(), P(), P())
    decided = decide(program)
    assert all(layout == (Layout((REPLICATE,)),) for layout in decided.layouts.values())
    assert all(d.reasons == ("",) for d in decided.decisions.values())


@pytest.mark.parametrize("op", [aten.amax.default, aten.sum.dim_IntList])
def test_rows_of_other_ranks_do_not_count_in_a_reduction(op: torch._ops.OpOverload) -> None:
    """Looked-up rows are valid on one rank: a sum masks the others, a maximum needs all rows."""
    b = Builder(tp=2)
    ids = b.input("ids", (5,), dtype=torch.int64)
    rows = b.op(aten.index.Tensor, b.weight("experts", (40, 6), P("tp")), [ids])
    y = b.op(op, rows, [0])
    program = b.program(y)
    (choice,) = decide(program).decisions[y].choices
    assert isinstance(choice, Whole if op is aten.amax.default else Linear)
    check_values(program)


def test_chunks_do_not_end_within_a_row_of_one_rank() -> None:
    """Five rows of five, of which three ranks would get nine elements each."""
    b = Builder(dp=3, tp=2)
    ids = b.input("ids", (5,), dtype=torch.int64)
    rows = b.op(aten.index.Tensor, b.weight("experts", (20, 5), P("tp")), [ids])
    flat = b.op(aten.reshape.default, rows, [25])
    y = b.op(aten.mul.Tensor, flat, b.input("x", (25,), P("dp")))
    check_values(b.program(y, pinned={0: P("dp")}))


def test_a_third_axis_does_not_take_a_digit_of_two_joint_ones() -> None:
    b = Builder(pp=2, dp=2, tp=2)
    x = b.input("x", (8, 3), P(("pp", "dp")))
    y = b.input("y", (8, 3), Layout((REPLICATE, REPLICATE, Shard(0, 2, 4))))
    z = b.op(aten.add.Tensor, x, y)
    program = b.program(z)
    decide(program).layout(z).check((8, 3), program.the_mesh)
    check_values(program)


def test_equal_layers_get_equal_decisions() -> None:
    """What is decided once for a layer holds for the next: with its own names in the reasons."""
    b = Builder(tp=2)
    x = b.input("x", (64, 16), P("tp"))
    products = []
    for layer in range(3):
        x = b.op(aten.mm.default, x, b.weight(f"layers.{layer}.w", (16, 16), P(None, "tp")))
        products.append(x)
    decided = Propagate().apply(b.program(x))
    decisions = [decided.decisions[node] for node in products]
    assert len({decision.choices for decision in decisions}) == 1
    assert all(decision.rule is decisions[0].rule for decision in decisions)
    assert [f"{n}.w" in d.reasons[0] for n, d in enumerate(decisions)] == [True] * 3
