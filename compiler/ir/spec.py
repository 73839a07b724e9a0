"""`P`: the user's spelling of a layout, in the manner of JAX's `PartitionSpec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Placement, Shard

__all__ = ["P"]

Entry = str | tuple[str, ...] | None


@dataclass(frozen=True, init=False)
class P:
    """One entry per dim: None, a mesh axis, or a tuple of axes (major to minor).

    `P("tp", None)` shards dim 0 over `tp`; `P(("dp", "tp"))` shards it over both. Missing entries
    at the end are None. `units` names, per dim, into how many equal units the dim divides, so that
    chunks hold whole units: `P(None, "tp", units={1: heads})` never cuts a head. `parts` names, per
    dim, how many parts of one length are packed in it, each of which is cut by itself, units and
    all: `P(None, "tp", parts={1: 2})` gives a rank its chunk of gate and its chunk of up.

    Raises:
        RolemeshError: RM014 for an entry of another kind.
    """

    entries: tuple[Entry, ...]
    units: tuple[tuple[int, int], ...]
    parts: tuple[tuple[int, int], ...]

    def __init__(
        self,
        *entries: Entry,
        units: Mapping[int, int] | None = None,
        parts: Mapping[int, int] | None = None,
    ) -> None:
        for entry in entries:
            names = entry if isinstance(entry, tuple) else (entry,)
            if entry is not None and not all(isinstance(name, str) for name in names):
                raise RolemeshError(
                    "RM014",
                    what=f"{entry!r} is no entry of a P",
                    where=f"P({', '.join(map(repr, entries))})",
                    why="an entry is None, the name of a mesh axis, or a tuple of names",
                    fix="write for example P('tp', None) or P(('dp', 'tp'))",
                )
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "units", tuple(sorted((units or {}).items())))
        object.__setattr__(self, "parts", tuple(sorted((parts or {}).items())))

    def layout(self, shape: Sequence[int], mesh: Mesh, name: str = "value") -> Layout:
        """The layout of a tensor of `shape` called `name` on `mesh`.

        Raises:
            RolemeshError: RM014 for a spec that does not fit the tensor, RM002 for an unknown axis,
                RM009 if a dim does not divide into its parts and units, RM021 if axes overlap.
        """
        where = f"{self} on {name} of shape {list(shape)}"
        if len(self.entries) > len(shape):
            raise RolemeshError(
                "RM014",
                what=f"{len(self.entries)} entries for a tensor with {len(shape)} dims",
                where=where,
                why="a P has at most one entry per dim",
                fix="drop the extra entries",
            )
        units, parts = dict(self.units), dict(self.parts)
        for option, given in (("units", units), ("parts", parts)):
            for dim in given:
                if not 0 <= dim < len(self.entries) or self.entries[dim] is None:
                    raise RolemeshError(
                        "RM014",
                        what=f"{option} for dim {dim}, which has no entry",
                        where=where,
                        why=f"{option} say how a dim with an entry is cut; dims count from 0",
                        fix=f"give {option} for a dim that names an axis",
                    )
        placements: list[Placement] = [REPLICATE] * len(mesh.names)
        for dim, entry in enumerate(self.entries):
            axes = (entry,) if isinstance(entry, str) else (entry or ())
            outer = parts.get(dim, 1)
            if outer < 1 or shape[dim] % outer:
                raise RolemeshError(
                    "RM009",
                    what=f"dim {dim} of extent {shape[dim]} does not divide into {outer} parts",
                    where=where,
                    why="packed parts have one length",
                    fix="give a number of parts that divides the dim",
                )
            size = units.get(dim, shape[dim] // outer)
            if size < 1 or shape[dim] // outer % size:
                raise RolemeshError(
                    "RM009",
                    what=f"dim {dim} of extent {shape[dim]} does not divide into {size} units",
                    where=where,
                    why="a chunk holds whole units",
                    fix="give a number of units that divides the dim",
                )
            order = [mesh.index(axis) for axis in axes]
            for index in order:
                if placements[index] != REPLICATE:
                    raise RolemeshError(
                        "RM014",
                        what=f"axis {mesh.names[index]!r} is used twice",
                        where=where,
                        why="an axis shards one dim at most",
                        fix="name each axis once",
                    )
                placements[index] = Shard(dim, outer, size)
                if order != sorted(order):  # digits keep an order other than the mesh's
                    if size % mesh.sizes[index]:
                        raise RolemeshError(
                            "RM009",
                            what=f"{size} units do not divide over axis {mesh.names[index]!r}",
                            where=where,
                            why="axes in another order than the mesh's need even chunks",
                            fix=f"list the axes in mesh order ({', '.join(mesh.names)})",
                        )
                    outer, size = outer * mesh.sizes[index], size // mesh.sizes[index]
        layout = Layout(tuple(placements))
        layout.check(shape, mesh)
        return layout

    def __str__(self) -> str:
        options = [("units", self.units), ("parts", self.parts)]
        written = [f"{option}={dict(given)}" for option, given in options if given]
        return f"P({', '.join([*map(repr, self.entries), *written])})"

    __repr__ = __str__
