"""Ops that write elements at index tensors: into a copy, or for ref ops into an input itself.

An index out of range is an error; a negative one too. Where two writes meet, either may win.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rolemesh.runtime.ge.ops.checks import BOOL, INDICES, copied, demand, normal_axis, only
from rolemesh.runtime.ge.ops.indexing import by_mask, coordinates
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("ScatterElements", equal=("data", "updates"))
def scatter_elements(a: Attributes, data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Each update to its place in a copy of data, but for the index along the axis."""
    demand(a, INDICES, indices)
    if indices.shape != updates.shape:
        raise ValueError(
            f"{a.where}: {list(updates.shape)} updates at {list(indices.shape)} indices"
        )
    axis, where = normal_axis(a, a.int("axis", 0), data.dim()), indices.long()
    reduction = a.str("reduction", "none")
    if reduction == "none":
        return data.scatter(axis, where, updates)
    if reduction == "add":
        return data.scatter_add(axis, where, updates)
    if reduction == "mul":
        return data.scatter_reduce(axis, where, updates, "prod")
    raise ValueError(f"{a.where}: no semantics for reduction={reduction!r}")


@OPS.op("ScatterNdUpdate", equal=("var", "updates"), writes={0: "var"})
def scatter_nd_update(a: Attributes, var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Write slices at coordinates, which are the last dim of indices."""
    return _put(a, var, indices, updates)


@OPS.op("ScatterNdAdd", equal=("var", "updates"), writes={0: "var"})
def scatter_nd_add(a: Attributes, var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return _put(a, var, indices, updates, accumulate=True)


@OPS.op("TensorScatterUpdate", equal=("x", "updates"))
def tensor_scatter_update(a: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return _put(a, copied(x), indices, updates)


@OPS.op("TensorScatterAdd", equal=("x", "updates"))
def tensor_scatter_add(a: Attributes, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return _put(a, copied(x), indices, updates, accumulate=True)


@OPS.op("ScatterNd")
def scatter_nd(a: Attributes, indices: Tensor, x: Tensor, shape: Tensor) -> Tensor:
    """Slices added to zeros of a shape."""
    return _put(a, x.new_zeros(integers(shape)), indices, x, accumulate=True)


@OPS.op("ScatterUpdate", equal=("var", "updates"), writes={0: "var"})
def scatter_update(a: Attributes, var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Write slices of dim 0."""
    return _put(a, var, indices.unsqueeze(-1), updates)


@OPS.op("ScatterAdd", equal=("var", "updates"), writes={0: "var"})
def scatter_add(a: Attributes, var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Add slices to those of dim 0."""
    return _put(a, var, indices.unsqueeze(-1), updates, accumulate=True)


def _put(
    a: Attributes, x: Tensor, indices: Tensor, updates: Tensor, accumulate: bool = False
) -> Tensor:
    where = coordinates(a, x, indices)
    shape = indices.shape[:-1] + x.shape[len(where) :]
    if updates.shape != shape:
        raise ValueError(f"{a.where}: updates {list(updates.shape)}, not {list(shape)}")
    return x.index_put_(where, updates, accumulate)


@OPS.op("IndexPutV2", dynamic=("indices",), equal=("x", "value"), writes={0: "x"})
def index_put_v2(
    a: Attributes,
    x: Tensor,
    value: Tensor,
    indexed_sizes: Tensor,
    indexed_strides: Tensor,
    indices: Sequence[Tensor],
) -> Tensor:
    """Write to what numpy's advanced indexing picks; see the op Index for the mask."""
    where = by_mask(a, x, integers(indexed_sizes), indices)
    at = [None if isinstance(entry, slice) else entry for entry in where]
    torch.ops.aten.index_put_.default(x, at, value, a.bool("accumulate", False))
    return x


@OPS.op("InplaceIndexAdd", equal=("var", "updates", "alpha"), writes={0: "var"})
def inplace_index_add(
    a: Attributes, var: Tensor, indices: Tensor, updates: Tensor, alpha: Tensor | None = None
) -> Tensor:
    """Add alpha (1 if unfed) times each slice of the updates along an axis."""
    demand(a, INDICES, indices)
    if a.int("axis") < 0:
        raise ValueError(f"{a.where}: no semantics for a negative axis")
    factor = 1 if alpha is None else alpha.reshape(()).item()
    return var.index_add_(a.int("axis"), indices, updates, alpha=factor)


@OPS.op("Scatter", equal=("var", "updates"), writes={0: "var"})
def scatter(a: Attributes, var: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Write the block of each batch entry into var, from an index on along an axis.

    The indices are one per entry, or pairs of an entry of var and an index.
    """
    only(a, reduce="update")
    demand(a, INDICES, indices)
    axis = normal_axis(a, a.int("axis", 0), var.dim())
    pairs = indices.tolist() if indices.dim() == 2 else [*enumerate(integers(indices))]
    if not axis or len(pairs) != updates.shape[0]:
        raise ValueError(f"{a.where}: {len(pairs)} blocks of {updates.shape[0]} along axis {axis}")
    for block, (entry, start) in zip(updates, pairs, strict=True):
        if entry < 0:
            raise ValueError(f"{a.where}: a negative entry {entry}")
        _write_block(a, var[entry], block, axis - 1, start)
    return var


@OPS.op("ScatterList", dynamic=("var",), equal=("var", "updates"), writes={0: "var"})
def scatter_list(
    a: Attributes,
    var: Sequence[Tensor],
    indice: Tensor,
    updates: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Scatter into one tensor per batch entry, for the entries whose mask is set."""
    only(a, reduce="update")
    demand(a, INDICES, indice)
    if not len(var) == updates.shape[0] == indice.numel() or indice.dim() != 1:
        raise ValueError(f"{a.where}: {len(var)} tensors, indices {list(indice.shape)}")
    axis = normal_axis(a, a.int("axis", -2), updates.dim())
    if not axis:
        raise ValueError(f"{a.where}: no semantics for the axis of the batch")
    masked = [1] * len(var) if mask is None else integers(mask)
    for target, block, start, kept in zip(var, updates, integers(indice), masked, strict=True):
        if kept:
            _write_block(a, target, block, axis - 1, start)
    return tuple(var)


def _write_block(a: Attributes, target: Tensor, block: Tensor, axis: int, start: int) -> None:
    if start < 0:
        raise ValueError(f"{a.where}: a negative index {start}")
    target.narrow(axis, start, block.shape[axis]).copy_(block)


@OPS.op("MaskedScatter", equal=("x", "updates"))
def masked_scatter(a: Attributes, x: Tensor, mask: Tensor, updates: Tensor) -> Tensor:
    """The next update, in their order, at each place where the mask is set."""
    demand(a, BOOL, mask)
    if int(mask.expand(x.shape).sum()) > updates.numel():
        raise ValueError(f"{a.where}: {updates.numel()} updates for more places")
    return x.masked_scatter(mask, updates)
