"""Rules of ops that read or write at integer positions: embedding, index, gather, scatter.

The dim that integers point into stays whole, and all other dims shard freely. Where a single
tensor of ids picks rows of a table, the table may shard by rows as well (`Select`): each rank then
picks the rows it has. The rows are routed where they form a dim of the result of their own
(`dim >= 0`), and otherwise zero on all ranks but one, so that the result is partial.

Reads are linear in what they read. Of the writes only additions are linear: where ids repeat,
ranks may disagree on which of the rows replaces the others. Reads by boolean masks have shapes that
depend on data and are refused before rules are asked; here they merely get the replicated rule.
"""

from __future__ import annotations

import torch

from rolemesh.compiler.ir.dialect import ADD_ROWS, PICK, TAKE
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.rule import Kind, Lookup, OpCall, Rule, RuleBuilder, Select
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.arguments import argument, dim_argument, int_argument
from rolemesh.passes.rules.creation import row_axes
from rolemesh.passes.rules.registry import (
    LocalCall,
    LocalForm,
    LocalFunction,
    RuleFunction,
    replicated_rule,
)

__all__ = ["LOCAL", "RULES", "table_axes"]

_Dim = tuple[int, ...]

_ADD = ((True, False, True),)
"""A write that adds: linear in the operand written to and the source, both partial."""

_MASKS = (torch.bool, torch.uint8)


def _read(operands: int, table: TensorType) -> tuple[tuple[bool, ...], ...]:
    """Linear in the table; sums of booleans are not what a partial value means."""
    return () if table.dtype is torch.bool else ((True, *(False,) * (operands - 1)),)


# ---------------------------------------------------------------------------------- tables of rows


def embedding(call: OpCall) -> Rule:
    """`aten.embedding(weight, ids, ...)`: `[V, D]` by `[*ids]` gives `[*ids, D]`."""
    weight, ids = call.operands
    builder = RuleBuilder()
    vocabulary = builder.factor(weight.shape[0], Kind.REDUCE)
    features = builder.factor(weight.shape[1])
    rows = builder.dims(ids.shape)
    return builder.build(
        [[vocabulary, features], rows],
        [[*rows, features]],
        linear=((True, False),),
        select=Select(vocabulary[0], operand=1, by="ids"),
    )


def embedding_dense_backward(call: OpCall) -> Rule:
    """`aten.embedding_dense_backward(grad, ids, V, padding_idx, scale_by_freq)` gives `[V, D]`.

    It sums over the ids, and makes a chunk of the rows by the ids that point into it; unless it
    divides by how often each occurs among all of them.
    """
    grad, ids = call.operands
    scaled = bool(argument(call, 4, "scale_grad_by_freq", False))
    builder = RuleBuilder()
    rows = builder.dims(ids.shape, Kind.REPLICATE if scaled else Kind.REDUCE)
    features = builder.factor(grad.shape[-1])
    kind = Kind.REPLICATE if scaled else Kind.PASS
    vocabulary = builder.factor(call.results[0].shape[0], kind)
    return builder.build(
        [[*rows, features], rows],
        [[vocabulary, features]],
        linear=((True, False),),
        joint=vocabulary,
    )


def index_select(call: OpCall) -> Rule:
    """`aten.index_select(x, dim, ids)`; ids of no dim give a dim of extent one."""
    table, ids = call.operands
    if not table.shape:
        return replicated_rule(call)
    dim = dim_argument(call, 1, table.ndim)
    # One id still makes a dim here, unlike in `mesh.take`, so only a list of ids selects.
    selects = bool(ids.shape) and table.dtype is not torch.bool
    builder = RuleBuilder()
    picked = builder.factor(table.shape[dim], Kind.REDUCE if selects else Kind.REPLICATE)
    rows = builder.factor(call.results[0].shape[dim])
    kept = [() if k == dim else builder.factor(n) for k, n in enumerate(table.shape)]
    return builder.build(
        [[*kept[:dim], picked, *kept[dim + 1 :]], [rows] if ids.shape else []],
        [[*kept[:dim], rows, *kept[dim + 1 :]]],
        linear=_read(2, table),
        select=Select(picked[0], 1, "ids", dim) if selects else None,
    )


# ------------------------------------------------------------------------- x[i, :, j] and x[i] = v


def _subscripts(call: OpCall) -> list[tuple[int, TensorType]]:
    """Index tensors of `x[...]` with the dim of x that each one points into."""
    entries = argument(call, 1, "indices")
    assert isinstance(entries, list | tuple)
    return [(dim, entry) for dim, entry in enumerate(entries) if isinstance(entry, TensorType)]


def _has_mask(subscripts: list[tuple[int, TensorType]]) -> bool:
    return any(ids.dtype in _MASKS for _, ids in subscripts)


def _broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    if len(shapes) == 1:
        return shapes[0]
    found = [1] * max(map(len, shapes))
    for shape in shapes:
        for place in range(1, len(shape) + 1):
            if shape[-place] != 1:
                found[-place] = shape[-place]
    return tuple(found)


def _align(dims: list[_Dim], shape: tuple[int, ...], value: TensorType) -> list[_Dim]:
    """Dims of a value that broadcasts to `shape`: those it does not stretch, in place."""
    skipped = len(shape) - value.ndim
    return [dims[skipped + k] if n == shape[skipped + k] else () for k, n in enumerate(value.shape)]


def _inserted(
    dims: list[_Dim], subscripts: list[tuple[int, TensorType]], rows: list[_Dim]
) -> tuple[list[_Dim], int]:
    """Dims of `x[...]`, and where those of the index tensors start.

    They replace the dims pointed into if these are neighbours, and stand in front otherwise, as in
    NumPy.
    """
    pointed = [dim for dim, _ in subscripts]
    first, last = pointed[0], pointed[-1]
    if last - first + 1 == len(pointed):
        return [*dims[:first], *rows, *dims[last + 1 :]], first
    return [*rows, *(d for k, d in enumerate(dims) if k not in pointed)], 0


def index(call: OpCall) -> Rule:
    """`aten.index(x, [ids or None, ...])`."""
    table = call.operands[0]
    subscripts = _subscripts(call)
    if _has_mask(subscripts) or not subscripts:
        return replicated_rule(call)
    selects = len(subscripts) == 1 and table.dtype is not torch.bool
    pointed = {dim for dim, _ in subscripts}
    builder = RuleBuilder()
    kind = Kind.REDUCE if selects else Kind.REPLICATE
    dims = [builder.factor(n, kind if k in pointed else Kind.PASS)
            for k, n in enumerate(table.shape)]  # fmt: skip
    shape = _broadcast([ids.shape for _, ids in subscripts])
    rows = builder.dims(shape)
    result, start = _inserted(dims, subscripts, rows)
    return builder.build(
        [dims, *(_align(rows, shape, ids) for _, ids in subscripts)],
        [result],
        linear=_read(len(call.operands), table),
        select=Select(dims[start][0], 1, "ids", start if len(shape) == 1 else -1)
        if selects
        else None,
    )


def index_put(call: OpCall) -> Rule:
    """`aten.index_put(x, [ids or None, ...], values, accumulate=False)`.

    The dims of the ids stay whole: every rank that holds a part of x needs all rows for it.
    """
    table, values = call.operands[0], call.operands[-1]
    subscripts = _subscripts(call)
    if _has_mask(subscripts):
        return _masked_put(call, subscripts)
    if not subscripts:
        return replicated_rule(call)
    pointed = {dim for dim, _ in subscripts}
    builder = RuleBuilder()
    dims = [builder.factor(n, Kind.REPLICATE if k in pointed else Kind.PASS)
            for k, n in enumerate(table.shape)]  # fmt: skip
    shape = _broadcast([ids.shape for _, ids in subscripts])
    rows = builder.dims(shape, Kind.REPLICATE)
    places, _ = _inserted(dims, subscripts, rows)
    extents = tuple([builder.sizes[factors[0]] for factors in places])
    linear: tuple[tuple[bool, ...], ...] = ()
    if argument(call, 3, "accumulate", False):
        linear = ((True, *(False,) * len(subscripts), True),)
    return builder.build(
        [
            dims,
            *(_align(rows, shape, ids) for _, ids in subscripts),
            _align(places, extents, values),
        ],
        [dims],
        linear=linear,
    )


def _masked_put(call: OpCall, subscripts: list[tuple[int, TensorType]]) -> Rule:
    """`x[mask] = value`: elementwise for one mask and one value, else in the order of true ones."""
    table, values = call.operands[0], call.operands[-1]
    at, mask = subscripts[0]
    if len(subscripts) > 1 or any(n != 1 for n in values.shape):
        return replicated_rule(call)
    builder = RuleBuilder()
    dims = builder.dims(table.shape)
    return builder.build([dims, dims[at : at + mask.ndim], [()] * values.ndim], [dims])


# ------------------------------------------------------------------------------ gather and scatter


def gather(call: OpCall) -> Rule:
    """`aten.gather(x, dim, ids)`: the ids may cover only the front part of x's other dims.

    A shard of the dim gives what its ids point to, and zeros.
    """
    table, ids = call.operands
    if not table.shape or not ids.shape:
        return replicated_rule(call)
    dim = dim_argument(call, 1, table.ndim)
    builder = RuleBuilder()
    dims: list[_Dim] = []
    places: list[_Dim] = []
    selects = table.dtype is not torch.bool
    for k, (n, m) in enumerate(zip(table.shape, ids.shape, strict=True)):
        if k == dim:
            dims.append(builder.factor(n, Kind.REDUCE if selects else Kind.REPLICATE))
            places.append(builder.factor(m))
        elif n == m:
            dims.append(builder.factor(n))
            places.append(dims[-1])
        else:
            dims.append(builder.factor(n, Kind.REPLICATE))
            places.append(builder.factor(m, Kind.REPLICATE))
    return builder.build(
        [dims, places],
        [places],
        linear=_read(2, table),
        select=Select(dims[dim][0], operand=1, by="ids") if selects else None,
    )


def take_along_dim(call: OpCall) -> Rule:
    """`aten.take_along_dim(x, ids, dim=None)`: as gather, but x and the ids broadcast."""
    table, ids = call.operands
    dim = argument(call, 2, "dim")
    if not isinstance(dim, int) or not table.shape:
        return replicated_rule(call)
    dim %= table.ndim
    shape = call.results[0].shape
    builder = RuleBuilder()
    places = builder.dims(shape)
    dims = _align(places, shape, table)
    dims[dim] = builder.factor(table.shape[dim], Kind.REPLICATE)
    return builder.build([dims, _align(places, shape, ids)], [places], linear=_read(2, table))


def take(call: OpCall) -> Rule:
    """`aten.take(x, ids)`: x as if it had one dim."""
    table, ids = call.operands
    builder = RuleBuilder()
    dims = builder.dims(table.shape, Kind.REPLICATE)
    places = builder.dims(ids.shape)
    return builder.build([dims, places], [places], linear=_read(2, table))


def scatter(call: OpCall) -> Rule:
    """`aten.scatter(x, dim, ids, src or value)` and its variants.

    Ids and src may cover only the front part of a dim; then it stays whole.
    """
    table, ids, *sources = call.operands
    if not table.shape or not ids.shape or any(not source.shape for source in sources):
        return replicated_rule(call)
    dim = dim_argument(call, 1, table.ndim)
    values = (ids, *sources)
    builder = RuleBuilder()
    dims: list[_Dim] = []
    places: list[list[_Dim]] = [[] for _ in values]
    for k, n in enumerate(table.shape):
        passes = k != dim and all(value.shape[k] == n for value in values)
        dims.append(builder.factor(n, Kind.PASS if passes else Kind.REPLICATE))
        for place, value in zip(places, values, strict=True):
            whole = () if passes else builder.factor(value.shape[k], Kind.REPLICATE)
            place.append(dims[-1] if passes else whole)
    return builder.build([dims, *places], [dims], linear=_ADD if _adds(call) else ())


def _adds(call: OpCall) -> bool:
    """Whether a scatter adds a source tensor to what is there."""
    if len(call.operands) != 3:
        return False
    if call.target._schema.name == "aten::scatter_add":
        return True
    # `sum` of scatter_reduce leaves out x where include_self is false, which is linear as well.
    return argument(call, 4, "reduce") in ("sum", "add")


def index_write(call: OpCall) -> Rule:
    """`aten.index_{add,copy,reduce,fill}(x, dim, ids, source or value)`."""
    table, ids, *sources = call.operands
    if not table.shape:
        return replicated_rule(call)
    dim = dim_argument(call, 1, table.ndim)
    builder = RuleBuilder()
    dims = [builder.factor(n, Kind.REPLICATE if k == dim else Kind.PASS)
            for k, n in enumerate(table.shape)]  # fmt: skip
    rows = builder.dims(ids.shape, Kind.REPLICATE)
    placed: list[list[_Dim]] = []
    for source in sources:
        if source.ndim == table.ndim:
            row = rows[0] if rows else builder.factor(source.shape[dim], Kind.REPLICATE)
            placed.append([*dims[:dim], row, *dims[dim + 1 :]])
        else:  # a value of no dim, or the one row that an id of no dim writes
            placed.append(builder.dims(source.shape, Kind.REPLICATE))
    linear = _ADD if call.target._schema.name == "aten::index_add" else ()
    return builder.build([dims, rows, *placed], [dims], linear=linear)


def bucketize(call: OpCall) -> Rule:
    """`aten.bucketize(x, boundaries)`: for each value the number of boundaries below it."""
    values, boundaries = call.operands
    builder = RuleBuilder()
    dims = builder.dims(values.shape)
    return builder.build([dims, builder.dims(boundaries.shape, Kind.REPLICATE)], [dims])


def one_hot(call: OpCall) -> Rule:
    """`aten.one_hot(ids, num_classes=-1)`; without a number of classes it looks at all ids."""
    ids = call.operands[0]
    counted = argument(call, 1, "num_classes", -1) == -1
    builder = RuleBuilder()
    dims = builder.dims(ids.shape, Kind.REPLICATE if counted else Kind.PASS)
    classes = builder.factor(call.results[0].shape[-1], Kind.REPLICATE)
    return builder.build([dims], [[*dims, classes]])


# ------------------------------------------------------------------------------------- local forms


def table_axes(local: LocalCall, layout: Layout | None) -> tuple[str, ...]:
    """Names of the axes that split the rows of a table that is looked up in, major to minor.

    Args:
        local: The call.
        layout: That of the table, or of the result that has its rows.
    """
    axes = [axis for axis, choice in enumerate(local.choices) if isinstance(choice, Lookup)]
    assert layout is not None
    layout = layout.canonical(local.mesh)
    shards: list[tuple[int, int]] = []
    for axis in axes:
        shard = layout.placements[axis]
        assert isinstance(shard, Shard)
        shards.append((shard.outer, axis))
    shards.sort()  # ranks are numbered by the digits they hold, which need not be in mesh order
    return tuple(local.mesh.names[axis] for _, axis in shards)


def _take(local: LocalCall, ids: object) -> LocalForm:
    """`mesh.take` where the table is sharded by rows, and the op as it stands elsewhere."""
    select, axes = local.rule.select, table_axes(local, local.operand_layouts[0])
    if select is None or not axes:
        return local.call.target, local.args, local.kwargs
    rows = (select.factor,)
    dim = next(d for d, factors in enumerate(local.rule.operands[0]) if factors == rows)
    kwargs: dict[str, object] = {
        "dim": dim,
        "size": local.call.operands[0].shape[dim],
        "axes": axes,
    }
    if select.dim < 0:
        kwargs["fill_zero"] = True
    return TAKE, (local.args[0], ids), kwargs


def embedding_local(local: LocalCall) -> LocalForm:
    """`embedding(weight, ids)` on a part of the vocabulary."""
    return _take(local, local.args[1])


def embedding_backward_local(local: LocalCall) -> LocalForm:
    """`mesh.add_rows` where the rows of the table are sharded."""
    found = row_axes(local.result_layouts[0], 0, local.mesh, str(local.call.target))
    if found is None:
        return local.call.target, local.args, local.kwargs
    shard, axes = found
    size, padding = local.call.results[0].shape[0], int_argument(local.call, 3, "padding_idx", -1)
    kwargs = {"size": size, "padding": padding, "shard": shard, "axes": axes}
    return ADD_ROWS, local.args[:2], kwargs


def gather_local(local: LocalCall) -> LocalForm:
    """`mesh.pick` where the dim is sharded, and the op as it stands elsewhere."""
    select = local.rule.select
    axes = table_axes(local, local.operand_layouts[0])
    if select is None or not axes:
        return local.call.target, local.args, local.kwargs
    dim = next(d for d, f in enumerate(local.rule.operands[0]) if f == (select.factor,))
    size = local.call.operands[0].shape[dim]
    return PICK, (local.args[0], local.args[2]), {"dim": dim, "size": size, "axes": axes}


def index_select_local(local: LocalCall) -> LocalForm:
    """`index_select(x, dim, ids)` on a part of the rows."""
    return _take(local, local.args[2])


def index_local(local: LocalCall) -> LocalForm:
    """`x[:, ids]` on a part of the rows."""
    entries = local.args[1]
    assert isinstance(entries, list | tuple)
    return _take(local, next((entry for entry in entries if entry is not None), None))


_WRITES = ("index_add", "index_copy", "index_reduce", "index_fill")
_SCATTERS = ("scatter", "scatter_add", "scatter_reduce")

RULES: dict[str, RuleFunction] = {
    "aten::embedding": embedding,
    "aten::embedding_dense_backward": embedding_dense_backward,
    "aten::index_select": index_select,
    "aten::index.Tensor": index,
    "aten::_unsafe_index.Tensor": index,
    "aten::index_put": index_put,
    "aten::_unsafe_index_put": index_put,
    "aten::gather": gather,
    "aten::take_along_dim": take_along_dim,
    "aten::take": take,
    "aten::one_hot": one_hot,
    "aten::bucketize.Tensor": bucketize,
    **{f"aten::{name}": scatter for name in _SCATTERS},
    **{f"aten::{name}": index_write for name in _WRITES},
}
LOCAL: dict[str, LocalFunction] = {
    "aten::embedding": embedding_local,
    "aten::embedding_dense_backward": embedding_backward_local,
    "aten::gather": gather_local,
    "aten::index_select": index_select_local,
    "aten::index.Tensor": index_local,
    "aten::_unsafe_index.Tensor": index_local,
}
