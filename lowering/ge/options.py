"""The options of the GE target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["DEVICES", "GeOptions"]

DEVICES = ("auto", "cpu", "npu")
"""Values of `GeOptions.device`."""


@dataclass(frozen=True)
class GeOptions:
    """Options of the target `ge`.

    Attributes:
        device: What graphs are converted for: `cpu`, `npu`, or `auto`: the NPU with CANN, the CPU
            without. `npu` without CANN gives the graph and the options that a device would get, and
            runs it on CPU tensors.
        fuse: Rewrite patterns into Ascend's fused ops.
        frozen_parameters: Promise GE that parameters stay where they are in memory.
        dim_gears: For graphs with dynamic dims: by input name and dim, the sizes to compile for.
        dump: Folder for each graph as text, `NAME.pbtxt` for tools and `NAME.txt` to read; made if
            it is not there.
        export: Folder for each graph as an offline model (`NAME.air`), likewise.
        cache: Folder for compiled graphs, from which a later process starts without converting.
        cache_required: Whether a folder `cache` that cannot be written to is an error; else it is a
            warning.
        repeats: Fewest equal layers in a row that are lowered as a few of them, and copied in the
            GE graph for the rest; below, a graph is lowered whole.
        order_seed: Run ops in a random order that the graph allows, drawn with this seed; for
            tests, on the reference executor only.
    """

    device: str = "auto"
    fuse: bool = True
    frozen_parameters: bool = True
    dim_gears: Mapping[str, Mapping[int, Sequence[int]]] = field(default_factory=dict)
    dump: str | None = None
    export: str | None = None
    cache: str | None = None
    cache_required: bool = True
    repeats: int = 6
    order_seed: int | None = None

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise _bad("device", self.device, f"one of {', '.join(DEVICES)}")
        for name in ("fuse", "frozen_parameters", "cache_required"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")
        for name in ("dump", "export", "cache"):
            if not isinstance(getattr(self, name), str | None):
                raise _bad(name, getattr(self, name), "the path of a folder")
        if type(self.repeats) is not int or self.repeats < 2:
            raise _bad("repeats", self.repeats, "a whole number from 2 on")
        if not isinstance(self.order_seed, int | None):
            raise _bad("order_seed", self.order_seed, "an integer")
        for entry, gears in self.dim_gears.items():
            for dim, sizes in gears.items():
                if len(sizes) < 2 or any(not isinstance(n, int) or n < 1 for n in sizes):
                    raise _bad(
                        "dim_gears",
                        {entry: {dim: sizes}},
                        "for each dim at least two sizes above 0",
                    )


def _bad(name: str, value: object, expected: str) -> RolemeshError:
    return RolemeshError(
        "RM018",
        what=f"option {name!r} of target 'ge' is {value!r}",
        where="option target_options",
        why=f"it must be {expected}",
        fix=f"pass {expected}",
    )
