"""Sharding rules: an op's dims as ordered lists of factors, as in an einsum.

The form is that of OpenXLA Shardy's `OpShardingRuleAttr`: every operand and result dim is a list
of factors, major to minor, and two dims that share a factor shard together. A rule says nothing of
a mesh; `Choice` says what one mesh axis does at one op, and the functions here translate between
choices and placements.

Invariant: with a `Split` choice every operand and result that has the factor holds the same chunk
of it, padded alike, so the op runs on local tensors as it stands (or as localised).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Partial,
    Placement,
    Routed,
    Segment,
    Segmented,
    Shard,
    segmented,
)
from rolemesh.compiler.ir.tensor import TensorType

__all__ = [
    "Choice",
    "Cuts",
    "DimFactors",
    "JoinSegments",
    "Kind",
    "Linear",
    "Lookup",
    "OpCall",
    "Route",
    "Rule",
    "RuleBuilder",
    "Select",
    "Split",
    "SplitSegments",
    "TakeSegments",
    "Whole",
    "segments_of",
]

DimFactors = tuple[tuple[int, ...], ...]
"""For each dim of one tensor, its factors, major to minor. Together they make up the extent."""


class Kind(enum.Enum):
    """What a factor allows."""

    PASS = "pass"
    """Shards freely: every element of the result needs only its own slice."""
    REDUCE = "reduce"
    """Is reduced away: a shard of it makes the results without it partial."""
    REPLICATE = "replicate"
    """Every result element may need the whole factor."""
    PERMUTE = "permute"
    """The op moves elements along it (sort, roll, flip): a shard would have to exchange them."""


@dataclass(frozen=True, slots=True)
class OpCall:
    """One call of an op with tensor types in place of tensors.

    Attributes:
        target: The op overload, for example `torch.ops.aten.mm.default`.
        args: Positional arguments; a tensor is a `TensorType`.
        kwargs: Keyword arguments, likewise.
        operands: The tensor arguments in order, lists flattened.
        results: The types of the results.
    """

    target: torch._ops.OpOverload
    args: tuple[object, ...]
    kwargs: dict[str, object]
    operands: tuple[TensorType, ...]
    results: tuple[TensorType, ...]


@dataclass(frozen=True, slots=True)
class Select:
    """Rows of a table that an integer operand picks, so that the table may shard by rows.

    Attributes:
        factor: The factor of table rows (vocabulary, experts).
        operand: Operand that picks: row ids (`ids`) or, for rows sorted by table entry, the end
            offset of each entry's rows (`offsets`).
        by: `ids` or `offsets`.
        dim: Result dim that holds the picked rows, so that it becomes `Routed`; -1 if the rows of
            other ranks are zeroed in place and the result is partial.
        follows: Operands whose rows are routed along with the result.
        rows: The factor of these rows; -1 if it is that of the first dim of each.
    """

    factor: int
    operand: int
    by: str
    dim: int = -1
    follows: tuple[int, ...] = ()
    rows: int = -1


@dataclass(frozen=True, slots=True)
class Cuts:
    """Pieces of one dim that an op takes, or puts together: pieces may be whole segments.

    Attributes:
        dim: The dim.
        bounds: Start and length of each piece along it.
    """

    dim: int
    bounds: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one op call may shard.

    Attributes:
        sizes: Extent of each factor.
        kinds: What each factor allows.
        operands: Factors of each tensor operand's dims.
        results: Factors of each result's dims.
        linear: Patterns of partial operands the op is linear in: `(True, False)` says that a
            partial first operand and a whole second give partial results.
        unread: Operands whose values are not read, only their type (`new_ones`, `zeros_like`).
        reduction: How REDUCE factors combine: `sum`, `max`, `min` or `avg`. A result that has such
            a factor is sharded with it, next to others that are partial, as are the gradients of
            rows and of the weights that they share.
        select: The rows-of-a-table factor, if the op has one.
        joint: Factors that several axes may split only as one: the op's local form needs one
            position along them.
        cuts: The pieces of its one operand that the results are, if the op cuts one.
        joins: The pieces of its one result that the operands are, if the op joins them.
    """

    sizes: tuple[int, ...]
    kinds: tuple[Kind, ...]
    operands: tuple[DimFactors, ...]
    results: tuple[DimFactors, ...]
    linear: tuple[tuple[bool, ...], ...] = ()
    unread: frozenset[int] = frozenset()
    reduction: str = "sum"
    select: Select | None = None
    joint: frozenset[int] = frozenset()
    cuts: Cuts | None = None
    joins: Cuts | None = None

    def match(self, dims: DimFactors, placement: Placement, ranks: int) -> Chunked | None:
        """The choice that takes an operand or result with `dims` in `placement`, if any."""
        if isinstance(placement, Segmented):
            return self._match_segments(dims, placement)
        if isinstance(placement, Shard):
            found = self._locate(dims[placement.dim], placement.outer, placement.size, ranks)
            return Split(*found) if found is not None else None
        if isinstance(placement, Routed):
            found = self._locate(dims[placement.dim], placement.outer, placement.size, 0)
            return Route(placement.key, *found) if found is not None else None
        return None

    def _match_segments(
        self, dims: DimFactors, placement: Segmented
    ) -> SplitSegments | TakeSegments | JoinSegments | None:
        """Segments are taken apart, or joined, where the op does so; else a factor has them all."""
        cuts = self.cuts
        if cuts is not None and cuts.dim == placement.dim and dims is self.operands[0]:
            pieces = [placement.piece(*bounds) for bounds in cuts.bounds]
            return None if None in pieces else TakeSegments(placement)
        joins = self.joins
        if joins is not None and joins.dim == placement.dim and dims is self.results[0]:
            pieces = [placement.piece(*bounds) for bounds in joins.bounds]
            return None if None in pieces else JoinSegments(placement)
        factors = dims[placement.dim]
        if len(placement.segments) == 1:
            (only,) = placement.segments
            found = self._locate(factors, only.outer, only.size, 0)
            if found is None or not self._takes_segments(found[0]):
                return None
            factor, outer, size = found
            segment = Segment(self.sizes[factor], outer, size, only.copies)
            return SplitSegments(factor, (segment,))
        major, *minor = [f for f in factors if self.sizes[f] != 1] or [-1]
        if major < 0 or not self._takes_segments(major) or not self._leads(major):
            return None
        inner = math.prod(self.sizes[factor] for factor in minor)
        if any(s.length % (max(s.size, 1) * s.outer * inner) for s in placement.segments):
            return None
        scaled = [s._replace(length=s.length // inner) for s in placement.segments]
        return SplitSegments(major, tuple(scaled))

    def join(self, sources: Sequence[Placement]) -> JoinSegments | None:
        """The choice that puts operands together as they lie; None if that is a shard, or whole."""
        if self.joins is None:
            return None
        dim, bounds = self.joins.dim, self.joins.bounds
        found = [segments_of(p, dim, n) for p, (_, n) in zip(sources, bounds, strict=True)]
        placement = segmented(dim, [segment for segments in found for segment in segments])
        return JoinSegments(placement) if isinstance(placement, Segmented) else None

    def _takes_segments(self, factor: int) -> bool:
        """Whether the op runs on any segments of a factor, without one position along it."""
        return self.kinds[factor] is Kind.PASS and factor not in self.joint

    def _leads(self, factor: int) -> bool:
        """Whether a factor is the major one of every dim that has it."""
        return all(
            all(self.sizes[f] == 1 for f in factors[: factors.index(factor)])
            for dims in (*self.operands, *self.results)
            for factors in dims
            if factor in factors
        )

    def _locate(
        self, factors: tuple[int, ...], outer: int, size: int, ranks: int
    ) -> tuple[int, int, int] | None:
        """Find the factor that holds `[outer, size, ...]` of a dim; with `ranks` 0, exactly.

        Evenly divided shards are index digits, so they may be cut to the part that lies within
        one factor; uneven ones must be whole units of it.
        """
        before = 1
        for factor in factors:
            extent = self.sizes[factor]
            if before and outer % before == 0:
                within = outer // before
                if extent % within == 0 and (within < extent or extent == 1):
                    rest = extent // within
                    units = 0
                    if rest % size == 0:
                        units = size
                    elif ranks and size % rest == 0 and rest % ranks == 0:
                        units = rest
                    kind = self.kinds[factor]
                    allowed = kind is Kind.PASS or (
                        kind is Kind.REDUCE
                        and not (self.reduction == "avg" and (not ranks or units % ranks))
                    )
                    if units and allowed:
                        return factor, within, units
                    if units and rest == size:
                        return None
            before *= extent
        return None

    def operand_placement(self, index: int, choice: Choice) -> Placement | None:
        """What `choice` needs of one operand; None if the operand is not read."""
        if index in self.unread:
            return None
        if isinstance(choice, Linear):
            return Partial(choice.op) if self.linear[choice.pattern][index] else REPLICATE
        if isinstance(choice, Lookup) and self.select is not None and index in self.select.follows:
            dims = self.operands[index]
            rows = dims[0][0] if self.select.rows < 0 else self.select.rows
            return self._place(dims, Route(choice.key, rows, 1, self.sizes[rows]))
        if isinstance(choice, TakeSegments):
            return choice.source
        if isinstance(choice, JoinSegments):
            assert self.joins is not None
            return choice.target.piece(*self.joins.bounds[index]) or REPLICATE
        return self._place(self.operands[index], choice)

    def result_placement(self, index: int, choice: Choice) -> Placement:
        """What `choice` gives for one result."""
        if isinstance(choice, Linear):
            return Partial(choice.op)
        if isinstance(choice, Lookup) and self.select is not None:
            if self.select.dim < 0 or self._keeps(index, choice.factor):
                return self._reduced(index, choice, "sum")
            rows = self.results[index][self.select.dim][0]
            return Routed(choice.key, self.select.dim, 1, self.sizes[rows])
        if isinstance(choice, TakeSegments):
            assert self.cuts is not None
            return choice.source.piece(*self.cuts.bounds[index]) or REPLICATE
        if isinstance(choice, JoinSegments):
            return choice.target
        if isinstance(choice, Split | Route) and self.kinds[choice.factor] is Kind.REDUCE:
            return self._reduced(index, choice, self.reduction)
        return self._place(self.results[index], choice)

    def _reduced(self, index: int, choice: Split | Route | Lookup, reduction: str) -> Placement:
        """A result of a call that splits a reduced factor; some results may keep the factor."""
        if self._keeps(index, choice.factor):
            return self._place(self.results[index], choice)
        return Partial(reduction)

    def _keeps(self, index: int, factor: int) -> bool:
        """Whether a result has a factor."""
        return any(factor in factors for factors in self.results[index])

    def _place(self, dims: DimFactors, choice: Choice) -> Placement:
        if isinstance(choice, Split | SplitSegments | Route | Lookup):
            for dim, factors in enumerate(dims):
                if choice.factor in factors:
                    place = factors.index(choice.factor)
                    before = math.prod(self.sizes[f] for f in factors[:place])
                    if isinstance(choice, SplitSegments):
                        others = before * math.prod(self.sizes[f] for f in factors[place + 1 :])
                        return segmented(dim, [s.scaled(before, others) for s in choice.segments])
                    outer = before * choice.outer
                    if isinstance(choice, Route):
                        return Routed(choice.key, dim, outer, choice.size)
                    return Shard(dim, outer, choice.size)
        return REPLICATE


def segments_of(placement: Placement, dim: int, length: int) -> tuple[Segment, ...]:
    """The segments that a placement makes of a dim of extent `length`: a whole one if none."""
    if isinstance(placement, Segmented) and placement.dim == dim:
        return placement.segments
    if isinstance(placement, Shard) and placement.dim == dim:
        return (Segment(length, placement.outer, placement.size),)
    return (Segment(length, 1, 0),)


class Whole(NamedTuple):
    """The axis does nothing here: operands and results are whole on every rank."""


class Split(NamedTuple):
    """The axis splits `[outer, size, ...]` of a factor."""

    factor: int
    outer: int
    size: int


class SplitSegments(NamedTuple):
    """The axis splits the segments of a factor, each by itself; see `Segmented`."""

    factor: int
    segments: tuple[Segment, ...]


class TakeSegments(NamedTuple):
    """The op cuts its operand between segments, which the axis splits each by itself."""

    source: Segmented


class JoinSegments(NamedTuple):
    """The op joins its operands to segments, which the axis splits each by itself."""

    target: Segmented


class Route(NamedTuple):
    """The axis computes all rows of a factor, those of `key` validly; see `Routed`."""

    key: str
    factor: int
    outer: int
    size: int


class Lookup(NamedTuple):
    """The axis splits the rows of a table that another operand picks from; see `Select`."""

    factor: int
    outer: int
    size: int
    key: str


class Linear(NamedTuple):
    """Partial operands pass through, by one of the rule's `linear` patterns."""

    pattern: int
    op: str


Chunked = Split | SplitSegments | TakeSegments | JoinSegments | Route
Choice = Whole | Chunked | Lookup | Linear


class RuleBuilder:
    """Numbers the factors of a rule under construction."""

    __slots__ = ("kinds", "sizes")

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.kinds: list[Kind] = []

    def factor(self, size: int, kind: Kind = Kind.PASS) -> tuple[int, ...]:
        """A new factor, as the factor list of a dim that consists of it alone."""
        self.sizes.append(size)
        self.kinds.append(kind)
        return (len(self.sizes) - 1,)

    def dims(self, shape: Sequence[int], kind: Kind = Kind.PASS) -> list[tuple[int, ...]]:
        """A new factor for each dim of `shape`."""
        return [self.factor(size, kind) for size in shape]

    def build(
        self,
        operands: Sequence[Sequence[tuple[int, ...]]],
        results: Sequence[Sequence[tuple[int, ...]]],
        *,
        linear: Sequence[tuple[bool, ...]] = (),
        unread: Sequence[int] = (),
        reduction: str = "sum",
        select: Select | None = None,
        joint: Sequence[int] = (),
        cuts: Cuts | None = None,
        joins: Cuts | None = None,
    ) -> Rule:
        """The finished rule."""
        return Rule(
            sizes=tuple(self.sizes),
            kinds=tuple(self.kinds),
            operands=tuple(tuple(dims) for dims in operands),
            results=tuple(tuple(dims) for dims in results),
            linear=tuple(linear),
            unread=frozenset(unread),
            reduction=reduction,
            select=select,
            joint=frozenset(joint),
            cuts=cuts,
            joins=joins,
        )
