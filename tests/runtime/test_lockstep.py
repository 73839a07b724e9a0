"""All ranks in one process: what it computes, what it refuses, and what its test modes catch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Partial, Placement, Shard
from rolemesh.compiler.ir.program import Input, InputKind, Origin, Output, Program
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.lockstep import assemble_outputs, run_lockstep, scatter_inputs

aten = torch.ops.aten


class Builder:
    """Builds a Program on a one-axis mesh, value by value."""

    def __init__(self, ranks: int) -> None:
        self.mesh = Mesh({"tp": ranks})
        self.graph = fx.Graph()
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}

    def value(self, node: fx.Node, shape: Sequence[int], placement: Placement) -> fx.Node:
        node.meta["type"] = TensorType(tuple(shape), torch.float32)
        node.meta["origin"] = Origin("layers.0.mlp", "model.py:12")
        self.layouts[node] = (Layout((placement,)),)
        return node

    def input(self, shape: Sequence[int], placement: Placement) -> fx.Node:
        name = f"x{len(self.graph.find_nodes(op='placeholder'))}"
        return self.value(self.graph.placeholder(name), shape, placement)

    def op(
        self, target: object, *args: object, shape: Sequence[int], to: Placement, **kwargs: object
    ) -> fx.Node:
        if isinstance(target, dialect.MeshOp) and target is not dialect.WAIT:
            kwargs["axes"] = ("tp",)
        node = self.graph.create_node("call_function", target, args, kwargs)  # type: ignore[arg-type]
        return self.value(node, shape, to)

    def program(self, *results: object) -> Program:
        self.graph.output(results)  # type: ignore[arg-type]
        inputs = tuple(
            Input(node.name, InputKind.USER) for node in self.graph.find_nodes(op="placeholder")
        )
        outputs = tuple(Output() for _ in results)
        return Program("small", self.graph, inputs, outputs, mesh=self.mesh, layouts=self.layouts)


def column_row(ranks: int, hidden: int = 5) -> Program:
    """x @ a @ b with the hidden dim split: a column-parallel and a row-parallel matmul."""
    build = Builder(ranks)
    x = build.input((3, 4), REPLICATE)
    a = build.input((4, hidden), Shard(1, 1, hidden))
    b = build.input((hidden, 2), Shard(0, 1, hidden))
    shard = Shard(1, 1, hidden)
    h = build.op(aten.mm.default, x, a, shape=(3, hidden), to=shard)
    clean = build.op(dialect.MASK_PAD, h, shape=(3, hidden), to=shard, shard=shard, value=0)
    rows = Shard(0, 1, hidden)
    weight = build.op(dialect.MASK_PAD, b, shape=(hidden, 2), to=rows, shard=rows, value=0)
    part = build.op(aten.mm.default, clean, weight, shape=(3, 2), to=Partial())
    out = build.op(dialect.ALL_REDUCE, part, shape=(3, 2), to=REPLICATE, op="sum")
    return build.program(out)


def operands(hidden: int = 5) -> list[torch.Tensor]:
    return [
        torch.arange(12.0).reshape(3, 4),
        torch.arange(4.0 * hidden).remainder(7).reshape(4, hidden),
        torch.arange(2.0 * hidden).remainder(5).reshape(hidden, 2),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_uneven_matmuls_equal_one_device(ranks: int) -> None:
    program = column_row(ranks)
    x, a, b = operands()
    inputs = scatter_inputs(program, [x, a, b], poison=True)
    outputs = run_lockstep(program, inputs, poison=True, check=True)
    assert torch.equal(torch.stack(outputs[0]), torch.stack([x @ a @ b] * ranks))  # type: ignore[arg-type]


def test_64_ranks() -> None:
    program = column_row(64, hidden=130)
    tensors = operands(130)
    outputs = run_lockstep(program, scatter_inputs(program, tensors, poison=True), poison=True)
    (found,) = assemble_outputs(program, outputs)
    assert found is not None
    x, a, b = tensors
    assert torch.equal(found, x @ a @ b)


def test_poison_shows_a_pad_that_counts() -> None:
    build = Builder(2)
    shard = Shard(0, 1, 3)
    x = build.input((3,), REPLICATE)
    cut = build.op(dialect.SHARD, x, shape=(3,), to=shard, shard=shard)
    total = build.op(aten.sum.default, cut, shape=(), to=Partial())
    out = build.op(dialect.ALL_REDUCE, total, shape=(), to=REPLICATE, op="sum")
    program = build.program(out)
    inputs = scatter_inputs(program, [torch.ones(3)])
    assert run_lockstep(program, inputs)[0][0] == 4  # the pad looks like one more element
    assert run_lockstep(program, inputs, poison=True)[0][0].isnan()  # type: ignore[union-attr]


def test_values_of_an_owner_are_unreadable_elsewhere() -> None:
    build = Builder(2)
    weight = build.input((2,), Owner(1))
    out = build.op(dialect.BROADCAST, weight, shape=(2,), to=REPLICATE, owner=1)
    program = build.program(out, weight)
    inputs = scatter_inputs(program, [torch.tensor([1.0, 2.0])])
    assert inputs[0][0].isnan().all()
    outputs = run_lockstep(program, inputs)
    assert [x.tolist() for x in outputs[0] if x is not None] == [[1.0, 2.0]] * 2


def test_a_pooled_buffer_reused_too_early_gives_wrong_values() -> None:
    build = Builder(2)
    first, second = build.input((1,), Owner(0)), build.input((1,), Owner(0))
    options = {"shape": (1,), "to": REPLICATE, "owner": 0, "slot": "w#0"}
    started = build.op(dialect.BROADCAST_START, first, **options)  # type: ignore[arg-type]
    early = build.op(dialect.WAIT, started, shape=(1,), to=REPLICATE)
    restarted = build.op(dialect.BROADCAST_START, second, **options)  # type: ignore[arg-type]
    late = build.op(dialect.WAIT, restarted, shape=(1,), to=REPLICATE)
    out = build.op(aten.add.Tensor, early, late, shape=(1,), to=REPLICATE)
    program = build.program(out)
    inputs = scatter_inputs(program, [torch.tensor([1.0]), torch.tensor([10.0])])
    owner, other = run_lockstep(program, inputs)[0]
    assert owner == 11.0
    assert other == 20.0  # as in real execution: the first weight was overwritten


def test_check_finds_a_layout_that_is_wrong() -> None:
    build = Builder(2)
    x = build.input((4, 4), Shard(0, 1, 4))
    out = build.op(aten.t.default, x, shape=(4, 4), to=Shard(0, 1, 4))
    program = build.program(out)
    inputs = scatter_inputs(program, [torch.zeros(4, 4)])
    with pytest.raises(RolemeshError) as caught:
        run_lockstep(program, inputs, check=True)
    assert str(caught.value) == (
        "[RM016] %t_default is torch.float32 [4, 2] on rank 0, not torch.float32 [2, 4]\n"
        "  where: %t_default = aten.t.default in layers.0.mlp at model.py:12\n"
        "  why: its layout is f32[4@tp, 4]\n"
        "  fix: the op's rule, or the pass that made the node, is wrong"
    )


def test_the_failing_node_and_rank_are_named() -> None:
    build = Builder(2)
    x = build.input((4, 3), Shard(0, 1, 4))
    bad = build.op(aten.mm.default, x, x, shape=(4, 4), to=REPLICATE)
    program = build.program(bad)
    with pytest.raises(RuntimeError) as caught:
        run_lockstep(program, scatter_inputs(program, [torch.zeros(4, 3)]))
    assert caught.value.__notes__ == [
        "raised on rank 0 by %mm_default = aten.mm.default in layers.0.mlp at model.py:12"
    ]


def test_the_failing_collective_is_named() -> None:
    build = Builder(2)
    x = build.input((4,), Shard(0, 1, 4))
    shard = Shard(0, 1, 4)
    out = build.op(dialect.ALL_GATHER, x, shape=(4,), to=REPLICATE, shard=shard)
    program = build.program(out)
    with pytest.raises(
        ValueError, match=r"different shapes on the wire: \[\[2\], \[3\]\]"
    ) as caught:
        run_lockstep(program, [[torch.zeros(2), torch.zeros(3)]])
    assert caught.value.__notes__ == [
        "raised by %all_gather = mesh.all_gather in layers.0.mlp at model.py:12"
    ]


def test_inputs_must_fit() -> None:
    program = column_row(2)
    inputs = scatter_inputs(program, operands())
    for wrong in (inputs[:2], [ranks[:1] for ranks in inputs]):
        with pytest.raises(RolemeshError, match="RM020"):
            run_lockstep(program, wrong)


def test_traffic_is_observed_by_group() -> None:
    program = column_row(2)
    seen: list[tuple[str, tuple[int, ...], int]] = []

    def ledger(node: fx.Node, group: tuple[int, ...], wire_bytes: int) -> None:
        seen.append((str(node.target), group, wire_bytes))

    run_lockstep(program, scatter_inputs(program, operands()), ledger=ledger)
    assert seen == [("mesh.all_reduce", (0, 1), 3 * 2 * 4)]


def test_every_value_is_observed_once_with_all_ranks() -> None:
    program = column_row(2)
    seen: dict[str, Sequence[object]] = {}

    def observe(node: fx.Node, locals_: Sequence[object]) -> None:
        assert node.name not in seen
        seen[node.name] = list(locals_)

    outputs = run_lockstep(program, scatter_inputs(program, operands()), observe=observe)
    assert list(seen) == [node.name for node in program.graph.nodes if node.op != "output"]
    assert {len(locals_) for locals_ in seen.values()} == {2}
    (result,) = program.results
    assert all(map(torch.equal, seen[str(result)], outputs[0]))


def test_values_are_freed_after_their_last_use() -> None:
    build = Builder(2)
    x = build.input((4,), REPLICATE)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []

    def step(value: torch.Tensor) -> torch.Tensor:
        most.append(sum(reference() is not None for reference in alive))
        result = value + 1
        alive.append(weakref.ref(result))
        return result

    node = x
    for _ in range(6):
        node = build.op(step, node, shape=(4,), to=REPLICATE)
    run_lockstep(build.program(node), [[torch.zeros(4), torch.zeros(4)]])
    assert max(most) <= 3  # two ranks' operands and the first rank's result


def test_ranks_do_not_share_outputs_and_inputs_stay() -> None:
    build = Builder(2)
    x = build.input((4,), Partial())
    out = build.op(dialect.ALL_REDUCE, x, shape=(4,), to=REPLICATE, op="sum")
    program = build.program(out, None)
    inputs = [[torch.ones(4), torch.ones(4)]]
    (first, second), nothing = run_lockstep(program, inputs)
    assert nothing == [None, None]
    assert assemble_outputs(program, [[first, second], nothing])[1] is None
    assert first is not None
    assert second is not None
    first.zero_()
    assert second.tolist() == [2.0] * 4
    assert [x.tolist() for x in inputs[0]] == [[1.0] * 4] * 2


def test_an_op_with_several_results() -> None:
    build = Builder(2)
    x = build.input((4, 3), Shard(0, 1, 4))
    node = build.graph.call_function(aten.topk.default, (x, 2))
    types = (TensorType((4, 2), torch.float32), TensorType((4, 2), torch.int64))
    node.meta["type"] = types
    build.layouts[node] = (Layout((Shard(0, 1, 4),)),) * 2
    values = build.op(lambda pair: pair[0], node, shape=(4, 2), to=Shard(0, 1, 4))
    program = build.program(values)
    tensor = torch.arange(12.0).reshape(4, 3)
    outputs = run_lockstep(program, scatter_inputs(program, [tensor]), check=True)
    (whole,) = assemble_outputs(program, outputs)
    assert whole is not None
    assert torch.equal(whole, tensor.topk(2).values)
