"""Mutated inputs of a flat graph: writes that touch only what changes.

In a functional graph the new value of a cache is a result. GE writes it into the memory of the
input: the graph ends with `copy_(input, value)` (`lowering.write_back`). torchair drops that copy,
and the one that a functional write starts with, where the write is one of the ops that GE has in
place. A write of rows into a cache (`index_copy`, `index_put`, a slice) is rewritten here into such
an op, ScatterNdUpdate, so that a step moves the new rows and never the cache.

Invariant: the rewritten graph computes the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from rolemesh.lowering.npu.define import define_npu_ops

__all__ = ["write_rows_in_place"]

_aten = torch.ops.aten


def write_rows_in_place(graph: fx.Graph, mutated: Mapping[int, int]) -> None:
    """Rewrite writes into mutated inputs so that GE does them in place.

    Args:
        graph: A flat graph whose nodes have `meta["val"]`; changed.
        mutated: By index of an output that is the new value of an input, the index of that input.
    """
    define_npu_ops()
    place = {node: index for index, node in enumerate(graph.nodes)}
    new = _Builder(graph)
    for write in sorted(_writes(graph, mutated), key=place.__getitem__):
        new.before(write)
        rows = _ROWS[write.target](new, write)
        if rows is not None:
            done = graph.call_function(torch.ops.npu.npu_scatter_nd_update.default, rows)
            write.prepend(done)
            done.meta.update({key: write.meta[key] for key in ("val", "origin")})
            write.replace_all_uses_with(done)
            graph.erase_node(write)


def _writes(graph: fx.Graph, mutated: Mapping[int, int]) -> Iterator[fx.Node]:
    """Writes of rows into a mutated input, or into the result of such a write."""
    inputs = graph.find_nodes(op="placeholder")
    results = graph.output_node().args[0]
    assert isinstance(results, tuple | list)
    for output, position in mutated.items():
        value = results[output]
        while isinstance(value, fx.Node) and value.target in _ROWS:
            yield value
            value = value.args[0]
            if value is inputs[position]:
                break


class _Builder:
    """Adds nodes with values before the node of the day; equal nodes once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[object, fx.Node] = {}

    def before(self, anchor: fx.Node) -> None:
        """Add what comes before `anchor`, which stands after all earlier ones."""
        self.anchor = anchor

    def __call__(self, target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        key = (target, args, tuple(kwargs.items()))
        if key not in self.made:
            with self.graph.inserting_before(self.anchor):
                node = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
            values = fx.map_arg(node.args, lambda operand: operand.meta["val"])
            with self.anchor.meta["val"].fake_mode:
                node.meta["val"] = target(*values, **kwargs)
            node.meta["origin"] = self.anchor.meta.get("origin")
            self.made[key] = node
        return self.made[key]


_Rows = tuple[fx.Node, fx.Node, fx.Node]
"""The tensor written to, indices `[N, k]` over its first k dims, and updates `[N, ...]`."""

_Size = int | fx.Node
"""A size that the graph knows, or the node that reads it."""


def _index_copy(new: _Builder, write: fx.Node) -> _Rows | None:
    base, dim, index, source = write.args
    assert isinstance(base, fx.Node)
    assert isinstance(index, fx.Node)
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    if index.meta["val"].ndim != 1:
        return None
    return _rows(new, base, dim % base.meta["val"].ndim, index, source)


def _index_put(new: _Builder, write: fx.Node) -> _Rows | None:
    base, indices, source, *rest = write.args
    assert isinstance(base, fx.Node)
    assert isinstance(source, fx.Node)
    assert isinstance(indices, tuple | list)
    accumulate = rest[0] if rest else write.kwargs.get("accumulate", False)
    given = [(dim, index) for dim, index in enumerate(indices) if isinstance(index, fx.Node)]
    if accumulate or any(index.meta["val"].dtype is torch.bool for _, index in given):
        return None
    sizes = _sizes(new, base)
    if len(given) == 1 and given[0][1].meta["val"].ndim == 1:
        ((dim, index),) = given
        index = _from_front(new, index, sizes[dim])
        whole = (*sizes[:dim], *_sizes(new, index), *sizes[dim + 1 :])
        return _rows(new, base, dim, index, _expanded(new, source, whole))
    together = _together(new, [index for _, index in given])
    if together is None or [dim for dim, _ in given] != list(range(len(given))):
        return None
    columns = []
    for dim, index in given:
        column = _expanded(new, _from_front(new, index, sizes[dim]), together)
        columns.append(new(_aten.reshape.default, column, (-1, 1)))
    inner = sizes[len(given) :]
    updates = new(_aten.reshape.default, _expanded(new, source, (*together, *inner)), (-1, *inner))
    return base, _joined(new, columns), updates


def _slice_scatter(new: _Builder, write: fx.Node) -> _Rows | None:
    base, source, *rest = write.args
    assert isinstance(base, fx.Node)
    assert isinstance(source, fx.Node)
    given = {**dict(zip(("dim", "start", "end", "step"), rest, strict=False)), **write.kwargs}
    dim, start, step = given.get("dim", 0), given.get("start") or 0, given.get("step", 1)
    value, rows = base.meta["val"], source.meta["val"].shape
    if not (isinstance(dim, int) and isinstance(start, int) and isinstance(step, int)):
        return None
    dim = dim % value.ndim
    extent, count = value.shape[dim], rows[dim]
    if not (isinstance(extent, int) and isinstance(count, int)):
        return None
    first = start + extent if start < 0 else start
    positions = (first, first + count * step, step)
    index = new(_aten.arange.start_step, *positions, dtype=torch.int64, device=value.device)
    return _rows(new, base, dim, index, source)


def _rows(new: _Builder, base: fx.Node, dim: int, index: fx.Node, source: fx.Node) -> _Rows:
    """Rows `index` (from the front) of one dim, for all places of the dims before it."""
    place, sizes = index.meta["val"], _sizes(new, base)
    together = (*sizes[:dim], *_sizes(new, index))
    columns = []
    for axis, extent in enumerate(sizes[:dim]):
        positions = new(_aten.arange.default, extent, dtype=place.dtype, device=place.device)
        columns.append(_column(new, positions, axis, together))
    columns.append(_column(new, index, dim, together))
    updates = new(_aten.reshape.default, source, (-1, *sizes[dim + 1 :])) if dim else source
    return base, _joined(new, columns), updates


def _column(new: _Builder, positions: fx.Node, axis: int, shape: tuple[_Size, ...]) -> fx.Node:
    """`positions` along `axis` of `shape`, repeated over the other dims, as `[N, 1]`."""
    if len(shape) > 1:
        ones: list[_Size] = [1] * len(shape)
        ones[axis] = -1
        positions = new(_aten.reshape.default, positions, tuple(ones))
        positions = _expanded(new, positions, shape)
    return new(_aten.reshape.default, positions, (-1, 1))


def _sizes(new: _Builder, node: fx.Node) -> tuple[_Size, ...]:
    shape = node.meta["val"].shape
    return tuple(
        size if isinstance(size, int) else new(_aten.sym_size.int, node, dim)
        for dim, size in enumerate(shape)
    )


def _together(new: _Builder, indices: Sequence[fx.Node]) -> tuple[_Size, ...] | None:
    """The shape that indices broadcast to; None if it depends on sizes that are not known."""
    shapes = [index.meta["val"].shape for index in indices]
    if indices and all(statically_known_true(sym_eq(shape, shapes[0])) for shape in shapes):
        return _sizes(new, indices[0])
    if any(not isinstance(size, int) for shape in shapes for size in shape):
        return None
    return tuple(torch.broadcast_shapes(*shapes))


def _expanded(new: _Builder, node: fx.Node, shape: tuple[_Size, ...]) -> fx.Node:
    wanted = [size.meta["val"] if isinstance(size, fx.Node) else size for size in shape]
    found = list(node.meta["val"].shape)
    if len(found) == len(wanted) and statically_known_true(sym_eq(found, wanted)):
        return node
    return new(_aten.expand.default, node, shape)


def _joined(new: _Builder, columns: Sequence[fx.Node]) -> fx.Node:
    return columns[0] if len(columns) == 1 else new(_aten.cat.default, tuple(columns), 1)


def _from_front(new: _Builder, index: fx.Node, extent: _Size) -> fx.Node:
    """Positions in a dim, counted from its front; ATen also takes them from its end."""
    negative = new(_aten.lt.Scalar, index, 0)
    return new(_aten.where.self, negative, new(_aten.add.Tensor, index, extent), index)


_ROWS: Mapping[object, Callable[[_Builder, fx.Node], _Rows | None]] = {
    _aten.index_copy.default: _index_copy,
    _aten.index_put.default: _index_put,
    _aten.slice_scatter.default: _slice_scatter,
}
