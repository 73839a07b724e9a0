"""Real ranks over gloo give what lock-step gives, bit for bit, and move the bytes it says.

Values are small integers, so that sums do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch._inductor.config
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collective
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Partial, Placement, Routed, Shard
from rolemesh.compiler.ir.program import Input, InputKind, Origin, Output, Program
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.compiler.ir.traffic import received_bytes
from rolemesh.lowering.bind import bind, make_pool
from rolemesh.lowering.direct import exchanged
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.targets import target
from rolemesh.runtime.groups import groups_for
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs
from rolemesh.runtime.traffic import Record, record_traffic

pytestmark = pytest.mark.processes

Operand = tuple[str, object]


class Builder:
    """Builds a Program value by value."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.graph = fx.Graph()
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}

    def value(self, node: fx.Node, kind: TensorType, *placements: Placement) -> fx.Node:
        node.meta["type"] = kind
        node.meta["origin"] = Origin("model", "model.py:1")
        self.layouts[node] = (Layout(placements),)
        return node

    def input(self, kind: TensorType, *placements: Placement) -> fx.Node:
        name = f"x{len(self.graph.find_nodes(op='placeholder'))}"
        return self.value(self.graph.placeholder(name), kind, *placements)

    def op(
        self,
        target: Callable[..., object],
        operands: Sequence[object],
        kind: TensorType,
        *placements: Placement,
        **kwargs: object,
    ) -> fx.Node:
        node = self.graph.call_function(target, tuple(operands), kwargs)  # type: ignore[arg-type]
        return self.value(node, kind, *placements)

    def program(self, *results: fx.Node) -> Program:
        self.graph.output(results)
        inputs = tuple(
            Input(node.name, InputKind.USER) for node in self.graph.find_nodes(op="placeholder")
        )
        outputs = tuple(Output() for _ in results)
        return Program(
            "hand-built", self.graph, inputs, outputs, mesh=self.mesh, layouts=self.layouts
        )


def by_routes(build: Builder, x: fx.Node, kind: TensorType, rows: Shard) -> fx.Node:
    """Rows to the ranks with experts for them, of which rank 0 may have none, and back."""
    ids = build.input(TensorType((rows.size, 2), torch.int64), REPLICATE)
    own = {"size": 5, "axes": ("tp",), "shard": rows}
    routed = Routed(f"routes:{ids.name}:5", 0, 1, rows.size)
    there = build.op(dialect.DISPATCH, [x, ids], kind, routed, **own)
    partial = build.op(torch.ops.aten.mul.Scalar, [there, 2], kind, Partial())
    return build.op(dialect.COMBINE, [partial, ids], kind, rows, op="sum", **own)


def line(ranks: int) -> tuple[Program, list[torch.Tensor]]:
    """Every mesh op on one axis, uneven where it can be."""
    build = Builder(Mesh({"tp": ranks}))
    axes = ("tp",)
    f32 = TensorType((7, 6), torch.float32)
    rows, columns = Shard(0, 1, 7), Shard(1, 2, 3)
    x = build.input(f32, rows)
    picks = build.input(TensorType((5,), torch.int64), REPLICATE)
    table = build.input(TensorType((9, 6), torch.bfloat16), Shard(0, 1, 9))
    weight = build.input(f32, Owner(1))
    flags = build.input(TensorType((7,), torch.bool), rows._replace(dim=0))

    whole = build.op(dialect.ALL_GATHER, [x], f32, REPLICATE, shard=rows, axes=axes)
    turned = build.op(dialect.ALL_TO_ALL, [x], f32, columns, split=columns, concat=rows, axes=axes)
    lower = build.op(dialect.TRIL, [x, -1], f32, rows, shard=rows, axes=axes)
    partial = build.op(torch.ops.aten.mul.Scalar, [whole, 2], f32, Partial())
    summed = build.op(dialect.ALL_REDUCE, [partial], f32, REPLICATE, op="sum", axes=axes)
    part = build.op(
        dialect.REDUCE_SCATTER, [partial], f32, columns, op="max", shard=columns, axes=axes
    )
    sliced = build.op(dialect.SHARD, [whole], f32, columns, shard=columns, axes=axes)
    added = build.op(torch.ops.aten.add.Tensor, [part, sliced], f32, columns)
    clean = build.op(dialect.MASK_PAD, [added], f32, columns, shard=columns, axes=axes, value=1.0)
    kept = TensorType((7,), torch.bool)
    all_flags = build.op(dialect.ALL_GATHER, [flags], kept, REPLICATE, shard=rows, axes=axes)
    row_type = TensorType((5, 6), torch.bfloat16)
    taken = build.op(dialect.TAKE, [table, picks], row_type, Partial(), dim=0, size=9, axes=axes)
    mask = build.op(
        dialect.OWNED_ROWS,
        [picks],
        TensorType((5,), torch.bool),
        REPLICATE,
        by="ids",
        rows=5,
        size=9,
        axes=axes,
    )
    masked = build.op(dialect.MASK_ROWS, [taken, mask], row_type, Partial(), dim=0)
    looked_up = build.op(dialect.ALL_REDUCE, [masked], row_type, REPLICATE, op="avg", axes=axes)
    direct = build.op(dialect.BROADCAST, [weight], f32, REPLICATE, owner=1, axes=axes)
    started = build.op(
        dialect.BROADCAST_START, [weight], f32, REPLICATE, owner=1, axes=axes, slot="w#0"
    )
    ready = build.op(dialect.WAIT, [started], f32, REPLICATE)
    both = build.op(torch.ops.aten.add.Tensor, [direct, ready], f32, REPLICATE)
    back = by_routes(build, x, f32, rows)
    program = build.program(whole, turned, lower, summed, clean, all_flags, looked_up, both, back)
    return program, [
        torch.arange(42.0).reshape(7, 6),
        torch.tensor([8, 0, 3, 3, 5]),
        torch.arange(54).reshape(9, 6).to(torch.bfloat16),
        torch.arange(42.0).reshape(7, 6) - 20,
        torch.tensor([True, False, True, True, False, False, True]),
        torch.tensor([[4, 3], [0, 4], [5, -1], [2, 2], [3, 4], [4, 1], [4, 9]]),
    ]


def grid() -> tuple[Program, list[torch.Tensor]]:
    """Joint axes, and collectives on either axis of a 2 x 2 mesh."""
    build = Builder(Mesh({"dp": 2, "tp": 2}))
    f32 = TensorType((5, 6), torch.float32)
    rows, columns = Shard(0, 1, 5), Shard(1, 1, 6)
    both = ("dp", "tp")
    x = build.input(f32, rows, rows)
    weight = build.input(f32, REPLICATE, Owner(1))
    whole = build.op(dialect.ALL_GATHER, [x], f32, REPLICATE, REPLICATE, shard=rows, axes=both)
    partial = build.op(torch.ops.aten.mul.Scalar, [whole, 3], f32, Partial(), Partial())
    part = build.op(
        dialect.REDUCE_SCATTER, [partial], f32, rows, rows, op="sum", shard=rows, axes=both
    )
    half = build.op(
        dialect.REDUCE_SCATTER,
        [partial],
        f32,
        Partial(),
        columns,
        op="sum",
        shard=columns,
        axes=("tp",),
    )
    summed = build.op(dialect.ALL_REDUCE, [half], f32, REPLICATE, columns, op="sum", axes=("dp",))
    received = build.op(
        dialect.BROADCAST, [weight], f32, REPLICATE, REPLICATE, owner=1, axes=("tp",)
    )
    program = build.program(whole, part, summed, received)
    return program, [torch.arange(30.0).reshape(5, 6), torch.arange(30.0).reshape(5, 6) - 9]


def few() -> tuple[Program, list[torch.Tensor]]:
    """One collective of each kind in few kernels, for targets that compile each one."""
    build = Builder(Mesh({"tp": 2}))
    axes = ("tp",)
    f32 = TensorType((4, 5), torch.float32)
    rows, columns = Shard(0, 1, 4), Shard(1, 1, 5)
    x = build.input(f32, rows)
    weight = build.input(f32, Owner(0))
    whole = build.op(dialect.ALL_GATHER, [x], f32, REPLICATE, shard=rows, axes=axes)
    started = build.op(
        dialect.BROADCAST_START, [weight], f32, REPLICATE, owner=0, axes=axes, slot="w#0"
    )
    ready = build.op(dialect.WAIT, [started], f32, REPLICATE)
    partial = build.op(torch.ops.aten.mul.Tensor, [whole, ready], f32, Partial())
    part = build.op(dialect.REDUCE_SCATTER, [partial], f32, rows, op="sum", shard=rows, axes=axes)
    turned = build.op(
        dialect.ALL_TO_ALL, [part], f32, columns, split=columns, concat=rows, axes=axes
    )
    total = build.op(dialect.ALL_REDUCE, [whole], f32, Partial("max"), op="max", axes=axes)
    back = by_routes(build, x, f32, rows)
    program = build.program(turned, total, back)
    ids = torch.tensor([[4, 3], [0, 4], [5, -1], [2, 2]])
    return program, [torch.arange(20.0).reshape(4, 5), torch.arange(20.0).reshape(4, 5) - 9, ids]


PROGRAMS: dict[str, Callable[[], tuple[Program, list[torch.Tensor]]]] = {
    "line2": lambda: line(2),
    "line3": lambda: line(3),
    "line4": lambda: line(4),
    "grid": grid,
    "few": few,
}


def worker(
    name: str, inputs: list[list[torch.Tensor]], targets: Sequence[str], pooled: bool
) -> dict[str, object]:
    """Run one rank on every target: outputs and traffic by target, and whether inputs changed."""
    torch._inductor.config.compile_threads = 1  # each rank would start a pool of compilers
    program, _ = PROGRAMS[name]()
    groups = groups_for(program.the_mesh)
    mine = [ranks[groups.rank] for ranks in inputs]
    pool = make_pool(program) if pooled else None
    results: dict[str, object] = {}
    for target_name in targets:
        module = bind(program, groups.rank, groups.names, pool, routes=True)
        before = [x.clone() for x in mine]
        run = target(target_name).lower(module, mine, Signature.of(program, groups.rank), None)
        outputs = run(*mine)
        with record_traffic() as records:
            again = run(*mine)
        same = all(
            torch.equal(_bits(a), _bits(b))
            for a, b in zip([*mine, *outputs], [*before, *again], strict=True)
        )
        results[target_name] = (outputs, records, same)
    return results


def _bits(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x.contiguous().flatten().view(torch.uint8)


def compare(name: str, targets: Sequence[str], *, pooled: bool = False) -> None:
    program, tensors = PROGRAMS[name]()
    mesh = program.the_mesh
    inputs = scatter_inputs(program, tensors, poison=True)
    moved: dict[str, list[list[Record]]] = {
        name: [[] for _ in range(mesh.size)] for name in targets
    }

    def ledger(node: fx.Node, group: tuple[int, ...], wire_bytes: int) -> None:
        assert isinstance(node.target, dialect.MeshOp)
        op = node.target.name.removesuffix("_start")
        if node.target in dialect.PLAIN:
            for records in moved.values():
                records[group[0]].append(Record(op, wire_bytes, mesh.size))
            return
        for position, rank in enumerate(group):
            received = received_bytes(op, wire_bytes, len(group))
            if op == "broadcast" and position == node.kwargs["owner"]:
                received = 0
            for target_name, records in moved.items():
                record = Record(op, received, len(group))
                if target_name == "inductor":
                    entry = collective(program, node)
                    record = Record(*exchanged(entry, len(group)), len(group))
                records[rank].append(record if received else record._replace(received=0))

    expected = run_lockstep(program, inputs, check=True, ledger=ledger)
    by_rank = run_processes(worker, mesh.size, (name, inputs, targets, pooled), fork=True)
    for rank, results in enumerate(by_rank):
        assert isinstance(results, dict)
        for target_name in targets:
            outputs, records, same = results[target_name]
            assert same, f"{target_name} changes its inputs, or differs when called again"
            for index, (mine, ranks) in enumerate(zip(outputs, expected, strict=True)):
                assert torch.equal(_bits(mine), _bits(ranks[rank])), (target_name, rank, index)
                assert mine.dtype == ranks[rank].dtype
                assert mine.shape == ranks[rank].shape
            assert sorted(records) == sorted(moved[target_name][rank]), (target_name, rank)


def test_two_ranks() -> None:
    compare("line2", ["eager"])


def test_two_ranks_compiled() -> None:
    compare("few", ["eager", "inductor"])


def test_three_ranks_with_a_pool() -> None:
    compare("line3", ["eager"], pooled=True)


def test_four_ranks_on_a_grid() -> None:
    compare("grid", ["eager"])
