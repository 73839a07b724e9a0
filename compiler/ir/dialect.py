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
| `wait(started)` | - | whole | no |
| `shard(x, shard=, axes=)` | `[outer, size, inner]` | `[outer, c, inner]` | no |
| `part(x, shard=, axes=)` | `[outer, size, inner]`, held by `size` ranks | one's unit of it | no |
| `mask_pad(x, shard=, axes=, value=)` | `[outer, c, inner]` | same, pads filled | no |
| `owned_rows(picks, by=, rows=, size=, axes=)` | ids or offsets | `bool[rows]` | no |
| `mask_rows(x, owned, dim=)` | rows of other ranks unspecified | those rows zero | no |
| `take(table, ids, dim=, size=, axes=, fill_zero=)` | `table` cut at dim | its rows | no |
| `tril`, `triu(x, diagonal, shard=, axes=)` | rows cut | same, as cut from the whole | no |

`owned_rows` marks the rows whose table entry (of `size` entries) lies on this rank: by `ids`, row i
uses entry `picks[i]`; by `offsets`, entry e has rows `picks[e - 1]` to `picks[e]`. `take` gives
`table[ids]` along dim, where the whole table has `size` entries and rank r holds those from `r * n`
on, n being the extent of its part (pads included). Rows of entries on other ranks have unspecified
contents (for integers, those of any entry), or zeros if `fill_zero`. Ids below zero count from the
end of the whole table, here and for `owned_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

__all__ = [
    "ALL_GATHER",
    "ALL_REDUCE",
    "ALL_TO_ALL",
    "BROADCAST",
    "BROADCAST_START",
    "MASK_PAD",
    "MASK_ROWS",
    "OWNED_ROWS",
    "PART",
    "REDUCE_SCATTER",
    "SHARD",
    "TAKE",
    "TRIL",
    "TRIU",
    "WAIT",
    "MeshOp",
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


ALL_GATHER = MeshOp("all_gather", communicates=True)
ALL_REDUCE = MeshOp("all_reduce", communicates=True)
ALL_TO_ALL = MeshOp("all_to_all", communicates=True)
BROADCAST = MeshOp("broadcast", communicates=True)
BROADCAST_START = MeshOp("broadcast_start", communicates=True)
REDUCE_SCATTER = MeshOp("reduce_scatter", communicates=True)
MASK_PAD = MeshOp("mask_pad", communicates=False)
MASK_ROWS = MeshOp("mask_rows", communicates=False)
OWNED_ROWS = MeshOp("owned_rows", communicates=False)
PART = MeshOp("part", communicates=False)
SHARD = MeshOp("shard", communicates=False)
TAKE = MeshOp("take", communicates=False)
TRIL = MeshOp("tril", communicates=False)
TRIU = MeshOp("triu", communicates=False)
WAIT = MeshOp("wait", communicates=False)
