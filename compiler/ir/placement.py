"""How one value lies on one axis of a mesh: its placement.

On an axis a value is replicated, partial (a reduction is pending), owned whole by one rank, sharded
on one factor of one dim, segmented (see `Segmented`), or routed (see `Routed`).

A shard is a triple `Shard(dim, outer, size)`: the dim of logical extent E is seen as
`[outer, size, inner]` with `inner = E / (outer * size)`, and `size` is split into chunks of
`ceil(size / ranks)`; chunk r belongs to the rank at position r. One triple covers a plain dim
(`outer = 1, size = E`), units that must not be cut such as heads (`size = heads`), a packed weight
(`outer = 2`), and a merged dim (`[B, S] -> [B*S]` with S sharded has `outer = B, size = S`).

Uneven chunks are padded. The contents of pads are unspecified for floating-point values; for
integers and booleans every pad equals some real element of the same line along the dim, so a pad is
always a valid index. Pads are filled with the reduction's identity before a reduction over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "REPLICATE",
    "Owner",
    "Partial",
    "Placement",
    "Replicate",
    "Routed",
    "Segment",
    "Segmented",
    "Shard",
    "ceil_div",
    "same_placement",
    "segmented",
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
        if only.size == 0 or only.size % (ranks // only.copies):
            return 0  # chunks are padded: a part of one is not a part of the dim
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

    By `routes`, a row has several table entries, and is valid on each rank that holds one. The
    extent is not cut: the local shape is the logical one, and rows of other ranks have unspecified
    contents. `key` names the boolean node that marks this rank's rows. This is what a lookup of
    per-row weights (experts) in a sharded table gives, and it costs no traffic until the rows are
    masked and summed.
    """

    key: str
    dim: int
    outer: int
    size: int

    def __str__(self) -> str:
        return f"routed({self.dim} by %{self.key})"


Placement = Replicate | Partial | Owner | Shard | Segmented | Routed
REPLICATE = Replicate()


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
