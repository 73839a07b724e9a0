"""The store: one local shard per stored tensor, shared by all programs of a process.

A stored tensor is a weight, or a tensor that programs update, such as a cache. The first program
that meets it keeps its local shard here and frees the full storage; the tensor object stays, a
ghost with its logical shape and no bytes, so that guards still pass and later phases trace over it.
Freeing never triggers a recompile. Every program of every phase then uses the one shard: its
pointer does not change.

A shard is keyed by the identity of its tensor, so tied weights are stored once, and it goes when
the tensor goes.

What a program finds out about the tensors of a call (are they stored, in layouts that fit, is their
storage freed?) depends only on the *kind* of each: a number for mesh, layout and whether it is
freed. Calls whose inputs are of kinds that were met before skip all that (`Store.kinds`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering.chunks import assemble, holds, scatter_one

__all__ = ["Store", "Stored", "default_store", "gather"]


@dataclass(frozen=True)
class Stored:
    """One stored tensor.

    Attributes:
        name: Name of the tensor in the program that first met it.
        layout: Its layout.
        mesh: The mesh of that layout.
        local: This rank's shard; for a weight that another rank owns, a tensor without bytes.
    """

    name: str
    layout: Layout
    mesh: Mesh
    local: torch.Tensor


class Store:
    """Local shards by tensor identity."""

    def __init__(self) -> None:
        # By the id of a tensor, which is not another's while the tensor lives.
        self._stored: dict[int, Stored] = {}
        self._locals: dict[int, torch.Tensor] = {}
        self._kinds: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[torch.Tensor]] = {}
        self._numbers: dict[tuple[Mesh, Layout, bool], int] = {}

    def local(
        self, tensor: torch.Tensor, name: str, layout: Layout, mesh: Mesh, rank: int
    ) -> torch.Tensor:
        """This rank's shard of a stored tensor, cut from the full tensor the first time.

        Raises:
            RolemeshError: RM024 if the tensor is stored in another layout, or if its full storage
                is gone although it is not stored.
        """
        found = self.find(tensor)
        if found is None:
            _require_storage(tensor, name)
            found = Stored(name, layout, mesh, _cut(tensor, layout, mesh, rank))
            self._keep(tensor, found)
        elif found.mesh != mesh or not found.layout.same(layout, tensor.shape, mesh):
            raise RolemeshError(
                "RM024",
                what=f"{name} is stored in another layout than this program needs",
                where=f"stored as {found.layout.placements} on mesh {found.mesh}, needed as "
                f"{layout.placements} on mesh {mesh}",
                why="all programs over one model share one storage",
                fix="compile all phases with the same role, mesh and annotations, or build the "
                "model again for another role",
            )
        return found.local

    def put(
        self, tensor: torch.Tensor, name: str, layout: Layout, mesh: Mesh, local: torch.Tensor
    ) -> None:
        """Store this rank's shard of a tensor that need not have bytes itself.

        Args:
            tensor: The (ghost) tensor that programs name.
            name: Its name.
            layout: Its layout.
            mesh: The mesh of that layout.
            local: The shard, of the layout's local shape; without bytes on a rank that owns none.

        Raises:
            RolemeshError: RM024 if the tensor is stored already.
        """
        self.check_absent(tensor, name)
        self._keep(tensor, Stored(name, layout, mesh, local))

    def check_absent(self, tensor: torch.Tensor, name: str) -> None:
        """Raise if a tensor is stored.

        Raises:
            RolemeshError: RM024: programs may hold its shard.
        """
        if self.find(tensor) is not None:
            raise RolemeshError(
                "RM024",
                what=f"{name} is stored already",
                where=name,
                why="the shard of a tensor keeps its pointer, which programs may hold",
                fix="load a checkpoint before the model runs, and once",
            )

    def find(self, tensor: torch.Tensor) -> Stored | None:
        """What is stored for a tensor."""
        return self._stored.get(id(tensor))

    def kinds(self, tensors: Sequence[torch.Tensor]) -> tuple[int | None, ...]:
        """The kind of each tensor; None for one that is not stored."""
        return tuple(map(self._kinds.get, map(id, tensors)))

    def locals(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The shards of tensors; of those that are not stored, the tensors as they are."""
        return list(map(self._locals.get, map(id, tensors), tensors))

    def layouts(self, tensors: Sequence[torch.Tensor], mesh: Mesh) -> dict[int, Layout]:
        """Layouts of those of `tensors` that are stored on `mesh`, by position."""
        found = ((index, self.find(tensor)) for index, tensor in enumerate(tensors))
        return {i: kept.layout for i, kept in found if kept is not None and kept.mesh == mesh}

    def stored(self) -> list[Stored]:
        """Everything stored, in no particular order."""
        return list(self._stored.values())

    def release(self, tensors: Sequence[torch.Tensor]) -> None:
        """Free the full storage of those of `tensors` whose shards are stored."""
        for tensor in tensors:
            found = self.find(tensor)
            if found is None:
                continue
            storage = tensor.untyped_storage()
            if storage.resizable() and storage.nbytes():
                storage.resize_(0)
                # Writing to a ghost raises instead of crashing the process.
                torch._C._set_throw_on_mutable_data_ptr(tensor)
            self._kinds[id(tensor)] = self._kind(found, freed=True)

    def _keep(self, tensor: torch.Tensor, found: Stored) -> None:
        key = id(tensor)
        tables = (self._stored, self._locals, self._kinds, self._alive)

        def forget(_: object) -> None:
            for table in tables:
                table.pop(key, None)

        self._alive[key] = weakref.ref(tensor, forget)
        self._stored[key] = found
        self._locals[key] = found.local
        self._kinds[key] = self._kind(found, freed=False)

    def _kind(self, found: Stored, *, freed: bool) -> int:
        return self._numbers.setdefault((found.mesh, found.layout, freed), len(self._numbers))


_DEFAULT = Store()


def default_store() -> Store:
    """The store that `torch.compile(backend="rolemesh")` uses."""
    return _DEFAULT


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a stored tensor. Every rank must call it.

    Args:
        tensor: A parameter, buffer or cache tensor of a compiled model.

    Returns:
        A new tensor of the logical shape; the tensor itself if it is not stored as shards.
    """
    found = _DEFAULT.find(tensor)
    if found is None:
        return tensor
    shape = found.layout.local_shape(tensor.shape, found.mesh)
    local = found.local if found.local.numel() else tensor.new_empty(shape)
    parts = [torch.empty_like(local) for _ in range(found.mesh.size)]
    dist.all_gather(parts, local.contiguous())
    return assemble(parts, found.layout, tensor.shape, found.mesh)


def _cut(tensor: torch.Tensor, layout: Layout, mesh: Mesh, rank: int) -> torch.Tensor:
    if not holds(layout, mesh, rank):
        return tensor.detach().new_empty(0)
    return scatter_one(tensor.detach(), layout, mesh, rank)


def _require_storage(tensor: torch.Tensor, name: str) -> None:
    needed = math.prod(tensor.shape) * tensor.element_size()
    if tensor.untyped_storage().nbytes() < needed:
        raise RolemeshError(
            "RM024",
            what=f"the full storage of {name} was freed",
            where=name,
            why="another compiled model holds it as shards under another tensor object",
            fix="use the same parameter objects in every compiled call, or load the model again",
        )
