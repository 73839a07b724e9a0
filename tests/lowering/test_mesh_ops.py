"""Each mesh op equals its definition: scatter in one layout, run it, compare with the other layout.

Pads are poisoned, so a result that depended on one would hold NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Partial, Placement, Shard
from rolemesh.compiler.ir.program import Input, InputKind, Output, Program
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering import chunks, mesh_ops
from rolemesh.runtime.lockstep import assemble_outputs, run_lockstep, scatter_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool]
LINES = [Mesh({"tp": size}) for size in (2, 3, 4)]
GRIDS = [Mesh({"dp": 2, "tp": 2}), Mesh({"dp": 2, "tp": 3})]


def one_op(
    mesh: Mesh,
    op: MeshOp,
    operands: Sequence[tuple[TensorType, Layout]],
    result: tuple[TensorType, Layout],
    /,
    *constants: object,
    **kwargs: object,
) -> Program:
    """A Program of a single mesh op."""
    graph = fx.Graph()
    layouts = {}
    nodes = []
    for index, (kind, layout) in enumerate(operands):
        node = graph.placeholder(f"x{index}")
        node.meta["type"] = kind
        layouts[node] = (layout,)
        nodes.append(node)
    out = graph.call_function(op, (*nodes, *constants), kwargs)
    out.meta["type"] = result[0]
    layouts[out] = (result[1],)
    graph.output((out,))
    inputs = tuple(Input(node.name, InputKind.USER) for node in nodes)
    return Program("one_op", graph, inputs, (Output(),), mesh=mesh, layouts=layouts)


def values(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small integers: exact in every dtype, whatever the order of a sum."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(-9, 10, tuple(shape), generator=generator)
    return whole > 0 if dtype is torch.bool else whole.to(dtype)


def run(program: Program, *tensors: torch.Tensor) -> list[torch.Tensor]:
    inputs = scatter_inputs(program, tensors, poison=True)
    return run_partial(program, *inputs)


def run_partial(program: Program, *inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    (output,) = run_lockstep(program, inputs, poison=True, check=True)
    return [x for x in output if x is not None]


def agree(program: Program, found: list[torch.Tensor], whole: torch.Tensor) -> None:
    """`found` is `whole` in the layout of the program's result, pads of floats aside."""
    node = program.results[0]
    assert isinstance(node, fx.Node)
    layout = program.layout(node)
    expected = chunks.scatter(whole, layout, program.the_mesh)
    if whole.is_floating_point():
        expected = chunks.poison_pads(expected, layout, program.the_mesh)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
    (assembled,) = assemble_outputs(program, [found])
    assert assembled is not None
    assert torch.equal(assembled, whole)


@st.composite
def shards(draw: st.DrawFn, dims: int = 2) -> tuple[tuple[int, ...], list[Shard]]:
    """A shape and one shard for each of its first `dims` dims, in random order of dims."""
    shape, found = [], []
    for dim in range(dims):
        outer = draw(st.sampled_from([1, 1, 2]))
        size = draw(st.integers(1, 7))
        inner = draw(st.sampled_from([1, 1, 3]))
        shape.append(outer * size * inner)
        found.append(Shard(dim, outer, size))
    shape.append(draw(st.integers(1, 3)))
    return tuple(shape), found


def joint(mesh: Mesh, placement: Placement) -> Layout:
    return Layout((placement,) * len(mesh.names))


cases = settings(max_examples=40)
meshes = st.sampled_from([*LINES, *GRIDS])
lines = st.sampled_from(LINES)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 99)


@cases
@given(meshes, shards(), dtypes, seeds)
def test_all_gather(
    mesh: Mesh, cut: tuple[tuple[int, ...], list[Shard]], dtype: torch.dtype, seed: int
) -> None:
    shape, (_, shard) = cut
    kind = TensorType(shape, dtype)
    program = one_op(
        mesh,
        dialect.ALL_GATHER,
        [(kind, joint(mesh, shard))],
        (kind, joint(mesh, REPLICATE)),
        shard=shard,
        axes=mesh.names,
    )
    whole = values(shape, dtype, seed)
    agree(program, run(program, whole), whole)


@cases
@given(meshes, shards(), dtypes, seeds)
def test_shard(
    mesh: Mesh, cut: tuple[tuple[int, ...], list[Shard]], dtype: torch.dtype, seed: int
) -> None:
    shape, (_, shard) = cut
    kind = TensorType(shape, dtype)
    program = one_op(
        mesh,
        dialect.SHARD,
        [(kind, joint(mesh, REPLICATE))],
        (kind, joint(mesh, shard)),
        shard=shard,
        axes=mesh.names,
    )
    whole = values(shape, dtype, seed)
    agree(program, run(program, whole), whole)


@cases
@given(lines, shards(), dtypes, seeds, st.booleans())
def test_all_to_all(
    mesh: Mesh,
    cut: tuple[tuple[int, ...], list[Shard]],
    dtype: torch.dtype,
    seed: int,
    backwards: bool,
) -> None:
    shape, found = cut
    split, concat = reversed(found) if backwards else found
    kind = TensorType(shape, dtype)
    program = one_op(
        mesh,
        dialect.ALL_TO_ALL,
        [(kind, Layout((concat,)))],
        (kind, Layout((split,))),
        split=split,
        concat=concat,
        axes=mesh.names,
    )
    whole = values(shape, dtype, seed)
    agree(program, run(program, whole), whole)


REDUCTIONS = [
    (op, dtype)
    for op in ("sum", "max", "min", "avg")
    for dtype in DTYPES
    if dtype.is_floating_point or op != "avg"
]


@cases
@given(meshes, shards(), st.sampled_from(REDUCTIONS), seeds)
def test_reduce_scatter(
    mesh: Mesh,
    cut: tuple[tuple[int, ...], list[Shard]],
    reduction: tuple[str, torch.dtype],
    seed: int,
) -> None:
    shape, (_, shard) = cut
    op, dtype = reduction
    kind = TensorType(shape, dtype)
    program = one_op(
        mesh,
        dialect.REDUCE_SCATTER,
        [(kind, joint(mesh, Partial(op)))],
        (kind, joint(mesh, shard)),
        op=op,
        shard=shard,
        axes=mesh.names,
    )
    parts = [values(shape, dtype, seed + rank) for rank in range(mesh.size)]
    agree(program, run_partial(program, parts), chunks.reduce_values(parts, op))


@cases
@given(meshes, st.lists(st.integers(1, 4), max_size=3), st.sampled_from(REDUCTIONS), seeds)
def test_all_reduce(
    mesh: Mesh, shape: list[int], reduction: tuple[str, torch.dtype], seed: int
) -> None:
    op, dtype = reduction
    kind = TensorType(tuple(shape), dtype)
    layouts = joint(mesh, Partial(op)), joint(mesh, REPLICATE)
    program = one_op(
        mesh, dialect.ALL_REDUCE, [(kind, layouts[0])], (kind, layouts[1]), op=op, axes=mesh.names
    )
    parts = [values(shape, dtype, seed + rank) for rank in range(mesh.size)]
    agree(program, run_partial(program, parts), chunks.reduce_values(parts, op))


@cases
@given(
    meshes,
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([*DTYPES, torch.float8_e4m3fn]),
    st.data(),
)
def test_broadcast(mesh: Mesh, shape: list[int], dtype: torch.dtype, data: st.DataObject) -> None:
    axis = data.draw(st.sampled_from(mesh.names))
    owner = data.draw(st.integers(0, mesh.axis_size(axis) - 1))
    kind = TensorType(tuple(shape), dtype)
    whole = joint(mesh, REPLICATE)
    program = one_op(
        mesh,
        dialect.BROADCAST,
        [(kind, whole.replace(mesh.index(axis), Owner(owner)))],
        (kind, whole),
        owner=owner,
        axes=(axis,),
    )
    tensor = values(shape, torch.float32, 0).to(dtype)
    for local in run(program, tensor):
        assert local.dtype == dtype
        assert torch.equal(local.float(), tensor.float())


@cases
@given(meshes, shards(), dtypes, seeds)
def test_mask_pad(
    mesh: Mesh, cut: tuple[tuple[int, ...], list[Shard]], dtype: torch.dtype, seed: int
) -> None:
    shape, (_, shard) = cut
    kind = (TensorType(shape, dtype), joint(mesh, shard))
    program = one_op(mesh, dialect.MASK_PAD, [kind], kind, shard=shard, axes=mesh.names, value=0)
    whole = values(shape, dtype, seed)
    for rank, local in enumerate(run(program, whole)):
        expected = chunks.scatter(whole, kind[1], mesh)[rank]
        assert torch.equal(local, chunks.fill_pads(expected, shard, mesh.size, rank, 0))


@cases
@given(lines, shards(), st.integers(-3, 3), st.booleans(), st.booleans(), dtypes)
def test_triangles(
    mesh: Mesh,
    cut: tuple[tuple[int, ...], list[Shard]],
    diagonal: int,
    lower: bool,
    columns: bool,
    dtype: torch.dtype,
) -> None:
    shape, (_, found) = cut  # of dims [0, 1, 2], cut dim 1: rows as it is, columns if transposed
    shard = Shard(2, found.outer, found.size) if columns else found
    tensor = values(shape, dtype, 1)
    if columns:
        tensor = tensor.transpose(1, 2).contiguous()
    kind = (TensorType(tuple(tensor.shape), dtype), Layout((shard,)))
    op, whole = (dialect.TRIL, torch.tril) if lower else (dialect.TRIU, torch.triu)
    program = one_op(mesh, op, [kind], kind, diagonal, shard=shard, axes=mesh.names)
    (found_whole,) = assemble_outputs(program, [run(program, tensor)])
    assert found_whole is not None
    assert torch.equal(found_whole, whole(tensor, diagonal))


@cases
@given(lines, st.integers(1, 9), st.lists(st.integers(0, 99), min_size=1, max_size=6), st.data())
def test_lookup_by_ids(mesh: Mesh, size: int, picks: list[int], data: st.DataObject) -> None:
    ids = torch.tensor(picks) % size
    dim = data.draw(st.integers(0, 1))
    table = values((size, 3) if dim == 0 else (3, size), torch.float32, 5)
    kinds = (
        (TensorType(tuple(table.shape), table.dtype), Layout((Shard(dim, 1, size),))),
        (TensorType(tuple(ids.shape), ids.dtype), Layout((REPLICATE,))),
    )
    looked_up = table.index_select(dim, ids)
    result = (TensorType(tuple(looked_up.shape), table.dtype), Layout((Partial(),)))
    options = {"dim": dim, "size": size, "axes": mesh.names}
    zeroed = one_op(mesh, dialect.TAKE, kinds, result, fill_zero=True, **options)
    rows = run(zeroed, table, ids)
    assert torch.equal(sum(rows, torch.zeros(())), looked_up)

    owned = one_op(
        mesh,
        dialect.OWNED_ROWS,
        kinds[1:],
        (TensorType((len(picks),), torch.bool), Layout((REPLICATE,))),
        by="ids",
        rows=len(picks),
        size=size,
        axes=mesh.names,
    )
    masks = run(owned, ids)
    assert torch.equal(torch.stack(masks).sum(0), torch.ones(len(picks), dtype=torch.int64))
    raw = run(one_op(mesh, dialect.TAKE, kinds, result, **options), table, ids)
    masked = [mesh_ops.mask_rows(x, mask, dim=dim) for x, mask in zip(raw, masks, strict=True)]
    for mine, other in zip(masked, rows, strict=True):
        assert torch.equal(mine, other)


@cases
@given(lines, shards(), st.lists(st.integers(0, 99), min_size=1, max_size=9), st.integers(-1, 3))
def test_rows_are_added_where_their_ids_point(
    mesh: Mesh,
    cut: tuple[tuple[int, ...], list[Shard]],
    picks: list[int],
    padding: int,
) -> None:
    (_, size, _), (_, found) = cut
    shard = Shard(0, found.outer, found.size)
    ids = torch.tensor(picks) % size
    rows = values((len(picks), 3), torch.float32, 3)
    whole = torch.ops.aten.embedding_dense_backward(rows, ids, size, padding, False)
    replicated = Layout((REPLICATE,))
    kinds = [(TensorType(tuple(x.shape), x.dtype), replicated) for x in (rows, ids)]
    result = (TensorType((size, 3), torch.float32), Layout((shard,)))
    options = {"size": size, "padding": padding, "shard": shard, "axes": mesh.names}
    program = one_op(mesh, dialect.ADD_ROWS, kinds, result, **options)
    (added,) = assemble_outputs(program, [run(program, rows, ids)])
    assert added is not None
    torch.testing.assert_close(added, whole)


@cases
@given(lines, st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(0, 2))
def test_rows_by_offsets(mesh: Mesh, counts: list[int], beyond: int) -> None:
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    rows = sum(counts) + beyond
    size = len(counts)
    expected = torch.full((mesh.size, rows), False)
    units = math.ceil(size / mesh.size)
    row = 0
    for entry, count in enumerate(counts):
        expected[entry // units, row : row + count] = True
        row += count
    masks = [
        mesh_ops.owned_rows(
            offsets, by="offsets", rows=rows, size=size, parts=mesh.size, index=index
        )
        for index in range(mesh.size)
    ]
    assert torch.equal(torch.stack(masks), expected)


def test_take_keeps_the_dims_of_ids() -> None:
    table, ids = torch.arange(12.0).reshape(6, 2), torch.tensor([[5, 0, 3]])
    found = sum(
        mesh_ops.take(
            table[2 * i : 2 * i + 2], ids, dim=0, size=6, parts=3, index=i, fill_zero=True
        )
        for i in range(3)
    )
    assert torch.equal(torch.as_tensor(found), table[ids])


def test_masked_rows_may_be_a_factor_of_the_dim() -> None:
    owned = torch.tensor([True, False])
    found = mesh_ops.mask_rows(torch.full((12,), math.nan), owned, dim=0, outer=2)
    assert found.isnan().tolist() == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("op", [dialect.ALL_TO_ALL, dialect.BROADCAST])
def test_ops_of_one_axis_refuse_two(op: MeshOp) -> None:
    mesh = GRIDS[0]
    kind = (TensorType((4, 4), torch.float32), joint(mesh, REPLICATE))
    program = one_op(
        mesh,
        op,
        [kind],
        kind,
        axes=mesh.names,
        owner=0,
        split=Shard(0, 1, 4),
        concat=Shard(1, 1, 4),
    )
    with pytest.raises(ValueError, match="runs over one axis"):
        run(program, torch.zeros(4, 4))
