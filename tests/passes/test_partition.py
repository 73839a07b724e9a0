"""Partitioning: the text of small sharded Programs, and what is shared, masked and explained."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Golden
from tests.passes.programs import Builder, check_values, decide, ops_of, traffic

from rolemesh.compiler.ir.dialect import MASK_PAD, MeshOp
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Owner, Shard
from rolemesh.compiler.ir.program import InputKind, Program, origin
from rolemesh.compiler.ir.spec import P
from rolemesh.passes.partition import Partition

aten = torch.ops.aten


def mlp(b: Builder, tokens: P, up: P, down: P) -> Program:
    b.module = "model.layers.0.mlp"
    x = b.input("x", (8, 16), tokens)
    y = b.op(aten.mm.default, x, b.weight("up_proj.weight", (16, 64), up))
    y = b.op(aten.silu.default, y)
    y = b.op(aten.mm.default, y, b.weight("down_proj.weight", (64, 16), down))
    return b.program(b.op(aten.add.Tensor, x, y), pinned={0: tokens}, name="mlp")


def attention(b: Builder, tokens: P, *, by_heads: bool) -> Program:
    """One layer of attention with a cache: q, k and v packed, four heads of two."""
    count = 4
    b.module = "model.layers.0.self_attn"
    width, rows, slots = 2 * count, 4, 6
    x = b.input("x", (rows, width), tokens)
    cache = b.input(
        "cache", (count, slots, 2), P("tp") if by_heads else None, mutated=True,
        kind=InputKind.BUFFER,
    )  # fmt: skip
    heads = Layout((Shard(1, 3, count),)) if by_heads else P()  # [3, heads@tp, 2]
    out = P("tp", units={0: count}) if by_heads else P()
    at = b.input("positions", (rows,), dtype=torch.int64)
    packed = b.op(aten.mm.default, x, b.weight("qkv_proj.weight", (width, 3 * width), heads))
    q, k, v = b.op(aten.split.Tensor, packed, width, 1)
    q, k, v = (
        b.op(aten.transpose.int, b.op(aten.reshape.default, y, [rows, count, 2]), 0, 1)
        for y in (q, k, v)
    )
    keys = b.op(aten.index_copy.default, cache, 1, at, k)
    scores = b.op(aten.bmm.default, q, b.op(aten.transpose.int, keys, 1, 2))
    column = b.op(aten.unsqueeze.default, at, 1)
    mask = b.op(aten.le.Tensor, b.op(aten.arange.default, slots), column)
    scores = b.op(aten.masked_fill.Scalar, scores, b.op(aten.logical_not.default, mask), -100.0)
    weights = b.op(aten._softmax.default, scores, -1, False)
    values = b.op(aten.index_copy.default, b.op(aten.zeros_like.default, cache), 1, at, v)
    y = b.op(aten.transpose.int, b.op(aten.bmm.default, weights, values), 0, 1)
    y = b.op(aten.reshape.default, y, [rows, width])
    y = b.op(aten.mm.default, y, b.weight("o_proj.weight", (width, width), out))
    return b.program(y, keys, mutates={1: "cache"}, pinned={0: tokens}, name="attention")


CASES = {
    "megatron_mlp": lambda: mlp(Builder(tp=2), P(), P(None, "tp"), P("tp")),
    "sequence_parallel_mlp": lambda: mlp(Builder(tp=2), P("tp"), P(None, "tp"), P("tp")),
    "two_axes_mlp": lambda: mlp(Builder(dp=2, tp=2), P("dp"), P(None, "tp"), P("tp")),
    "uneven_mlp": lambda: mlp(Builder(tp=3), P(), P(None, "tp"), P("tp")),
    "tensor_parallel_attention": lambda: attention(Builder(tp=2), P(), by_heads=True),
    "uneven_heads_attention": lambda: attention(Builder(tp=3), P(), by_heads=True),
    "token_parallel_attention": lambda: attention(Builder(tp=2), P("tp"), by_heads=False),
}


@pytest.mark.parametrize("name", CASES)
def test_text(name: str, golden: Golden) -> None:
    golden(f"partition_{name}", str(check_values(CASES[name]())))


@pytest.mark.parametrize("name", CASES)
def test_every_inserted_node_has_a_reason(name: str) -> None:
    program = check_values(CASES[name]())
    inserted = [node for node in program.ops if isinstance(node.target, MeshOp)]
    assert inserted
    assert all(origin(node).reason for node in inserted)


def test_nodes_keep_their_origin_and_name() -> None:
    program = mlp(Builder(tp=2), P(), P(None, "tp"), P("tp"))
    names = [node.name for node in program.ops]
    partitioned = check_values(program)
    kept = [node for node in partitioned.ops if not isinstance(node.target, MeshOp)]
    assert [node.name for node in kept] == names
    assert {origin(node).module for node in partitioned.ops} == {"model.layers.0.mlp"}
    assert partitioned.history == ("propagate", "push_back", "partition", "verify")
    assert partitioned.decisions == {}


def test_the_given_program_is_left_alone() -> None:
    program = mlp(Builder(tp=2), P(), P(None, "tp"), P("tp"))
    before = str(program)
    check_values(program)
    assert str(program) == before


def test_users_share_one_collective() -> None:
    b = Builder(tp=2)
    x = b.input("x", (8, 4), P("tp"))
    outs = [b.op(aten.cumsum.default, x, 0), b.op(aten.flip.default, x, [0])]
    assert traffic(check_values(b.program(*outs, x))) == {"all_gather": 1}


def test_one_collective_for_each_layout() -> None:
    b = Builder(tp=2)
    x = b.input("x", (8, 4), P("tp"))
    y = b.op(aten.cumsum.default, x, 0)
    program = check_values(b.program(y, x, x, pinned={2: P(None, "tp")}))
    assert traffic(program) == {"all_gather": 1, "all_to_all": 1}


@pytest.mark.parametrize(
    ("op", "value"),
    [(aten.sum.dim_IntList, 0), (aten.amax.default, -float("inf")), (aten.amin.default, None)],
)
def test_pads_are_filled_before_a_reduction(op: torch._ops.OpOverload, value: float | None) -> None:
    b = Builder(tp=2)
    x = b.input("x", (5, 4), P("tp"))
    program = check_values(b.program(b.op(op, x, [0])))
    (mask,) = (node for node in program.ops if node.target is MASK_PAD)
    assert mask.kwargs["shard"] == Shard(0, 1, 5)
    found = mask.kwargs["value"]
    assert isinstance(found, float | int)
    if value == 0:
        assert found == 0
    else:
        assert abs(found) >= torch.finfo(torch.float32).max


def test_even_chunks_have_no_pads_to_fill() -> None:
    b = Builder(tp=2)
    program = b.program(b.op(aten.sum.dim_IntList, b.input("x", (6, 4), P("tp")), [0]))
    assert ops_of(check_values(program)) == "all_reduce"


def test_joint_pads_are_filled_once() -> None:
    b = Builder(dp=2, tp=2)
    x = b.input("x", (6, 4), P(("dp", "tp")))
    program = check_values(b.program(b.op(aten.sum.dim_IntList, x, [0])))
    assert ops_of(program) == "mask_pad all_reduce all_reduce"


def test_integers_use_their_own_limits() -> None:
    b = Builder(tp=2)
    x = b.input("x", (5,), P("tp"), dtype=torch.int64)
    program = check_values(b.program(b.op(aten.amax.default, x, [0])))
    (mask,) = (node for node in program.ops if node.target is MASK_PAD)
    assert mask.kwargs["value"] == torch.iinfo(torch.int64).min


def test_sizes_in_arguments_are_local() -> None:
    b = Builder(tp=2)
    x = b.input("x", (2, 6, 4), P(None, "tp"))
    y = b.op(aten.reshape.default, x, [2, 24])
    y = b.op(aten.expand.default, b.op(aten.unsqueeze.default, y, 0), [3, 2, 24])
    program = check_values(b.program(y, pinned={0: P(None, None, "tp", units={2: 6})}))
    sizes = [node.args[1] for node in program.ops if isinstance(node.args[1], list)]
    assert sizes == [[2, 12], [3, 2, 12]]


def test_an_op_that_reads_only_a_type_makes_its_own_size() -> None:
    """Its operand is a chunk; the result is whole."""
    b = Builder(tp=2)
    x = b.input("x", (6, 4), P("tp"))
    y = b.op(aten.cumsum.default, b.op(aten.ones_like.default, x), 0)
    assert ops_of(check_values(b.program(y))) == ""


def test_a_weight_on_its_owner_is_broadcast_once() -> None:
    b = Builder(tp=2)
    x, w = b.input("x", (8, 4), P("tp")), b.weight("w", (4, 4), Owner(1))
    y = b.op(aten.mm.default, b.op(aten.mm.default, x, w), w)
    program = check_values(b.program(y, pinned={0: P("tp")}))
    assert ops_of(program) == "broadcast"


def test_an_owned_input_that_is_written_stays_with_its_owner() -> None:
    b = Builder(tp=2)
    w = b.input("w", (4, 4), Owner(1), mutated=True)
    y = b.op(aten.mul.Tensor, w, 2.0)
    program = check_values(b.program(y, mutates={0: "w"}))
    assert ops_of(program) == "broadcast"


def test_an_input_that_is_an_output() -> None:
    b = Builder(tp=2)
    x = b.input("x", (6, 4), P("tp"))
    program = check_values(b.program(x, x, pinned={1: P("tp")}))
    assert ops_of(program) == "all_gather"


def test_a_constant_output_stays() -> None:
    b = Builder(tp=2)
    x = b.input("x", (6, 4), P("tp"))
    program = decide(b.program(x))
    program.graph.output_node().args = ((x, None),)
    outputs = (*program.outputs, program.outputs[0])
    program = Partition().apply(program.after("test", outputs=outputs))
    assert program.results[1] is None


def test_rows_of_a_table_within_a_merged_dim() -> None:
    """Rows looked up on one axis, tokens cut on the other, merged into one dim."""
    b = Builder(dp=2, tp=2)
    ids = b.input("ids", (6,), P("dp"), dtype=torch.int64)
    rows = b.op(aten.index.Tensor, b.weight("experts", (4, 3), P("tp")), [ids])
    x = b.input("x", (2, 6, 3), P(None, "dp"))
    y = b.op(aten.reshape.default, b.op(aten.mul.Tensor, x, rows), [12, 3])
    program = check_values(b.program(b.op(aten.relu.default, y)))
    assert "owned_rows mask_rows" in ops_of(program)


def test_layouts_of_the_same_distribution_need_no_collective() -> None:
    b = Builder(dp=2, tp=2)
    x = b.input("x", (8, 3), Layout((Shard(0, 1, 2), Shard(0, 2, 4))))
    program = check_values(b.program(x, pinned={0: P(("dp", "tp"))}))
    assert ops_of(program) == ""
