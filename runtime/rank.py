"""One rank's compiled Program: global arguments in, the rank's part of the work, outputs out."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from rolemesh.compiler.ir.layout import Owner
from rolemesh.compiler.ir.program import Input, Program, tensor_type
from rolemesh.lowering.bind import bind, make_pool
from rolemesh.lowering.chunks import scatter_one
from rolemesh.lowering.targets import target as target_named
from rolemesh.runtime.groups import MeshGroups
from rolemesh.runtime.store import Store
from rolemesh.runtime.watch import Watch

__all__ = ["RankProgram", "stays_whole"]


def stays_whole(entry: Input, tensor: torch.Tensor) -> bool:
    """Whether a tensor is passed as it is instead of being stored as a shard.

    Plain arguments are not stored. A small updated tensor, such as a cache's length, stays an
    ordinary tensor on every rank, so that code outside the compiled model can read it.
    """
    return not entry.is_state or (entry.mutated and tensor.ndim < 2)


_WATCHES: WeakKeyDictionary[dist.ProcessGroup, Watch] = WeakKeyDictionary()


def process_watch() -> Watch:
    """The one watch of this process over the ranks of the present default process group."""
    world = dist.group.WORLD
    assert world is not None, "groups_for has made sure of it"
    if world not in _WATCHES:
        watch = _WATCHES[world] = Watch.of_default_group()
        # A thread inside the store's C++ code while the interpreter ends would abort the process.
        atexit.register(watch.close)
    return _WATCHES[world]


class RankProgram:
    """A partitioned Program bound to this process's rank and compiled for a target.

    Args:
        program: The Program.
        target: Name of the target.
        groups: Process groups of the Program's mesh.

    Raises:
        RolemeshError: RM003 for an unknown target.
    """

    def __init__(self, program: Program, target: str, groups: MeshGroups) -> None:
        lower = target_named(target)
        self.program = program
        self.rank = groups.rank
        self.watch = process_watch()
        self.layouts = [program.layout(node) for node in program.placeholders]
        pool = make_pool(program) if target == "eager" else None
        module = bind(program, self.rank, groups.names, pool)
        self.run = lower(module, [self._example(i) for i in range(len(self.layouts))])

    def __call__(self, inputs: Sequence[torch.Tensor], store: Store) -> list[torch.Tensor]:
        """Run on global inputs.

        Args:
            inputs: For each input the global tensor; for a stored one, its (ghost) tensor.
            store: Where shards are kept.

        Returns:
            The outputs; for the new value of a stored input, that input itself, whose shard has
            been updated.
        """
        program = self.program
        locals_ = [
            self._local(entry, tensor, index, store)
            for index, (entry, tensor) in enumerate(zip(program.inputs, inputs, strict=True))
        ]
        store.release(
            [
                tensor
                for entry, tensor in zip(program.inputs, inputs, strict=True)
                if not stays_whole(entry, tensor)
            ]
        )
        with self.watch.guard():
            values = self.run(*locals_)
        outputs = []
        for value, output in zip(values, program.outputs, strict=True):
            assert value is not None
            mutates = output.mutates
            if mutates is None or stays_whole(program.inputs[mutates], inputs[mutates]):
                outputs.append(value)
            else:
                locals_[mutates].copy_(value)
                outputs.append(inputs[mutates])
        return outputs

    def _local(self, entry: Input, tensor: torch.Tensor, index: int, store: Store) -> torch.Tensor:
        layout = self.layouts[index]
        mesh = self.program.the_mesh
        if stays_whole(entry, tensor):
            return scatter_one(tensor, layout, mesh, self.rank)
        return store.local(tensor, entry.name, layout, mesh, self.rank)

    def _example(self, index: int) -> torch.Tensor:
        """A tensor like this rank's local input, without bytes that matter."""
        layout = self.layouts[index]
        value = tensor_type(self.program.placeholders[index])
        coordinate = self.program.the_mesh.coordinate(self.rank)
        for axis, placement in enumerate(layout.placements):
            if isinstance(placement, Owner) and placement.rank != coordinate[axis]:
                return torch.empty(0, dtype=value.dtype)
        return torch.empty(
            layout.local_shape(value.shape, self.program.the_mesh), dtype=value.dtype
        )
