"""The bound eager graph under torch's own simulation of all ranks equals our lock-step.

`LocalTensorMode` runs one graph for every rank, so the Program has no op that depends on the rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Partial, Placement, Shard
from rolemesh.compiler.ir.program import Input, InputKind, Output, Program
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.bind import bind
from rolemesh.runtime.groups import groups_for
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs


@pytest.fixture
def world() -> Iterator[int]:
    size = 4
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    yield size
    dist.destroy_process_group()


def moves(mesh: Mesh, axis: str) -> Program:
    """Gather, exchange, reduce and reduce-scatter along one axis, uneven."""
    kind = TensorType((5, 6), torch.float32)
    index, axes = mesh.index(axis), (axis,)
    rows, columns = Shard(0, 1, 5), Shard(1, 2, 3)
    graph = fx.Graph()
    layouts = {}

    def value(node: fx.Node, placement: Placement) -> fx.Node:
        node.meta["type"] = kind
        layouts[node] = (Layout.replicated(mesh).replace(index, placement),)
        return node

    def op(target: object, *args: object, to: Placement, **kwargs: object) -> fx.Node:
        return value(graph.create_node("call_function", target, args, kwargs), to)  # type: ignore[arg-type]

    x = value(graph.placeholder("x"), rows)
    whole = op(dialect.ALL_GATHER, x, to=REPLICATE, shard=rows, axes=axes)
    turned = op(dialect.ALL_TO_ALL, x, to=columns, split=columns, concat=rows, axes=axes)
    part = op(dialect.REDUCE_SCATTER, whole, to=columns, op="sum", shard=columns, axes=axes)
    most = op(dialect.ALL_REDUCE, whole, to=Partial("max"), op="max", axes=axes)
    results = (whole, turned, part, most)
    graph.output(results)
    inputs = (Input("x", InputKind.USER),)
    return Program(
        "moves", graph, inputs, tuple(Output() for _ in results), mesh=mesh, layouts=layouts
    )


@pytest.mark.parametrize(
    ("mesh", "axis"),
    [(Mesh({"tp": 4}), "tp"), (Mesh({"dp": 2, "tp": 2}), "tp"), (Mesh({"dp": 2, "tp": 2}), "dp")],
    ids=["line", "minor", "major"],
)
def test_bound_graph_equals_lock_step(world: int, mesh: Mesh, axis: str) -> None:
    program = moves(mesh, axis)
    (locals_,) = scatter_inputs(program, [torch.arange(30.0).reshape(5, 6)])
    expected = run_lockstep(program, [locals_])
    module = bind(program, 0, groups_for(mesh).names)
    with LocalTensorMode(world):
        outputs = module(LocalTensor(dict(enumerate(locals_))))
    for output, ranks in zip(outputs, expected, strict=True):
        for rank, tensor in enumerate(ranks):
            assert tensor is not None
            assert torch.equal(output._local_tensors[rank], tensor)
