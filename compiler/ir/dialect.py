"""The mesh dialect: ops over axis names and tensor dims that passes insert into a Program.

Their targets are `MeshOp` objects, which only lowering gives an implementation; so one Program
text serves every rank. All ops take the local tensor of a rank and return one. `shard` arguments
are `Shard` triples in coordinates of the local tensor (for `all_gather` and `shard` also a
`Segmented`), `axes` is a tuple of axis names, major to minor, along which ranks are numbered
jointly. With p ranks, `shard = (dim, outer, size)` and `c = ceil(size / p)`:

| op | from local | to local | traffic |
|---|---|---|---|
| `all_gather(x, shard=, axes=)` | `[outer, c, inner]` at dim | `[outer, size, inner]` | yes |
| `reduce_scatter(x, op=, shard=, axes=)` | `[outer, size, inner]` | `[outer, c, inner]` | yes |
| `all_reduce(x, op=, axes=)` | any | same | yes |
| `all_to_all(x, split=, concat=, axes=)` | whole at split, chunk at concat | the reverse | yes |
| `broadcast(x, owner=, axes=)` | whole on the owner | whole | yes |
| `broadcast_start(x, owner=, axes=, slot=)` | the same, received into a pooled buffer | - | yes |
| `all_gather_start(...)` and so on | the same, without waiting for it | - | yes |
| `wait(started)` | - | what the op gives | no |
| `shard(x, shard=, axes=)` | `[outer, size, inner]` | `[outer, c, inner]` | no |
| `part(x, shard=, axes=)` | `[outer, size, inner]`, held by `size` ranks | one's unit of it | no |
| `mask_pad(x, shard=, axes=, value=)` | `[outer, c, inner]` | same, pads filled | no |
| `owned_rows(picks, by=, rows=, size=, axes=)` | ids or offsets | `bool[rows]` | no |
| `keep(x, dim=, start=, length=, size=, axes=)` | cut at dim | `length` positions | no |
| `mask_rows(x, owned, dim=)` | rows of other ranks unspecified | those rows zero | no |
| `take(table, ids, dim=, size=, axes=, fill_zero=)` | `table` cut at dim | its rows | no |
| `add_rows(rows, ids, size=, padding=, shard=, axes=)` | whole | table cut at dim 0 | no |
| `grouped_backward(x, w, offs, grad, size=, axes=)` | w cut at dim 0 | gradients | no |
| `grouped_sums(x, y, offs, size=, axes=)` | whole | cut at dim 0 | no |
| `pick(x, ids, dim=, size=, axes=)` | x cut at dim | one per id, or zero | no |
| `tril`, `triu(x, diagonal, shard=, axes=)` | rows cut | same, as cut from the whole | no |
| `experts(hidden, ids, weights, *tables, size=, axes=)` | tables cut at dim 0 | a summand | no |
| `experts_backward(grad, hidden, ids, *more, size=, axes=)` | the same | gradients | no |

`owned_rows` marks the rows whose table entry (of `size` entries) lies on this rank: by `ids`, row i
uses entry `picks[i]`; by `offsets`, entry e has rows `picks[e - 1]` to `picks[e]`. `take` gives
`table[ids]` along dim, where the whole table has `size` entries and rank r holds those from `r * n`
on, n being the extent of its part (pads included). Rows of entries on other ranks have unspecified
contents (for integers, those of any entry), or zeros if `fill_zero`. Ids below zero count from the
end of the whole table, here and for `owned_rows`. `experts` is `rolemesh::experts` of `size`
experts that lie as the rows of such a table, and gives the sum over those of the rank;
`experts_backward` gives what these add to the gradients of tokens and weights, and the gradients of
their part of the tables.

`pick` gives what `aten.gather` along dim gives of an x of extent `size` there; zero in the place of
what lies on other ranks.

`add_rows` gives a rank's chunk of the gradient of a table of `size` rows: for each id the sum of
the rows that have it, and zero for the id `padding`.

`grouped_backward` gives the gradients of a grouped product of rows sorted by expert: of the rows of
the rank's experts, and of its part of `w`; `offs` are the ends of the rows of all `size` experts.
`grouped_sums` gives its part of `[E, M, N]`: for each expert its columns of `x [M, R]` times its
rows of `y [R, N]`. Rows of other ranks are not read, so they may be unspecified.

`keep` gives positions `start` to `start + length` of a dim of `size`: those that a rank has, and
zero in the place of others, so that their sum over the axes is what the whole value has there.

`all_gather`, `reduce_scatter`, `all_reduce` and `all_to_all` also take a list of values of one
dtype in place of one, and move them as one: `all_gather([x, y], shard=(of x, of y), axes=)` has the
results `x` and `y` whole. `moved` gives the moves of either form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, NoReturn

from torch import fx

__all__ = [
    "ADD_ROWS",
    "ALL_GATHER",
    "ALL_REDUCE",
    "ALL_TO_ALL",
    "BROADCAST",
    "BROADCAST_START",
    "EXPERTS",
    "EXPERTS_BACKWARD",
    "GROUPED_BACKWARD",
    "GROUPED_SUMS",
    "KEEP",
    "MASK_PAD",
    "MASK_ROWS",
    "OWNED_ROWS",
    "PART",
    "PICK",
    "REDUCE_SCATTER",
    "SHARD",
    "STARTS",
    "TAKE",
    "TRIL",
    "TRIU",
    "WAIT",
    "MeshOp",
    "Move",
    "is_bundle",
    "is_start",
    "moved",
]


@dataclass(frozen=True, eq=False)
class MeshOp:
    """The target of a mesh-dialect node."""

    name: str
    communicates: bool

    @property
    def __name__(self) -> str:  # FX derives node names from it
        return self.name

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Mesh ops run only after lowering."""
        raise TypeError(f"mesh.{self.name} has no implementation before lowering")

    def __deepcopy__(self, memo: dict[int, object]) -> MeshOp:
        return self

    def __str__(self) -> str:
        return f"mesh.{self.name}"


ADD_ROWS = MeshOp("add_rows", communicates=False)
ALL_GATHER = MeshOp("all_gather", communicates=True)
ALL_REDUCE = MeshOp("all_reduce", communicates=True)
ALL_TO_ALL = MeshOp("all_to_all", communicates=True)
BROADCAST = MeshOp("broadcast", communicates=True)
BROADCAST_START = MeshOp("broadcast_start", communicates=True)
REDUCE_SCATTER = MeshOp("reduce_scatter", communicates=True)
EXPERTS = MeshOp("experts", communicates=False)
EXPERTS_BACKWARD = MeshOp("experts_backward", communicates=False)
GROUPED_BACKWARD = MeshOp("grouped_backward", communicates=False)
GROUPED_SUMS = MeshOp("grouped_sums", communicates=False)
KEEP = MeshOp("keep", communicates=False)
MASK_PAD = MeshOp("mask_pad", communicates=False)
MASK_ROWS = MeshOp("mask_rows", communicates=False)
OWNED_ROWS = MeshOp("owned_rows", communicates=False)
PART = MeshOp("part", communicates=False)
PICK = MeshOp("pick", communicates=False)
SHARD = MeshOp("shard", communicates=False)
TAKE = MeshOp("take", communicates=False)
TRIL = MeshOp("tril", communicates=False)
TRIU = MeshOp("triu", communicates=False)
WAIT = MeshOp("wait", communicates=False)

STARTS: Mapping[MeshOp, MeshOp] = MappingProxyType(
    {
        op: MeshOp(f"{op.name}_start", communicates=True)
        for op in (ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER)
    }
)
"""The op that starts what another op waits for; a broadcast has a start of its own, with a slot."""


class Move(NamedTuple):
    """What a communicating mesh op does to one of the values that it moves.

    Attributes:
        source: The value.
        kwargs: The op's keyword arguments for this value alone.
    """

    source: fx.Node
    kwargs: Mapping[str, object]


def is_start(node: fx.Node) -> bool:
    """Whether a node starts a collective that a `wait` ends."""
    return node.target is BROADCAST_START or node.target in STARTS.values()


def is_bundle(node: fx.Node) -> bool:
    """Whether a mesh op moves several values as one, so that it has as many results."""
    return isinstance(node.target, MeshOp) and bool(node.args) and isinstance(node.args[0], list)


def moved(node: fx.Node) -> tuple[Move, ...]:
    """What a communicating mesh op moves, in the order of its results."""
    if not is_bundle(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return (Move(source, node.kwargs),)
    found = []
    assert isinstance(node.args[0], list)
    for position, source in enumerate(node.args[0]):
        assert isinstance(source, fx.Node)
        own = {name: values[position] for name, values in node.kwargs.items() if name in _EACH}  # type: ignore[index]
        found.append(Move(source, {**node.kwargs, **own}))
    return tuple(found)


_EACH = frozenset({"shard", "split", "concat"})
"""Arguments that a list of values has one each of."""
