"""The options of the graph-capture target."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["NpuGraphOptions"]


@dataclass(frozen=True)
class NpuGraphOptions:
    """Options of the target `npugraph_ex`.

    Attributes:
        frozen_parameters: Promise that parameters stay where they are in memory.
        clone_outputs: Return outputs in memory of their own. Without it they lie in memory of the
            graph, and the next call overwrites them.
    """

    frozen_parameters: bool = True
    clone_outputs: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise RolemeshError(
                    "RM018",
                    what=f"option {field.name!r} of target 'npugraph_ex' is {value!r}",
                    where="option target_options",
                    why="it must be True or False",
                    fix="pass True or False",
                )
