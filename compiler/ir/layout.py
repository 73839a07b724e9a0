"""How one value lies on the ranks of a mesh: one placement per axis.

Coordinates are logical: a placement on one axis reads the same whatever the other axes do. Axes
with the *same* `Shard` split it jointly, in mesh order (major to minor), in chunks of
`ceil(size / product of their ranks)`. Axes with different shards of one dim own different digits of
its mixed-radix index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Replicate,
    Routed,
    Segmented,
    Shard,
    ceil_div,
    same_placement,
)
from rolemesh.compiler.ir.tensor import TensorType, dtype_name

__all__ = ["Layout"]


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
        return _text(self, value, mesh)


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
def _text(layout: Layout, value: TensorType, mesh: Mesh) -> str:
    dims = [
        _dim_text(extent, layout.shards_of(dim), mesh.names)
        for dim, extent in enumerate(value.shape)
    ]
    for placement, name in zip(layout.placements, mesh.names, strict=True):
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
        for placement, name in zip(layout.placements, mesh.names, strict=True)
        if isinstance(placement, Partial | Owner | Routed)
    )
    return f"{dtype_name(value.dtype)}[{', '.join(dims)}]{suffix}"


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
