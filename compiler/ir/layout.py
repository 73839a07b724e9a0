"""How one value lies on the ranks of a mesh.

On each mesh axis a value has one placement: replicated, partial (a reduction is pending), owned
whole by one rank, sharded on one factor of one dim, segmented (see `Segmented`), or routed (see
`Routed`).

A shard is a triple `Shard(dim, outer, size)`: the dim of logical extent E is seen as
`[outer, size, inner]` with `inner = E / (outer * size)`, and `size` is split into chunks of
`ceil(size / ranks)`; chunk r belongs to the rank at position r. One triple covers a plain dim
(`outer = 1, size = E`), units that must not be cut such as heads (`size = heads`), a packed weight
(`outer = 2`), and a merged dim (`[B, S] -> [B*S]` with S sharded has `outer = B, size = S`).

Coordinates are logical: a placement on one axis reads the same whatever the other axes do. Axes
with the *same* triple split it jointly, in mesh order (major to minor), in chunks of
`ceil(size / product of their ranks)`. Axes with different triples on one dim own different
digits of its mixed-radix index.

Uneven chunks are padded. The contents of pads are unspecified for floating-point values; for
integers and booleans every pad equals some real element of the same line along the dim, so a pad is
always a valid index. Pads are filled with the reduction's identity before a reduction over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.tensor import TensorType, dtype_name

__all__ = [
    "REPLICATE",
    "Layout",
    "Owner",
    "Partial",
    "Placement",
    "Replicate",
    "Routed",
    "Segment",
    "Segmented",
    "Shard",
    "ceil_div",
]


def ceil_div(size: int, parts: int) -> int:
    """Smallest integer not below `size / parts`."""
    return size // parts if size % parts == 0 else (size + parts - 1) // parts


class Replicate(NamedTuple):
    """Every rank of the axis holds the whole value."""

    def __str__(self) -> str:
        return "R"


class Partial(NamedTuple):
    """The value is the reduction (`sum`, `max`, `min` or `avg`) of the ranks' values."""

    op: str = "sum"

    def __str__(self) -> str:
        return f"+{self.op}"


class Owner(NamedTuple):
    """Only the rank at this position of the axis holds the value."""

    rank: int

    def __str__(self) -> str:
        return f"owner({self.rank})"


class Shard(NamedTuple):
    """One factor of one dim is split over the axis; see the module docstring."""

    dim: int
    outer: int
    size: int

    def __str__(self) -> str:
        unit = "" if self.outer == 1 else f":{self.outer}x"
        return f"S({self.dim}{unit})"


class Segment(NamedTuple):
    """A run of `length` along a dim, seen as `[outer, size, inner]` and cut as `Shard` says.

    Ranks in groups of `copies` neighbours hold the same chunk: two heads on four ranks, for
    example, are two chunks with two copies each. With `size` 0 every rank holds the whole run.
    """

    length: int
    outer: int
    size: int
    copies: int = 1

    def shard(self, dim: int) -> Shard:
        """How a tensor that consists of this segment alone is cut."""
        return Shard(dim, self.outer, self.size)

    def scaled(self, before: int, times: int) -> Segment:
        """The same segment of a dim that other factors extend, some of them before it."""
        return self._replace(length=self.length * times, outer=self.outer * before)

    def held(self, ranks: int) -> int:
        """The extent that one rank holds."""
        if not self.size:
            return self.length
        return self.length // self.size * ceil_div(self.size, ranks // self.copies)


class Segmented(NamedTuple):
    """A dim made of segments, each of which is cut by itself: q, k and v of a packed projection.

    A rank holds its chunk of every segment, one after the other, pads included. Segments of one
    form are a `Shard` (`outer` counts them); this is for those that differ in length or units, for
    those that are not cut, and for chunks that groups of ranks share. No other axis may split the
    dim.
    """

    dim: int
    segments: tuple[Segment, ...]

    @property
    def lengths(self) -> list[int]:
        """Lengths of the segments."""
        return [segment.length for segment in self.segments]

    def held(self, ranks: int) -> list[int]:
        """Lengths of the segments on one rank."""
        return [segment.held(ranks) for segment in self.segments]

    def evened(self, ranks: int) -> list[Segment]:
        """The segments, those that divide evenly written in units of a chunk."""
        found = ((s, ranks // s.copies) for s in self.segments)
        return [s._replace(size=n) if s.size and s.size % n == 0 else s for s, n in found]

    def piece(self, start: int, length: int) -> Placement | None:
        """The placement of `[start, start + length)` of the dim; None if it cuts a segment."""
        first = last = offset = 0
        for index, segment in enumerate(self.segments):
            if offset == start:
                first = index
            offset += segment.length
            if offset == start + length:
                last = index + 1
        found = self.segments[first:last]
        if sum(self.lengths[:first]) != start or sum(segment.length for segment in found) != length:
            return None
        return segmented(self.dim, found)

    def parts(self, target: Shard, extent: int, ranks: int) -> int:
        """Into how many parts `target` cuts the chunk that a group of ranks shares.

        Args:
            target: A shard of the same dim, of extent `extent`.
            extent: The dim's extent.
            ranks: Ranks of the axis.

        Returns:
            The number of copies, if each rank's chunk of the target is its part of its group's
            chunk; 0 if it is not.
        """
        (only, *more), even = self.segments, target.outer * ranks
        if more or target.dim != self.dim or target.outer != only.outer or only.copies == 1:
            return 0
        return only.copies if target.size % ranks == 0 and extent % even == 0 else 0

    def __str__(self) -> str:
        parts = [
            f"{s.length} {f'in {s.size}' if s.size else 'whole'}"
            + (f" x {s.copies} copies" if s.copies > 1 else "")
            for s in self.segments
        ]
        return f"segments({self.dim}: {', '.join(parts)})"


def segmented(dim: int, segments: Sequence[Segment]) -> Placement:
    """The simplest placement that cuts a dim in these segments, which make up all of it."""
    first = segments[0]
    if not any(segment.size for segment in segments):
        return REPLICATE
    if len(segments) == 1 and first.copies == 1:
        return first.shard(dim)
    if first.outer == first.copies == 1 and all(segment == first for segment in segments):
        return Shard(dim, len(segments), first.size)
    return Segmented(dim, tuple(segments))


class Routed(NamedTuple):
    """Rows of a dim's factor are valid on the one rank that `key` assigns them to.

    The extent is not cut: the local shape is the logical one, and rows of other ranks have
    unspecified contents. `key` names the boolean node that marks this rank's rows. This is what a
    lookup of per-row weights (experts) in a sharded table gives, and it costs no traffic until the
    rows are masked and summed.
    """

    key: str
    dim: int
    outer: int
    size: int

    def __str__(self) -> str:
        return f"routed({self.dim} by %{self.key})"


Placement = Replicate | Partial | Owner | Shard | Segmented | Routed
REPLICATE = Replicate()


@dataclass(frozen=True, slots=True)
class Layout:
    """One placement per mesh axis, in the mesh's order."""

    placements: tuple[Placement, ...]

    @classmethod
    def replicated(cls, mesh: Mesh) -> Layout:
        """The layout of a value that every rank holds whole."""
        return _replicated(len(mesh.names))

    def replace(self, index: int, placement: Placement) -> Layout:
        """This layout with another placement on the axis at `index`."""
        current = self.placements
        return Layout((*current[:index], placement, *current[index + 1 :]))

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole value."""
        return all(isinstance(placement, Replicate) for placement in self.placements)

    def canonical(self, mesh: Mesh) -> Layout:
        """The same distribution with evenly divisible joint shards written as separate digits.

        `Shard(d, o, n)` on axes of a and b ranks with `n % (a * b) == 0` becomes `Shard(d, o, n)`
        and `Shard(d, o * a, n / a)`. Joint shards that do not divide stay as they are. On an axis
        of one rank every placement is the whole value.
        """
        if len(self.placements) == 1 and mesh.sizes[0] > 1:
            return self
        return _canonical(self, mesh)

    def joint_axes(self, index: int) -> tuple[int, ...]:
        """Axes (as indices) that have the same shard as the axis at `index`, itself included."""
        placement = self.placements[index]
        if not isinstance(placement, Shard):
            return (index,)
        return tuple(i for i, other in enumerate(self.placements) if other == placement)

    def shards_of(self, dim: int) -> tuple[tuple[Shard, tuple[int, ...]], ...]:
        """Shards of one dim with their axes (as indices), outermost first."""
        found: dict[Shard, list[int]] = {}
        for index, placement in enumerate(self.placements):
            if isinstance(placement, Shard) and placement.dim == dim:
                found.setdefault(placement, []).append(index)
        return tuple((shard, tuple(found[shard])) for shard in sorted(found))

    def local_shape(self, shape: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
        """Shape of one rank's tensor, pads included, for a logical `shape`."""
        return _local_shape(self.canonical(mesh), tuple(shape), mesh)

    def check(self, shape: Sequence[int], mesh: Mesh) -> None:
        """Raise if this layout cannot hold a tensor of logical `shape` on `mesh`.

        Raises:
            RolemeshError: RM009 if a dim does not split into the factors asked for, RM021 if two
                axes ask for overlapping factors of one dim.
        """
        _check(self, tuple(shape), mesh)

    def local_outer(self, dim: int, outer: int, mesh: Mesh) -> int:
        """How many of the `outer` parts of a dim, seen as `[outer, rest]`, one rank holds.

        The layout must be canonical.
        """
        held = outer
        for shard, axes in self.shards_of(dim):
            if shard.outer < outer:
                ranks = math.prod(mesh.sizes[i] for i in axes)
                units = ranks if shard.size % ranks == 0 else shard.size
                held = held // units * ceil_div(units, ranks)
        return held

    def local_shard(self, index: int, mesh: Mesh) -> Shard | Segmented:
        """The shard on the axis at `index` in coordinates of the *local* tensor.

        The layout must be canonical. Other axes that split the same dim shrink `outer` and,
        for even shards, `size`.
        """
        placement = self.placements[index]
        if isinstance(placement, Segmented):
            return placement
        if not isinstance(placement, Shard):
            raise TypeError(f"axis {index} of {self} is not sharded")
        others = [entry for entry in self.shards_of(placement.dim) if index not in entry[1]]
        if not others:
            return placement
        outer = self.local_outer(placement.dim, placement.outer, mesh)
        ranks = math.prod(mesh.sizes[i] for i in self.joint_axes(index))
        size = ranks if placement.size % ranks == 0 else placement.size
        return Shard(placement.dim, outer, size)

    def same(self, other: Layout, shape: Sequence[int], mesh: Mesh) -> bool:
        """Whether both layouts put the same elements of a tensor of `shape` on every rank."""
        if self == other:
            return True
        mine, theirs = self.canonical(mesh), other.canonical(mesh)
        return all(
            same_placement(a, b, shape, ranks)
            and (axes := mine.joint_axes(i)) == theirs.joint_axes(i)
            and (len(axes) == 1 or a == b)
            for i, (a, b, ranks) in enumerate(
                zip(mine.placements, theirs.placements, mesh.sizes, strict=True)
            )
        )

    def text(self, value: TensorType, mesh: Mesh) -> str:
        """For example `f32[16@tp, 64] +sum(dp)`, or `f32[2, (4 x 13@tp)]` for a factor of a dim."""
        dims = [
            _dim_text(extent, self.shards_of(dim), mesh.names)
            for dim, extent in enumerate(value.shape)
        ]
        for placement, name in zip(self.placements, mesh.names, strict=True):
            if isinstance(placement, Segmented):
                dims[placement.dim] = " + ".join(
                    _dim_text(
                        s.length,
                        ((s.shard(0), (0,)),) if s.size else (),
                        (f"{name}/{s.copies}" if s.copies > 1 else name,),
                    )
                    for s in placement.segments
                )
        suffix = "".join(
            f" {placement}({name})" if isinstance(placement, Partial) else f" {placement}@{name}"
            for placement, name in zip(self.placements, mesh.names, strict=True)
            if isinstance(placement, Partial | Owner | Routed)
        )
        return f"{dtype_name(value.dtype)}[{', '.join(dims)}]{suffix}"


def same_placement(a: Placement, b: Placement, shape: Sequence[int], ranks: int) -> bool:
    """Whether two placements on an axis of `ranks` put the same elements on every rank.

    Two shards of one dim with the same `outer` agree if their chunks have the same extent: those
    that divide evenly are the index digit of radix `ranks` at position `outer`.
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, Segmented) and isinstance(b, Segmented):
        return a.dim == b.dim and a.evened(ranks) == b.evened(ranks)
    if isinstance(a, Shard) and isinstance(b, Shard) and a != b:
        return (
            a.dim == b.dim
            and a.outer == b.outer
            and ceil_div(a.size, ranks) * b.size == ceil_div(b.size, ranks) * a.size
            and shape[a.dim] % (a.outer * a.size) == shape[a.dim] % (b.outer * b.size) == 0
        )
    return a == b


@lru_cache(maxsize=64)
def _replicated(axes: int) -> Layout:
    return Layout((REPLICATE,) * axes)


@lru_cache(maxsize=65536)
def _canonical(layout: Layout, mesh: Mesh) -> Layout:
    placements = [
        placement if ranks > 1 else REPLICATE
        for placement, ranks in zip(layout.placements, mesh.sizes, strict=True)
    ]
    layout = Layout(tuple(placements))
    for index, placement in enumerate(layout.placements):
        axes = layout.joint_axes(index)
        if not isinstance(placement, Shard) or len(axes) == 1 or index != axes[0]:
            continue
        if placement.size % math.prod(mesh.sizes[i] for i in axes):
            continue
        outer, size = placement.outer, placement.size
        for axis in axes:
            placements[axis] = Shard(placement.dim, outer, size)
            outer, size = outer * mesh.sizes[axis], size // mesh.sizes[axis]
    return Layout(tuple(placements))


@lru_cache(maxsize=65536)
def _local_shape(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    local = list(shape)
    done: set[Shard] = set()
    for index, placement in enumerate(layout.placements):
        if isinstance(placement, Segmented):
            local[placement.dim] = sum(placement.held(mesh.sizes[index]))
            continue
        if not isinstance(placement, Shard) or placement in done:
            continue
        done.add(placement)
        ranks = math.prod(mesh.sizes[i] for i in layout.joint_axes(index))
        extent = local[placement.dim]
        if placement.size % ranks == 0:
            local[placement.dim] = extent // ranks
        else:
            local[placement.dim] = extent // placement.size * ceil_div(placement.size, ranks)
    return tuple(local)


@lru_cache(maxsize=65536)
def _check(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> None:
    for placement in layout.placements:
        if isinstance(placement, Segmented):
            _check_segments(placement, layout, shape)
    for dim in {p.dim for p in layout.placements if isinstance(p, Shard)}:
        where = f"dim {dim} of a value of shape {list(shape)}, layout {layout.placements}"
        if not -1 < dim < len(shape):
            raise RolemeshError(
                "RM009",
                what=f"a value with {len(shape)} dims has no dim {dim}",
                where=where,
                why="the layout names a dim that does not exist",
                fix="give the layout as many entries as the tensor has dims",
            )
        taken, extent = 1, shape[dim]
        for shard, axes in layout.shards_of(dim):
            ranks = math.prod(mesh.sizes[i] for i in axes)
            if shard.size < 1 or shard.outer < 1 or extent % (shard.outer * shard.size):
                raise RolemeshError(
                    "RM009",
                    what=f"extent {extent} does not split into {shard.outer} x {shard.size} x n",
                    where=where,
                    why="a shard cuts a factor of the dim into chunks",
                    fix="choose units that divide the dim",
                )
            if ranks == 1:
                continue
            if shard.outer % taken:
                raise RolemeshError(
                    "RM021",
                    what="two mesh axes ask for overlapping factors of one dim",
                    where=where,
                    why="each axis needs a digit of the dim's index to itself",
                    fix="put the axes on different dims, or on the same factor in mesh order",
                )
            taken = shard.outer * (ranks if shard.size % ranks == 0 else shard.size)


def _check_segments(placement: Segmented, layout: Layout, shape: tuple[int, ...]) -> None:
    where = f"dim {placement.dim} of a value of shape {list(shape)}, layout {layout.placements}"
    cuts_dim = [
        other
        for other in layout.placements
        if isinstance(other, Shard | Segmented) and other.dim == placement.dim
    ]
    if len(cuts_dim) > 1:
        raise RolemeshError(
            "RM021",
            what="two mesh axes ask for overlapping factors of one dim",
            where=where,
            why="a dim of segments is cut by one axis",
            fix="put the axes on different dims",
        )
    uneven = any(s.size and s.length % (s.outer * s.size) for s in placement.segments)
    if (
        uneven
        or not -1 < placement.dim < len(shape)
        or (sum(placement.lengths) != shape[placement.dim])
    ):
        raise RolemeshError(
            "RM009",
            what=f"{placement} does not fit the value",
            where=where,
            why="segments add up to the dim, and each splits into its units",
            fix="choose segments and units that divide the dim",
        )


def _dim_text(
    extent: int, shards: tuple[tuple[Shard, tuple[int, ...]], ...], names: tuple[str, ...]
) -> str:
    if not shards:
        return str(extent)
    parts: list[str] = []
    position = 1
    for shard, axes in shards:
        if shard.outer > position:
            parts.append(str(shard.outer // position))
        label = "/".join(names[i] for i in axes)
        parts.append(f"{shard.size}@{label}")
        position = shard.outer * shard.size
    if extent > position:
        parts.append(str(extent // position))
    return parts[0] if len(parts) == 1 else f"({' x '.join(parts)})"
