"""One rank's compiled Program: global arguments in, the rank's part of the work, outputs out."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import fx

from rolemesh.compiler.ir.layout import Owner
from rolemesh.compiler.ir.program import Input, Program, tensor_type
from rolemesh.lowering.bind import bind, make_pool
from rolemesh.lowering.chunks import scatter_one
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.targets import Target
from rolemesh.runtime.ge.run import on_process_groups
from rolemesh.runtime.groups import MeshGroups
from rolemesh.runtime.store import Store
from rolemesh.runtime.watch import Watch

__all__ = ["RankProgram", "local_example", "stays_whole"]


def stays_whole(entry: Input, tensor: torch.Tensor) -> bool:
    """Whether a tensor is passed as it is instead of being stored as a shard.

    Plain arguments are not stored. A small updated tensor, such as a cache's length, stays an
    ordinary tensor on every rank, so that code outside the compiled model can read it.
    """
    return not entry.is_state or (entry.mutated and tensor.ndim < 2)


def local_example(program: Program, node: fx.Node, rank: int) -> torch.Tensor:
    """A tensor like a rank's local tensor of an input, without bytes that matter."""
    layout, value = program.layout(node), tensor_type(node)
    coordinate = program.the_mesh.coordinate(rank)
    for axis, placement in enumerate(layout.placements):
        if isinstance(placement, Owner) and placement.rank != coordinate[axis]:
            return torch.empty(0, dtype=value.dtype)
    return torch.empty(layout.local_shape(value.shape, program.the_mesh), dtype=value.dtype)


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
        target: The target.
        options: Its options, as `Target.parse` returns them.
        groups: Process groups of the Program's mesh.
    """

    def __init__(
        self, program: Program, target: Target, options: object, groups: MeshGroups
    ) -> None:
        self.program = program
        self.rank = groups.rank
        self.watch = process_watch()
        self.layouts = [program.layout(node) for node in program.placeholders]
        pool = make_pool(program) if target.pooled else None
        module = bind(program, self.rank, groups.names, pool)
        examples = [local_example(program, node, self.rank) for node in program.placeholders]
        run = target.lower(module, examples, Signature.of(program, self.rank), options)
        self.run = on_process_groups(run, options) if isinstance(options, GeOptions) else run

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
                if value is not locals_[mutates]:
                    locals_[mutates].copy_(value)
                outputs.append(inputs[mutates])
        return outputs

    def _local(self, entry: Input, tensor: torch.Tensor, index: int, store: Store) -> torch.Tensor:
        layout = self.layouts[index]
        mesh = self.program.the_mesh
        if stays_whole(entry, tensor):
            return scatter_one(tensor, layout, mesh, self.rank)
        return store.local(tensor, entry.name, layout, mesh, self.rank)
