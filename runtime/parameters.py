"""Parameters as DTensors: what a training program stores, as PyTorch's trainers know it.

A parameter becomes a DTensor of its shard in the modules that hold it, once and for all, as under
`fully_shard`. So optimizers, gradient clipping and torch.distributed.checkpoint work unchanged. The
parameter that was there keeps its shape and loses its bytes; optimizers that were built over it
get the DTensor in its place.

A DTensor's shard has no pads, a program's has. Pads are at the end, of a plain chunk.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

from rolemesh.compiler.ir.boxes import distribute
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering.chunks import scatter_one
from rolemesh.runtime.holder import Holder
from rolemesh.runtime.reshard.dtensor import to_placements
from rolemesh.runtime.stand_ins import stand_in

__all__ = ["Place", "convert"]


class Place:
    """How values of one layout lie as DTensors, and the way between both.

    Args:
        name: Name of the value, for errors.
        layout: Its layout.
        shape: Its logical shape.
        dtype: Its dtype.
        device_mesh: The mesh.
        mesh: The same mesh.

    Raises:
        RolemeshError: RM038 if DTensor has no placements for the layout.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        shape: Sequence[int],
        dtype: torch.dtype,
        device_mesh: DeviceMesh,
        mesh: Mesh,
    ) -> None:
        whole = tuple(map(int, shape))
        stored = StoredTensor(dtype, distribute(layout, whole, mesh))
        self.name = name
        self.layout = layout
        self.shape = torch.Size(whole)
        self.stride = _contiguous(whole)
        self.mesh = mesh
        self.device_mesh = device_mesh
        self.placements: tuple[Placement, ...] = to_placements(Manifest(mesh, {name: stored}), name)
        self.padded = layout.local_shape(whole, mesh)
        held, _ = compute_local_shape_and_global_offset(whole, device_mesh, self.placements)
        self.held = tuple(held)

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """A program's shard of a DTensor of this place, with pads.

        Raises:
            RolemeshError: RM024 if it is no DTensor.
        """
        if not isinstance(tensor, DTensor):
            raise _otherwise(self, tensor)
        local = tensor._local_tensor.detach()
        if tuple(local.shape) == self.padded:
            return local if local.is_contiguous() else local.contiguous()
        if not local.numel():
            return local.new_zeros(self.padded)
        for dim, (have, want) in enumerate(zip(local.shape, self.padded, strict=True)):
            if have < want:
                shape = list(local.shape)
                shape[dim] = want - have
                local = torch.cat([local, local.new_zeros(shape)], dim)
        return local

    def dtensor(self, local: torch.Tensor) -> DTensor:
        """The DTensor of a program's shard."""
        if tuple(local.shape) != self.held:
            local = local[tuple(slice(0, n) for n in self.held)].contiguous()
        return DTensor.from_local(
            local,
            self.device_mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a DTensor of this place."""
        return (
            isinstance(tensor, DTensor)
            and tensor.device_mesh == self.device_mesh
            and tuple(tensor.placements) == self.placements
        )


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def convert(holders: Iterable[tuple[Holder, Place]], rank: int) -> None:
    """Put DTensors in the place of parameters that are none yet.

    Args:
        holders: The parameters, each with how it lies.
        rank: This rank.

    Raises:
        RolemeshError: RM024 if a parameter is a DTensor that lies otherwise, or an optimizer has
            state for one that is whole. Then nothing has changed.
    """
    whole: list[tuple[Holder, Place]] = []
    for holder, place in holders:
        tensor = holder.tensor
        if not isinstance(tensor, DTensor):
            whole.append((holder, place))
        elif not place.fits(tensor):
            raise _otherwise(place, tensor)
    if not whole:
        return
    old = {id(holder.tensor): holder for holder, _ in whole}
    optimizers = _optimizers_of(old)
    made: dict[int, nn.Parameter] = {}
    for holder, place in whole:
        tensor = holder.tensor
        with torch.inference_mode(False):  # the first call may be one of evaluation
            local = scatter_one(tensor.detach(), place.layout, place.mesh, rank)
            new = nn.Parameter(place.dtensor(local.clone()), requires_grad=tensor.requires_grad)
        for key, value in vars(tensor).items():
            setattr(new, key, value)
        made[id(tensor)] = new
        holder.replace(new)
        _free(tensor)
        stand_in(holder, tensor)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [made.get(id(entry), entry) for entry in group["params"]]


def _otherwise(place: Place, tensor: torch.Tensor) -> RolemeshError:
    have = "it is no DTensor"
    if isinstance(tensor, DTensor):
        have = f"{tuple(tensor.placements)} on {tensor.device_mesh}"
    return RolemeshError(
        "RM024",
        what=f"{place.name} lies otherwise than this program needs",
        where=f"{have}, needed {place.placements} on {place.device_mesh}",
        why="parameters are DTensors from the first step on, and all programs share them",
        fix="compile with one role, mesh and annotations, load weights into the DTensors that are "
        "there, or build the model again",
    )


def _optimizers_of(parameters: Mapping[int, Holder]) -> list[torch.optim.Optimizer]:
    """Optimizers that were built over some of these parameters."""
    found = []
    for entry in gc.get_objects():
        # A class is asked for, not the object: some proxies import what they stand for.
        if not issubclass(type(entry), torch.optim.Optimizer):
            continue
        held = [p for group in entry.param_groups for p in group["params"] if id(p) in parameters]
        started = [parameters[id(p)].name for p in held if entry.state.get(p)]
        if started:
            raise RolemeshError(
                "RM024",
                what=f"{type(entry).__name__} has state for whole parameters",
                where=", ".join(started[:3]),
                why="parameters become DTensors at the first step, and their state does not",
                fix="compile the model before the first step of the optimizer",
            )
        if held:
            found.append(entry)
    return found


def _free(tensor: torch.Tensor) -> None:
    """Take the bytes of a parameter that a DTensor stands for: whoever reads it gets an error."""
    storage = tensor.untyped_storage()
    if storage.resizable() and storage.nbytes():
        storage.resize_(0)
        torch._C._set_throw_on_mutable_data_ptr(tensor)
