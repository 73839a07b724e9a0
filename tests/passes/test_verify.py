"""Verification: right Programs pass, and each way of breaking one is caught.

A mutation changes one thing of a right Program by hand: a layout, an argument, or a node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from tests.passes.programs import Builder, node_named, partition, with_layout
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Partial, Placement, Routed, Shard
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.gate import SWIGLU
from rolemesh.passes.verify import Verify

aten = torch.ops.aten


def refused(program: Program) -> str:
    with pytest.raises(RolemeshError) as caught:
        Verify().apply(program)
    return str(caught.value)


def mlp() -> Program:
    """All_gather, two products, reduce_scatter, a residual sum."""
    b = Builder(tp=2)
    b.module = "mlp"
    x = b.input("x", (8, 16), P("tp"))
    y = b.op(aten.mm.default, x, b.weight("up", (16, 64), P(None, "tp")))
    y = b.op(aten.mm.default, b.op(aten.relu.default, y), b.weight("down", (64, 16), P("tp")))
    return partition(b.program(b.op(aten.add.Tensor, x, y), pinned={0: P("tp")}))


def mixed() -> Program:
    """Every other kind of mesh op, and ops with sizes, on two axes."""
    b = Builder(dp=2, tp=2)
    ids = b.input("ids", (5,), dtype=torch.int64)
    rows = b.op(aten.index.Tensor, b.weight("table", (4, 6), P("tp")), [ids])
    rows = b.op(aten.reshape.default, b.op(aten.relu.default, rows), [5, 2, 3])
    x = b.input("x", (5, 8), P("dp"))
    total = b.op(aten.sum.dim_IntList, x, [0])
    w = b.input("w", (8, 8), Layout((Owner(1), REPLICATE)))
    y = b.op(aten.mm.default, x, w)
    parts = b.op(aten.split.Tensor, y, 4, 1)
    low = b.op(aten.tril.default, b.op(aten.ones_like.default, b.input("z", (8, 8), P("tp"))))
    return partition(
        b.program(rows, total, *parts, low, x, pinned={2: P(None, "dp"), 3: P("dp"), 4: P("tp")})
    )


@pytest.mark.parametrize("make", [mlp, mixed])
def test_a_right_program_passes_unchanged(make: Callable[[], Program]) -> None:
    program = make()
    after = Verify().apply(program)
    assert after.graph is program.graph
    assert after.layouts is program.layouts
    assert after.history == (*program.history, "verify")


def test_the_mixed_program_has_the_ops_it_is_for() -> None:
    ops = {n.target.name for n in mixed().ops if isinstance(n.target, dialect.MeshOp)}
    assert ops >= {"take", "owned_rows", "mask_rows", "mask_pad", "broadcast", "all_to_all", "tril"}


# ---------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("make", "node", "placements"),
    [
        (mlp, "x", (REPLICATE,)),
        (mlp, "x", (Shard(1, 1, 16),)),
        (mlp, "up", (REPLICATE,)),
        (mlp, "up", (Partial(),)),
        (mlp, "down", (Owner(0),)),
        (mlp, "all_gather", (Shard(0, 1, 8),)),
        (mlp, "all_gather", (Partial(),)),
        (mlp, "mm_default", (REPLICATE,)),
        (mlp, "mm_default_1", (REPLICATE,)),
        (mlp, "mm_default_1", (Partial("max"),)),
        (mlp, "relu_default", (REPLICATE,)),
        (mlp, "reduce_scatter", (Partial(),)),
        (mlp, "reduce_scatter", (REPLICATE,)),
        (mlp, "reduce_scatter", (Shard(1, 1, 16),)),
        (mlp, "add_tensor", (REPLICATE,)),
        (mlp, "add_tensor", (Partial(),)),
        (mlp, "add_tensor", (Shard(1, 1, 16),)),
        (mixed, "w", (REPLICATE, REPLICATE)),
        (mixed, "w", (Owner(0), REPLICATE)),
        (mixed, "table", (REPLICATE, REPLICATE)),
        (mixed, "index_tensor", (REPLICATE, REPLICATE)),
        (mixed, "relu_default", (REPLICATE, REPLICATE)),
        (mixed, "relu_default", (REPLICATE, Routed("ids:other:4", 0, 1, 5))),
        (mixed, "owned_rows", (REPLICATE, REPLICATE)),
        (mixed, "mask_rows", (REPLICATE, REPLICATE)),
        (mixed, "mask_rows", (REPLICATE, Partial("max"))),
        (mixed, "mask_pad", (REPLICATE, REPLICATE)),
        (mixed, "sum_dim_int_list", (REPLICATE, REPLICATE)),
        (mixed, "getitem", (REPLICATE, REPLICATE)),
        (mixed, "tril_default", (REPLICATE, REPLICATE)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_layout(
    make: Callable[[], Program], node: str, placements: tuple[Placement, ...]
) -> None:
    program = make()
    assert program.layout(node_named(program, node)) != Layout(placements)
    assert refused(with_layout(program, node, *placements)).startswith("[RM016]")


def test_a_missing_layout() -> None:
    program = mlp()
    layouts = {n: v for n, v in program.layouts.items() if n.name != "relu_default"}
    assert refused(program.after("mutate", layouts=layouts)) == (
        "[RM016] %relu_default has no layout\n"
        "  where: program test after propagate push_back partition verify mutate; "
        "module mlp at model.py:1\n"
        "  why: every value has one layout per result\n"
        "  fix: this is a defect of the pass that made the node: report it with the program's text"
    )


def test_a_layout_for_another_mesh() -> None:
    program = with_layout(mlp(), "x", REPLICATE, REPLICATE)
    assert "a layout has one placement per mesh axis" in refused(program)


def test_a_layout_that_the_shape_cannot_take() -> None:
    program = with_layout(mlp(), "relu_default", Shard(1, 1, 7))
    assert refused(program).startswith("[RM009] extent 64 does not split into 1 x 7 x n")


# ---------------------------------------------------------------------------------- outputs


def test_a_pending_sum_at_an_output() -> None:
    program = mlp()
    product = node_named(program, "mm_default_1")
    text = refused(_returning(program, product))
    assert text.startswith("[RM016] %mm_default_1 is output 0 in layout +sum")
    assert "why: that output must be in layout S(0)" in text


def test_a_chunk_at_a_replicated_output() -> None:
    program = dataclasses.replace(mlp(), pinned={})
    text = refused(program)
    assert text.startswith("[RM016] %add_tensor is output 0 in layout S(0)")
    assert "why: that output must be in layout R" in text


def test_rows_of_one_rank_at_an_output() -> None:
    program = mixed()
    assert "routed(0 by" in refused(_returning(program, node_named(program, "relu_default")))


def test_a_new_value_in_another_layout_than_its_input() -> None:
    b = Builder(tp=2)
    cache = b.input("cache", (4, 6), P("tp"), mutated=True)
    program = partition(b.program(b.op(aten.neg.default, cache), mutates={0: "cache"}))
    assert Verify().apply(program)
    changed = with_layout(program, "cache", Shard(1, 1, 6))
    changed = with_layout(changed, "neg_default", Shard(0, 1, 4))
    text = refused(changed)
    assert text.startswith("[RM016] %neg_default is output 0 in layout S(0)")
    assert "why: that output must be in layout S(1)" in text


def _returning(program: Program, node: fx.Node) -> Program:
    program.graph.output_node().args = ((node, *program.results[1:]),)
    return program


# ---------------------------------------------------------------------------------- mesh ops


@pytest.mark.parametrize(
    ("make", "node", "argument", "value"),
    [
        (mlp, "all_gather", "shard", Shard(1, 1, 2)),
        (mlp, "all_gather", "shard", Shard(0, 2, 4)),
        (mlp, "all_gather", "shard", None),
        (mlp, "all_gather", "axes", ()),
        (mlp, "reduce_scatter", "shard", Shard(1, 1, 8)),
        (mlp, "reduce_scatter", "op", "max"),
        (mixed, "all_to_all", "split", Shard(0, 1, 4)),
        (mixed, "all_to_all", "concat", Shard(1, 1, 2)),
        (mixed, "all_to_all", "axes", ("tp",)),
        (mixed, "broadcast", "owner", 0),
        (mixed, "broadcast", "axes", ("tp",)),
        (mixed, "broadcast", "axes", ("dp", "tp")),
        (mixed, "index_tensor", "axes", ("dp",)),
        (mixed, "owned_rows", "axes", ("dp",)),
        (mixed, "all_reduce", "op", "max"),
    ],
)
def test_a_wrong_argument_of_a_mesh_op(
    make: Callable[[], Program], node: str, argument: str, value: object
) -> None:
    program = make()
    found = node_named(program, node)
    assert found.kwargs[argument] != value
    found.kwargs = {**found.kwargs, argument: value}  # type: ignore[assignment]
    assert refused(program).startswith("[RM016]")


def test_an_axis_that_the_mesh_does_not_have() -> None:
    program = mlp()
    node = node_named(program, "all_gather")
    node.kwargs = {**node.kwargs, "axes": ("tq",)}
    assert refused(program).startswith("[RM002] unknown mesh axis 'tq'")


def test_a_mesh_op_of_another_kind() -> None:
    program = mlp()
    node_named(program, "reduce_scatter").target = dialect.SHARD  # type: ignore[assignment]
    text = refused(program)
    assert text.startswith("[RM016] %reduce_scatter takes axis tp from +sum to S(0)")
    assert "why: mesh.shard takes tp from Replicate to Shard or Segmented, and no other" in text


def test_a_collective_twice() -> None:
    """A sum over ranks of a value that is whole already counts it once for each."""
    b = Builder(tp=2)
    x, w = b.input("x", (4, 60), P(None, "tp")), b.weight("w", (60, 8), P("tp"))
    program = partition(b.program(b.op(aten.mm.default, x, w)))
    first = node_named(program, "all_reduce")
    with program.graph.inserting_after(first):
        second = program.graph.call_function(
            dialect.ALL_REDUCE,  # type: ignore[arg-type]
            (first,),
            dict(first.kwargs),
        )
    second.meta.update(first.meta)
    layouts = {**program.layouts, second: program.layouts[first]}
    program.graph.output_node().args = ((second,),)
    text = refused(program.after("mutate", layouts=layouts))
    assert text.startswith("[RM016] %all_reduce_1 takes axis tp from R to R")


def test_a_collective_left_out() -> None:
    program = mlp()
    node = node_named(program, "reduce_scatter")
    node.replace_all_uses_with(node.all_input_nodes[0])
    assert refused(program).startswith("[RM016] %add_tensor reads %mm_default_1, +sum on tp")


def test_a_mesh_op_that_changes_the_type() -> None:
    program = mlp()
    node = node_named(program, "all_gather")
    node.meta["type"] = node.meta["type"]._replace(dtype=torch.float16)
    assert "why: a mesh op only moves data" in refused(program)


# ---------------------------------------------------------------------------------- ops


def test_what_differs_between_ranks_is_named() -> None:
    program = with_layout(mlp(), "add_tensor", REPLICATE)
    text = refused(dataclasses.replace(program, pinned={}))
    assert text.startswith("[RM016] %add_tensor reads %x, S(0) on tp, and gives R\n")
    assert "why: a value that differs between ranks must pass a mesh op first" in text


@pytest.mark.parametrize("placement", [Owner(0), Routed("ids:x:8", 0, 1, 8)])
def test_what_one_rank_has_reaches_no_op(placement: Placement) -> None:
    b = Builder(tp=2)
    y = b.op(aten.relu.default, b.input("x", (8, 4)))
    program = partition(b.program(y))
    assert "reads %x" in refused(with_layout(program, "x", placement))


def test_an_op_that_reads_only_a_type_takes_anything() -> None:
    b = Builder(tp=2)
    y = b.op(aten.new_zeros.default, b.input("x", (8, 4), Owner(1)), [3, 4])
    assert Verify().apply(partition(b.program(y)))


@pytest.mark.parametrize(
    ("op", "sizes", "wrong"),
    [
        (aten.reshape.default, [8, 2, 8], [8, 2, 8]),
        (aten.reshape.default, [8, 2, 8], [4, 16]),
        (aten.expand.default, [8, 16], [8, 16]),
    ],
)
def test_sizes_that_are_not_local(
    op: torch._ops.OpOverload, sizes: list[int], wrong: list[int]
) -> None:
    b = Builder(tp=2)
    y = b.op(op, b.input("x", (8, 16), P("tp")), sizes)
    program = partition(b.program(y, pinned={0: P("tp")}))
    node = node_named(program, y.name)
    node.args = (node.args[0], wrong)
    text = refused(program)
    assert text.startswith(f"[RM016] %{y.name} makes {wrong}, not [4, ")
    assert "why: its layout is f32[8@tp, " in text


@pytest.mark.parametrize("op", [aten.full.default, aten.zeros.default])
def test_sizes_of_constants(op: torch._ops.OpOverload) -> None:
    b = Builder(tp=2)
    y = b.op(op, [8, 4], *([1.0] if op is aten.full.default else []))
    program = partition(b.program(y, pinned={0: P("tp")}))
    node = node_named(program, y.name)
    assert node.args[0] == [4, 4]
    node.args = ([8, 4], *node.args[1:])
    assert f"%{y.name} makes [8, 4], not [4, 4]" in refused(program)


def test_a_result_taken_in_another_layout() -> None:
    b = Builder(tp=2)
    first, second = b.op(aten.split.Tensor, b.input("x", (8, 8), P("tp")), 4, 1)
    y = b.op(aten.relu.default, first)
    program = partition(b.program(y, second, pinned={0: P("tp"), 1: P("tp")}))
    text = refused(with_layout(program, "getitem", Shard(1, 1, 4)))
    assert text.startswith("[RM016] %getitem has another layout than the result it is")


def test_nodes_that_programs_do_not_hold() -> None:
    program = mlp()
    with program.graph.inserting_before(node_named(program, "relu_default")):
        program.graph.create_node("get_attr", "weight")
    assert "why: Programs hold no attributes or modules" in refused(program)


# ---------------------------------------------------------------------------------- buffers


def prefetched(slots: tuple[str, str], *, late: bool = False) -> Program:
    """Two broadcasts into buffers; `late` starts the second before the first is read."""
    b = Builder(tp=2)
    x, whole = b.input("x", (4, 4)), Layout((REPLICATE,))
    weights = [b.input(f"w{i}", (4, 4), Owner(i)) for i in range(2)]
    graph, layouts = b.graph, b.layouts
    started: list[fx.Node] = []

    def start(index: int) -> fx.Node:
        node = graph.call_function(
            dialect.BROADCAST_START,  # type: ignore[arg-type]
            (weights[index],),
            {"owner": index, "axes": ("tp",), "slot": slots[index]},
        )
        node.meta["type"] = weights[index].meta["type"]
        layouts[node] = (whole,)
        started.append(node)
        return node

    def use(node: fx.Node, value: fx.Node) -> fx.Node:
        waited = graph.call_function(dialect.WAIT, (node,))  # type: ignore[arg-type]
        waited.meta["type"] = node.meta["type"]
        layouts[waited] = (whole,)
        result = b.op(aten.mm.default, value, waited)
        layouts[result] = (whole,)
        assert isinstance(result, fx.Node)
        return result

    first = start(0)
    if late:
        second = start(1)
        y = use(first, x)
    else:
        y = use(first, x)
        second = start(1)
    return b.program(use(second, y))


def test_buffers_that_are_used_one_after_the_other() -> None:
    assert Verify().apply(prefetched(("a", "a")))
    assert Verify().apply(prefetched(("a", "b"), late=True))


def test_a_buffer_that_is_overwritten_too_early() -> None:
    text = refused(prefetched(("a", "a"), late=True))
    assert "receives into buffer a before %broadcast_start was read for the last time" in text


def test_a_buffer_for_two_types() -> None:
    program = prefetched(("a", "a"))
    for name in ("w1", "broadcast_start_1"):
        node = node_named(program, name)
        node.meta["type"] = node.meta["type"]._replace(dtype=torch.float16)
    assert "reuses buffer a for another type" in refused(program)


def test_experts_with_whole_tables_differ_between_no_ranks() -> None:
    define_composite_ops()
    b = Builder(tp=2)
    ids = b.input("ids", (5, 2), dtype=torch.int64)
    tables = b.weight("up", (3, 8, 6), P("tp")), b.weight("down", (3, 7, 4), P("tp"))
    given = (b.input("x", (5, 6)), ids, b.input("w", (5, 2)), *tables)
    op = torch.ops.rolemesh.experts.default
    program = partition(b.program(b.op(op, *given, None, None, SWIGLU, False)))
    assert Verify().apply(program).graph is program.graph
    whole = with_layout(program, "up", REPLICATE)
    assert "mesh.experts works on chunks and differs between ranks" in refused(whole)
