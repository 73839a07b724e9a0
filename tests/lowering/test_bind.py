"""Binding to a rank: the same collectives on every rank, names and origins kept, errors located."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Partial, Placement, Routed, Shard
from rolemesh.compiler.ir.program import Input, InputKind, Origin, Output, Program, origin
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.bind import bind, make_pool
from rolemesh.lowering.eager import lower_eager
from rolemesh.lowering.inductor import lower_inductor
from rolemesh.lowering.signature import Signature

MESH = Mesh({"dp": 2, "tp": 2})
GROUPS = {"dp": "group_dp", "tp": "group_tp"}
F32 = TensorType((4, 4), torch.float32)
ROWS = Shard(0, 1, 4)


def program(*, broken: bool = False) -> Program:
    graph = fx.Graph()
    layouts = {}

    def value(node: fx.Node, *placements: Placement) -> fx.Node:
        node.meta["type"] = F32
        node.meta["origin"] = Origin("layers.0", "model.py:7")
        layouts[node] = (Layout(placements),)
        return node

    def op(target: object, *args: object, to: tuple[Placement, ...], **kwargs: object) -> fx.Node:
        return value(graph.create_node("call_function", target, args, kwargs), *to)  # type: ignore[arg-type]

    whole = (REPLICATE, REPLICATE)
    x = value(graph.placeholder("x"), *whole)
    weight = value(graph.placeholder("weight"), REPLICATE, Owner(1))
    started = op(dialect.BROADCAST_START, weight, to=whole, owner=1, axes=("tp",), slot="w#0")
    mine = op(dialect.SHARD, x, to=(ROWS, ROWS), shard=ROWS, axes=("dp", "tp"))
    doubled = op(torch.ops.aten.mul.Scalar, mine, 2, to=(ROWS, ROWS))
    joined = op(dialect.ALL_GATHER, doubled, to=whole, shard=ROWS, axes=("dp", "tp"))
    ready = op(dialect.WAIT, started, to=whole)
    product = op(torch.ops.aten.mm.default, joined, mine if broken else ready, to=whole)
    graph.output((product, None))
    inputs = (Input("x", InputKind.USER), Input("weight", InputKind.PARAMETER))
    return Program("p", graph, inputs, (Output(), Output()), mesh=MESH, layouts=layouts)


def collectives(module: fx.GraphModule) -> list[str]:
    return [
        str(node.target).removeprefix("_c10d_functional.").removesuffix(".default")
        for node in module.graph.nodes
        if str(node.target).startswith("_c10d_functional")
    ]


def test_every_rank_has_the_same_collectives_in_order() -> None:
    bound = [collectives(bind(program(), rank, GROUPS)) for rank in range(4)]
    assert bound[0] == [
        "broadcast",
        "all_gather_into_tensor",
        "wait_tensor",
        "all_gather_into_tensor",
        "wait_tensor",
        "wait_tensor",
    ]
    assert bound == [bound[0]] * 4


def test_a_joint_gather_runs_the_minor_axis_first() -> None:
    module = bind(program(), 0, GROUPS)
    target = torch.ops._c10d_functional.all_gather_into_tensor.default
    gathers = module.graph.find_nodes(op="call_function", target=target)
    assert [node.args[2] for node in gathers] == ["group_tp", "group_dp"]


def test_names_types_and_origins_are_kept() -> None:
    source = program()
    module = bind(source, 3, GROUPS)
    bound = {node.name: node for node in module.graph.nodes}
    for node in source.ops:
        assert bound[node.name].meta.get("type") == node.meta["type"] or "start" in node.name
        assert origin(bound[node.name]).source == "model.py:7"
    assert [node.name for node in module.graph.nodes if node.name.startswith("all_gather")] == [
        "all_gather_wire",
        "all_gather_tp",
        "all_gather_tp_done",
        "all_gather_dp",
        "all_gather_dp_done",
        "all_gather",
    ]
    assert not any(isinstance(node.target, dialect.MeshOp) for node in module.graph.nodes)
    module.graph.lint()


def test_a_pool_is_received_into_and_the_owner_sends_what_it_stores() -> None:
    source = program()
    pool = make_pool(source)
    assert {slot: list(buffer.shape) for slot, buffer in pool.items()} == {"w#0": [4, 4]}
    receiver, owner = (bind(source, rank, GROUPS, pool) for rank in (0, 1))
    assert [buffer is pool["w#0"] for buffer in receiver.buffers()] == [True]
    assert list(owner.buffers()) == []
    assert collectives(receiver)[0] == collectives(owner)[0] == "broadcast_"


def test_inductor_plans_memory_itself() -> None:
    source = program()
    module = bind(source, 0, GROUPS, make_pool(source))
    with pytest.raises(ValueError, match="bind without a pool"):
        lower_inductor(module, [torch.zeros(4, 4)] * 2, Signature.of(source, 0))


def local_program(*, broken: bool) -> Program:
    """Without collectives, so that it runs without groups."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    mine = graph.call_function(dialect.SHARD, (x,), {"shard": ROWS, "axes": ("dp", "tp")})
    product = graph.call_function(torch.ops.aten.mm.default, (mine, mine if broken else x))
    for node in (x, mine, product):
        node.meta["type"] = F32
        node.meta["origin"] = Origin("layers.3.mlp", "model.py:41")
    graph.output((product,))
    return Program("p", graph, (Input("x", InputKind.USER),), (Output(),), mesh=MESH)


def test_eager_runs_one_rank() -> None:
    x = torch.arange(16.0).reshape(4, 4).requires_grad_()
    for rank in range(4):
        source = local_program(broken=False)
        module = bind(source, rank, GROUPS)
        (found,) = lower_eager(module, [x], Signature.of(source, rank))(x)
        assert found is not None
        assert torch.equal(found, x[rank : rank + 1] @ x)
        assert not found.requires_grad


def test_a_failing_op_is_located_in_the_model() -> None:
    source = local_program(broken=True)
    run = lower_eager(bind(source, 1, GROUPS), [], Signature.of(source, 1))
    with pytest.raises(RuntimeError) as caught:
        run(torch.zeros(4, 4))
    assert caught.value.__notes__ == [
        "raised by %mm_default = aten.mm.default in layers.3.mlp at model.py:41"
    ]


def test_wrong_arguments_are_not_blamed_on_a_node() -> None:
    source = local_program(broken=False)
    run = lower_eager(bind(source, 1, GROUPS), [], Signature.of(source, 1))
    with pytest.raises(TypeError) as caught:
        run()
    assert not hasattr(caught.value, "__notes__")


def test_partial_values_are_divided_for_an_average() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    mean = graph.call_function(dialect.ALL_REDUCE, (x,), {"op": "avg", "axes": ("dp", "tp")})
    for node in (x, mean):
        node.meta["type"] = F32
    graph.output((mean,))
    layouts = {x: (Layout((Partial("avg"),) * 2),), mean: (Layout((REPLICATE,) * 2),)}
    source = Program(
        "p", graph, (Input("x", InputKind.USER),), (Output(),), mesh=MESH, layouts=layouts
    )
    module = bind(source, 0, GROUPS)
    reductions = module.graph.find_nodes(
        op="call_function", target=torch.ops._c10d_functional.all_reduce.default
    )
    assert [node.args[1:] for node in reductions] == [("sum", "group_dp"), ("sum", "group_tp")]
    (result,) = (node for node in module.graph.nodes if node.name == "all_reduce")
    assert result.kwargs["count"] == 4


def test_only_the_owner_of_an_input_gives_its_new_value() -> None:
    mesh = Mesh({"tp": 2})
    graph = fx.Graph()
    state = graph.placeholder("state")
    doubled = graph.call_function(torch.ops.aten.mul.Scalar, (state, 2))
    graph.output((doubled,))
    owned = (Layout((Owner(1),)),)
    for node in (state, doubled):
        node.meta["type"] = F32
    inputs = (Input("state", InputKind.USER, mutated=True),)
    layouts = {state: owned, doubled: owned}
    written = Program("p", graph, inputs, (Output(mutates=0),), mesh=mesh, layouts=layouts)
    other, owner = (bind(written, rank, {"tp": "group"}) for rank in (0, 1))
    nothing, whole = torch.empty(0), torch.ones(4, 4)
    assert other(nothing)[0] is nothing
    assert torch.equal(owner(whole)[0], whole * 2)


def test_rows_move_by_routes_only_where_a_target_can_do_that() -> None:
    """Else the collectives run that move all rows; the sizes are the same."""
    graph, layouts = fx.Graph(), {}
    ids_type, sizes = TensorType((4, 2), torch.int64), {"size": 6, "axes": ("tp",), "shard": ROWS}

    def value(node: fx.Node, kind: TensorType, placement: Placement) -> fx.Node:
        node.meta["type"] = kind
        layouts[node] = (Layout((REPLICATE, placement)),)
        return node

    x = value(graph.placeholder("x"), F32, ROWS)
    ids = value(graph.placeholder("ids"), ids_type, REPLICATE)
    routed = Routed("routes:ids:6", 0, 1, 4)
    there = value(graph.call_function(dialect.DISPATCH, (x, ids), sizes), F32, routed)  # type: ignore[arg-type]
    sums: dict[str, object] = {**sizes, "op": "sum"}
    back = value(graph.call_function(dialect.COMBINE, (there, ids), sums), F32, ROWS)  # type: ignore[arg-type]
    graph.output((back,))
    inputs = (Input("x", InputKind.USER), Input("ids", InputKind.USER))
    made = Program("p", graph, inputs, (Output(),), mesh=MESH, layouts=layouts)
    assert collectives(bind(made, 1, GROUPS)) == [
        "all_gather_into_tensor",
        "wait_tensor",
        "reduce_scatter_tensor",
        "wait_tensor",
    ]
    names = [str(node.target) for node in bind(made, 1, GROUPS, routes=True).graph.nodes]
    assert names[2:4] == ["rolemesh.dispatch.default", "rolemesh.combine.default"]
