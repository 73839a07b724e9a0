"""What one rank does for each op of the mesh dialect, as plain functions of torch tensors.

Lock-step and real execution share these functions; they differ only in how blocks are exchanged.
A collective is `pack -> exchanges -> unpack`, as `lowering.wires` has it.

Invariants:

* Chunks on the wire are those of `lowering.chunks.cut`, in joint rank order (major to minor): a
  joint gather exchanges the minor axis first, a joint scatter the major axis first.
* `pack`, `unpack` and the local functions depend on the rank only through their `index` and
  `is_owner` arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rolemesh.compiler.ir.dialect import PLAIN, MeshOp, Move, is_bundle, moved
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Segmented, Shard
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.lowering.chunks import chunk_units, cut_one, fill_pads, radix
from rolemesh.lowering.composite.experts import experts_of_rank
from rolemesh.lowering.composite.experts_backward import experts_backward_of_rank
from rolemesh.lowering.grouped import grouped_backward, grouped_sums
from rolemesh.lowering.wires import (
    pack_blocks,
    pack_broadcast,
    pack_chunks,
    pack_many,
    pack_whole,
    unpack_blocks,
    unpack_blocks_of,
    unpack_gathered,
    unpack_plain,
    unpack_plain_of,
)

__all__ = [
    "Call",
    "Collective",
    "Exchange",
    "axes_of",
    "collective",
    "joint_position",
    "keep",
    "local_call",
    "local_shape",
    "mask_pad",
    "mask_rows",
    "owned_rows",
    "part_chunk",
    "shard_chunk",
    "take",
    "tril",
    "triu",
]


R = TypeVar("R")


class Call(NamedTuple, Generic[R]):
    """A plain function with the keyword arguments to call it with."""

    function: Callable[..., R]
    kwargs: Mapping[str, object]


class Exchange(NamedTuple):
    """One collective on the wire, over the group of one axis.

    Attributes:
        kind: `all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all` or `broadcast`.
        axis: Mesh axis.
        ranks: Size of the axis.
        op: For reductions, `sum`, `max` or `min`.
        owner: For a broadcast, the position that sends.
    """

    kind: str
    axis: str
    ranks: int
    op: str = ""
    owner: int = 0


@dataclass(frozen=True)
class Collective:
    """One rank's part in a communicating mesh op.

    Attributes:
        pack: Makes the wire tensor of the values that are moved.
        exchanges: What happens to it.
        unpacks: For each value, what makes it of the wire tensor.
    """

    pack: Call[torch.Tensor]
    exchanges: tuple[Exchange, ...]
    unpacks: tuple[Call[torch.Tensor], ...]

    @property
    def unpack(self) -> Call[torch.Tensor]:
        """What makes the only value of the wire tensor."""
        (only,) = self.unpacks
        return only


def collective(program: Program, node: fx.Node, rank: int) -> Collective:
    """What `rank` does for a communicating mesh op; for one of `PLAIN`, what moves all rows.

    Raises:
        ValueError: If an op that runs over one axis names several, or the op is unknown.
    """
    assert isinstance(node.target, MeshOp)
    mesh = program.the_mesh
    kwargs = node.kwargs
    axes = axes_of(node)
    name = PLAIN.get(node.target, node.target).name.removesuffix("_start")
    if name in ("all_to_all", "broadcast") and len(axes) != 1:
        raise ValueError(f"mesh.{name} runs over one axis, not {axes}: {node.format_node()}")
    ranks = [mesh.axis_size(axis) for axis in axes]
    parts = math.prod(ranks)
    major_first = list(zip(axes, ranks, strict=True))
    if is_bundle(node):
        return _bundle(program, node, parts, major_first)
    dtype = tensor_type(node).dtype
    if name == "all_gather":
        return Collective(
            Call(pack_whole, {"moves": True}),
            tuple(Exchange(name, axis, size) for axis, size in reversed(major_first)),
            (Call(unpack_gathered, {"shard": kwargs["shard"], "parts": parts, "dtype": dtype}),),
        )
    if name == "all_to_all":
        split, concat = kwargs["split"], kwargs["concat"]
        assert isinstance(split, Shard)
        assert isinstance(concat, Shard)
        if split.dim == concat.dim:
            raise ValueError(f"mesh.all_to_all needs two dims: {node.format_node()}")
        return Collective(
            Call(pack_blocks, {"shard": split, "parts": parts}),
            (Exchange(name, axes[0], parts),),
            (Call(unpack_blocks, {"shard": concat, "dtype": dtype}),),
        )
    if name == "broadcast":
        owner = kwargs["owner"]
        assert isinstance(owner, int)
        _, index = joint_position(mesh, axes, rank)
        shape = local_shape(program, node)
        return Collective(
            Call(pack_broadcast, {"shape": shape, "is_owner": index == owner}),
            (Exchange(name, axes[0], parts, owner=owner),),
            (Call(unpack_plain, {"dtype": dtype}),),
        )
    if name in ("reduce_scatter", "all_reduce"):
        reduction = str(kwargs["op"])
        op = "sum" if reduction == "avg" else reduction
        count = parts if reduction == "avg" else 1
        pack = (
            Call(pack_chunks, {"shard": kwargs["shard"], "parts": parts, "moves": False})
            if name == "reduce_scatter"
            else Call(pack_whole, {"moves": False})
        )
        return Collective(
            pack,
            tuple(Exchange(name, axis, size, op) for axis, size in major_first),
            (Call(unpack_plain, {"dtype": dtype, "count": count}),),
        )
    raise ValueError(f"mesh.{name} is not a collective")


def _bundle(
    program: Program, node: fx.Node, parts: int, major_first: Sequence[tuple[str, int]]
) -> Collective:
    """Several values moved as one: their wires, flat, one after the other in every block."""
    assert isinstance(node.target, MeshOp)
    name, mesh = node.target.name.removesuffix("_start"), program.the_mesh
    op = str(node.kwargs.get("op", ""))
    reduces = bool(op)
    pieces: list[tuple[Move, tuple[int, ...]]] = []
    for move, after in zip(moved(node), program.layouts[node], strict=True):
        shape = tensor_type(move.source).shape
        before = program.layout(move.source).local_shape(shape, mesh)
        received = after.local_shape(shape, mesh)
        if name == "all_to_all":
            cut = move.kwargs["split"]
            assert isinstance(cut, Shard)
            received = (*before[: cut.dim], received[cut.dim], *before[cut.dim + 1 :])
        pieces.append((move, before if name == "all_gather" else received))
    elements = sum(math.prod(shape) for _, shape in pieces)
    unpacks, start = [], 0
    for move, shape in pieces:
        place = {"start": start, "shape": shape, "dtype": tensor_type(move.source).dtype}
        start += math.prod(shape)
        if reduces:
            count = parts if op == "avg" else 1
            unpacks.append(Call(unpack_plain_of, {**place, "count": count}))
        else:
            shard = move.kwargs["shard" if name == "all_gather" else "concat"]
            place |= {"parts": parts, "elements": elements, "shard": shard}
            unpacks.append(Call(unpack_blocks_of, place))
    cuts = {"reduce_scatter": "shard", "all_to_all": "split"}.get(name)
    shards = None if cuts is None else node.kwargs[cuts]
    kind = "sum" if op == "avg" else op
    axes = reversed(major_first) if name == "all_gather" else major_first
    return Collective(
        Call(pack_many, {"shards": shards, "parts": parts, "moves": not reduces}),
        tuple(Exchange(name, axis, size, kind) for axis, size in axes),
        tuple(unpacks),
    )


def local_call(program: Program, node: fx.Node, rank: int) -> Call[object]:
    """The function of a mesh op without traffic, with `rank`'s position baked in.

    It takes the node's positional arguments as they are, and returns its result, or all of them.
    """
    assert isinstance(node.target, MeshOp)
    kwargs = dict(node.kwargs)
    if "axes" in kwargs:
        parts, index = joint_position(program.the_mesh, axes_of(node), rank)
        del kwargs["axes"]
        kwargs.update(parts=parts, index=index)
    return Call(_LOCAL[node.target.name], kwargs)


def axes_of(node: fx.Node) -> tuple[str, ...]:
    """Axis names of a mesh op, major to minor."""
    axes = node.kwargs["axes"]
    assert isinstance(axes, tuple | list)
    return tuple(str(axis) for axis in axes)


def joint_position(mesh: Mesh, axes: Sequence[str], rank: int) -> tuple[int, int]:
    """Number of ranks along `axes` jointly, and the position of `rank` among them."""
    coordinate = mesh.coordinate(rank)
    parts, index = 1, 0
    for axis in map(mesh.index, axes):
        parts *= mesh.sizes[axis]
        index = index * mesh.sizes[axis] + coordinate[axis]
    return parts, index


def local_shape(program: Program, node: fx.Node) -> tuple[int, ...]:
    """Local shape of a single-result node; the logical one where no layout is known."""
    shape = tensor_type(node).shape
    layouts = program.layouts.get(node)
    return layouts[0].local_shape(shape, program.the_mesh) if layouts else shape


# --------------------------------------------------------------------------------------------------
# Ops without traffic. `index` is the rank's position among the `parts` ranks of the axes.


def shard_chunk(
    x: torch.Tensor, *, shard: Shard | Segmented, parts: int, index: int
) -> torch.Tensor:
    """The padded chunk of `x` at `index`."""
    if isinstance(shard, Segmented):
        return cut_one(x, shard, parts, index)
    return cut_one(x, radix(shard, parts), parts, index)


def part_chunk(x: torch.Tensor, *, shard: Shard, parts: int, index: int) -> torch.Tensor:
    """The part of a chunk that a group of `shard.size` neighbours shares, for one of them."""
    return shard_chunk(x, shard=shard, parts=shard.size, index=index % shard.size)


def mask_pad(
    x: torch.Tensor, *, shard: Shard, parts: int, index: int, value: float
) -> torch.Tensor:
    """Chunk `x` with its pads set to `value`."""
    return fill_pads(x, shard, parts, index, value)


def owned_rows(
    picks: torch.Tensor, *, by: str, rows: int, size: int, parts: int, index: int
) -> torch.Tensor:
    """Marks the rows whose table entry lies in this rank's chunk; see `compiler/ir/dialect.py`.

    Raises:
        ValueError: If `picks` does not fit `rows` and `size`, or `by` is unknown.
    """
    units = chunk_units(size, parts)
    first, last = min(index * units, size), min((index + 1) * units, size)
    if by == "routes":
        ids = picks.reshape(rows, -1)
        return ((ids >= first) & (ids < last)).any(1)
    if by == "ids":
        if statically_known_true(picks.numel() != rows):
            raise ValueError(f"{list(picks.shape)} ids do not pick {rows} rows")
        ids = _from_front(picks.reshape(rows), size)
        return (ids >= first) & (ids < last)
    if by != "offsets" or picks.shape != (size,):
        raise ValueError(f"{by} of shape {list(picks.shape)} do not pick from {size} entries")
    row = torch.arange(rows, device=picks.device)
    if first == last:
        return row < 0
    marked = row < picks[last - 1]
    return marked & (row >= picks[first - 1]) if first else marked


def _from_front(ids: torch.Tensor, size: int) -> torch.Tensor:
    """Ids of a table's entries without negative ones, which count from its end."""
    return torch.where(ids < 0, ids + size, ids)


def mask_rows(x: torch.Tensor, owned: torch.Tensor, *, dim: int, outer: int = 1) -> torch.Tensor:
    """`x` with zero in the rows of `dim`, seen as `[outer, rows, inner]`, that are not owned."""
    inner = x.shape[dim] // (outer * owned.shape[0])
    view = x.reshape(*x.shape[:dim], outer, owned.shape[0], inner, *x.shape[dim + 1 :])
    mask = owned.reshape(-1, *[1] * (view.ndim - dim - 2))
    return torch.where(mask, view, view.new_zeros(())).reshape(x.shape)


def take(
    table: torch.Tensor,
    ids: torch.Tensor,
    *,
    dim: int,
    size: int,
    parts: int,
    index: int,
    fill_zero: bool = False,
) -> torch.Tensor:
    """Rows `ids` of a table cut at `dim`; those on other ranks are zero or unspecified.

    The ids' dims take the place of `dim`, as in `aten.embedding` and `aten.index_select`.
    """
    units = chunk_units(size, parts)
    flat = _from_front(ids.reshape(-1), size)
    inside = (flat - index * units).clamp(0, units - 1)
    rows = table.index_select(dim, inside)
    if fill_zero:
        owned = owned_rows(flat, by="ids", rows=flat.shape[0], size=size, parts=parts, index=index)
        rows = mask_rows(rows, owned, dim=dim)
    return rows.reshape(*table.shape[:dim], *ids.shape, *table.shape[dim + 1 :])


def pick(
    x: torch.Tensor, ids: torch.Tensor, *, dim: int, size: int, parts: int, index: int
) -> torch.Tensor:
    """`x.gather(dim, ids)` of an x that is cut at dim; zero where an id is of another rank."""
    units = chunk_units(size, parts)
    own = ids - index * units
    found = x.gather(dim, own.clamp(0, units - 1))
    return torch.where((own >= 0) & (own < units), found, 0)


def add_rows(
    rows: torch.Tensor,
    ids: torch.Tensor,
    *,
    size: int,
    padding: int,
    shard: Shard,
    parts: int,
    index: int,
) -> torch.Tensor:
    """This rank's chunk of a table `[size, D]` that has the sum of the rows of each id.

    Args:
        rows: `[*ids, D]`.
        ids: Rows of the table.
        size: Rows of the whole table.
        padding: An id that is left out.
        shard: Its dim 0, seen as `[outer, units, inner]`.
        parts: Number of chunks.
        index: Of this rank's.
    """
    units = chunk_units(shard.size, parts)
    inner = size // (shard.outer * shard.size)
    unit = ids // inner % shard.size - index * units
    local = (ids // (inner * shard.size) * units + unit) * inner + ids % inner
    here = (unit >= 0) & (unit < units) & (ids != padding)
    mine = torch.where(here, local, -1)
    held = shard.outer * units * inner
    return torch.ops.aten.embedding_dense_backward.default(rows, mine, held, -1, False)


def keep(
    x: torch.Tensor, *, dim: int, start: int, length: int, size: int, parts: int, index: int
) -> torch.Tensor:
    """Positions `[start, start + length)` of a dim of `size` that is cut; zero where not here."""
    ids = torch.arange(length, device=x.device) + start
    return take(x, ids, dim=dim, size=size, parts=parts, index=index, fill_zero=True)


def tril(
    x: torch.Tensor, diagonal: int = 0, *, shard: Shard, parts: int, index: int
) -> torch.Tensor:
    """A chunk of rows or columns, zero where the whole tensor is above the diagonal."""
    return torch.where(_columns_past_rows(x, shard, parts, index) <= diagonal, x, x.new_zeros(()))


def triu(
    x: torch.Tensor, diagonal: int = 0, *, shard: Shard, parts: int, index: int
) -> torch.Tensor:
    """A chunk of rows or columns, zero where the whole tensor is below the diagonal."""
    return torch.where(_columns_past_rows(x, shard, parts, index) >= diagonal, x, x.new_zeros(()))


def _columns_past_rows(x: torch.Tensor, shard: Shard, parts: int, index: int) -> torch.Tensor:
    """Column minus row, in the whole tensor, of every element of the last two dims."""
    places = [torch.arange(extent, device=x.device) for extent in x.shape[-2:]]
    cut_dim = shard.dim - (x.ndim - 2)
    if cut_dim >= 0:
        places[cut_dim] = _whole_places(places[cut_dim], shard, parts, index)
    return places[1] - places[0].unsqueeze(1)


def _whole_places(places: torch.Tensor, shard: Shard, parts: int, index: int) -> torch.Tensor:
    """Positions in the whole dim of a chunk's positions."""
    units = chunk_units(shard.size, parts)
    inner = places.shape[0] // (shard.outer * units)
    if shard.outer == 1:
        return places + index * units * inner
    outer = places // (units * inner)
    return places + outer * (shard.size - units) * inner + index * units * inner


def _finished(started: torch.Tensor) -> torch.Tensor:
    """The value of a started collective, where it was waited for at its start."""
    return started


_LOCAL: Mapping[str, Callable[..., object]] = {
    "shard": shard_chunk,
    "part": part_chunk,
    "mask_pad": mask_pad,
    "owned_rows": owned_rows,
    "mask_rows": mask_rows,
    "add_rows": add_rows,
    "keep": keep,
    "pick": pick,
    "take": take,
    "experts": experts_of_rank,
    "experts_backward": experts_backward_of_rank,
    "grouped_backward": grouped_backward,
    "grouped_sums": grouped_sums,
    "tril": tril,
    "triu": triu,
    "wait": _finished,
}
