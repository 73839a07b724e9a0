"""The layout manifest: where every element of a model's stored tensors lies, as plain data.

Invariants:

* Every name (of a tensor, an alias or a part) stands for one thing.
* A tensor's boxes are on ranks of the mesh; if it has a layout, they are those of the layout.
* The parts of a packed tensor are disjoint, in order, and make up all of one dim.
* Equal manifests have equal canonical JSON (`rolemesh.compiler.ir.manifest_json`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from rolemesh.compiler.ir.boxes import Distribution
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["Manifest", "Part", "Region", "StoredTensor", "bad_manifest"]


class Part(NamedTuple):
    """A run along a dim of a packed tensor that is a tensor by itself: gate, or up.

    Attributes:
        name: Its name.
        dim: The dim that the tensor is packed along.
        start: Its first index there.
        length: How many indices it has.
    """

    name: str
    dim: int
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor.

    Attributes:
        dtype: Its dtype.
        distribution: Its shape, and which boxes of it every rank holds.
        aliases: Its other names, if weights are tied.
        parts: The tensors that are packed in it.
    """

    dtype: torch.dtype
    distribution: Distribution
    aliases: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()

    @property
    def type(self) -> TensorType:
        """Its shape and dtype."""
        return TensorType(self.distribution.shape, self.dtype)


class Region(NamedTuple):
    """What a name stands for: a stored tensor, or a part of one.

    Attributes:
        tensor: The name of the stored tensor.
        part: The part; None for all of it.
    """

    tensor: str
    part: Part | None


@dataclass(frozen=True)
class Manifest:
    """The stored tensors of a model on the ranks of a mesh.

    Attributes:
        mesh: The mesh.
        tensors: Every stored tensor, by name.
        role: The role that the layouts are for; empty for none.
        generation: Which generation of the weights it describes, counted by who writes them.

    Raises:
        RolemeshError: RM038 for what breaks an invariant above, naming the tensor.
    """

    mesh: Mesh
    tensors: Mapping[str, StoredTensor]
    role: str = ""
    generation: int = 0
    _regions: dict[str, Region] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.generation < 0:
            raise bad_manifest(f"generation {self.generation}", why="generations count from 0")
        for name, tensor in self.tensors.items():
            if len(tensor.distribution.held) != self.mesh.size:
                raise bad_manifest(
                    f"{name} has boxes for {len(tensor.distribution.held)} ranks",
                    why=f"mesh {self.mesh} has {self.mesh.size}",
                )
            _check_parts(name, tensor)
            for other, region in _names(name, tensor):
                if other in self._regions:
                    raise bad_manifest(
                        f"two tensors have the name {other}",
                        where=f"{name} and {self._regions[other].tensor}",
                        why="a name stands for one tensor, alias or part",
                    )
                self._regions[other] = region

    def find(self, name: str) -> Region | None:
        """What a name stands for; None if it names nothing here."""
        return self._regions.get(name)

    @cached_property
    def rank_bytes(self) -> tuple[int, ...]:
        """Bytes of the boxes that each rank holds, pads not included."""
        totals = [0] * self.mesh.size
        counted: dict[tuple[int, int], list[int]] = {}
        for tensor in self.tensors.values():
            found = tensor.distribution
            key = id(found), tensor.dtype.itemsize
            if key not in counted:
                counted[key] = [
                    sum(grid.elements for grid in grids) * tensor.dtype.itemsize
                    for grids in found.held
                ]
            for rank, nbytes in enumerate(counted[key]):
                totals[rank] += nbytes
        return tuple(totals)


def bad_manifest(what: str, *, where: str = "", why: str = "", fix: str = "") -> RolemeshError:
    """The error RM038."""
    fix = fix or "write the manifest again from the program or the checkpoint that it describes"
    return RolemeshError("RM038", what, where=where or "a layout manifest", why=why, fix=fix)


def _names(name: str, tensor: StoredTensor) -> Iterator[tuple[str, Region]]:
    for own in (name, *tensor.aliases):
        yield own, Region(name, None)
    for part in tensor.parts:
        yield part.name, Region(name, part)


def _check_parts(name: str, tensor: StoredTensor) -> None:
    shape, at = tensor.distribution.shape, 0
    if not tensor.parts:
        return
    dim = tensor.parts[0].dim
    fits = 0 <= dim < len(shape)
    for part in tensor.parts:
        fits = fits and (part.dim, part.start) == (dim, at) and part.length > 0
        at += part.length
    if not fits or at != shape[dim]:
        listed = [tuple(part) for part in tensor.parts]
        raise bad_manifest(
            f"the parts of {name} do not make up the tensor",
            where=f"{name} of shape {list(shape)}, parts {listed}",
            why="parts follow one another along one dim and fill it",
        )
