"""A mesh: named axes of ranks, as plain data.

Invariants: at least one axis; names are unique identifiers; sizes are positive. Ranks are numbered
row-major, the last axis fastest, as in `torch.distributed.device_mesh`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["Mesh"]


@dataclass(frozen=True, init=False)
class Mesh:
    """Axis names and sizes, in order (major to minor).

    Args:
        axes: Axis sizes by name, for example `{"dp": 2, "tp": 4}`.

    Raises:
        RolemeshError: RM015 for no axis, a bad name, or a size below one.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __init__(self, axes: Mapping[str, int]) -> None:
        for name, size in axes.items():
            if (
                not name.isidentifier()
                or isinstance(size, bool)
                or not isinstance(size, int)
                or size < 1
            ):
                raise RolemeshError(
                    "RM015",
                    what=f"mesh axis {name!r} with size {size!r} is not valid",
                    where=f"mesh {dict(axes)}",
                    why="an axis has an identifier as its name and a size of at least one",
                    fix='write for example {"dp": 2, "tp": 4}',
                )
        if not axes:
            raise RolemeshError(
                "RM015",
                what="the mesh has no axis",
                where="mesh {}",
                why="every role shards over at least one axis",
                fix='write for example {"tp": 4}',
            )
        object.__setattr__(self, "names", tuple(axes))
        object.__setattr__(self, "sizes", tuple(axes.values()))

    @classmethod
    def parse(cls, text: str) -> Mesh:
        """Read `"dp=2,tp=4"`.

        Raises:
            RolemeshError: RM015 if the text is not a list of NAME=SIZE.
        """
        axes: dict[str, int] = {}
        for part in text.split(","):
            name, _, size = (piece.strip() for piece in part.partition("="))
            if not size.isdecimal() or name in axes:
                raise RolemeshError(
                    "RM015",
                    what=f"cannot read the mesh {text!r}",
                    where=f"part {part!r}",
                    why="a mesh is a comma-separated list of NAME=SIZE, each name once",
                    fix="write for example dp=2,tp=4",
                )
            axes[name] = int(size)
        return cls(axes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    def index(self, axis: str) -> int:
        """Position of `axis` in the mesh.

        Raises:
            RolemeshError: RM002 if the mesh has no such axis.
        """
        try:
            return self.names.index(axis)
        except ValueError:
            close = difflib.get_close_matches(axis, self.names, n=1)
            raise RolemeshError(
                "RM002",
                what=f"unknown mesh axis {axis!r}",
                where=f"mesh {self}",
                why=f"the mesh has the axes {', '.join(self.names)}",
                fix=f"did you mean {close[0]!r}?" if close else "use one of these axes",
            ) from None

    def axis_size(self, axis: str) -> int:
        """Number of ranks along `axis`."""
        return self.sizes[self.index(axis)]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Position of `rank` along every axis."""
        coordinate = []
        for size in reversed(self.sizes):
            rank, position = divmod(rank, size)
            coordinate.append(position)
        return tuple(reversed(coordinate))

    def rank(self, coordinate: Sequence[int]) -> int:
        """The rank at `coordinate`, the inverse of `coordinate()`."""
        rank = 0
        for size, position in zip(self.sizes, coordinate, strict=True):
            rank = rank * size + position
        return rank

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """Ranks that share `rank`'s coordinates on all axes but `axis`, in axis order."""
        index = self.index(axis)
        base = list(self.coordinate(rank))
        ranks = []
        for position in range(self.sizes[index]):
            base[index] = position
            ranks.append(self.rank(base))
        return tuple(ranks)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))
