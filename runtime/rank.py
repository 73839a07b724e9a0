"""One rank's compiled Program: global arguments in, the rank's part of the work, outputs out."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import sympy
import torch
import torch.distributed as dist

from rolemesh.compiler.ir.dims import concrete
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import Input, Program
from rolemesh.lowering.bind import bind, make_pool
from rolemesh.lowering.chunks import scatter_one
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Examples
from rolemesh.lowering.targets import Target
from rolemesh.runtime.ge.run import on_process_groups
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
        target: The target.
        options: Its options, as `Target.parse` returns them.
        groups: Process groups of the Program's mesh.
        values: Values of the symbols of its sizes to compile by, an example.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        options: object,
        groups: MeshGroups,
        values: Mapping[sympy.Symbol, int] | None = None,
    ) -> None:
        self.program = program
        self.rank = groups.rank
        self.watch = process_watch()
        self.layouts = [program.layout(node) for node in program.placeholders]
        pool = make_pool(program) if target.pooled else None
        module = bind(program, self.rank, groups.names, pool)
        self.examples = Examples(program, self.rank, values)
        signature = Signature.of(program, self.rank)
        run = target.lower(module, self.examples.inputs, signature, options)
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
        values = program.values(inputs)
        locals_ = [
            self._local(entry, tensor, layout, store)
            for entry, tensor, layout in zip(
                program.inputs, inputs, self._layouts(values), strict=True
            )
        ]
        store.release(
            [
                tensor
                for entry, tensor in zip(program.inputs, inputs, strict=True)
                if not stays_whole(entry, tensor)
            ]
        )
        with self.watch.guard():
            results = self.run(*locals_, *values.values())
        outputs = []
        for value, output in zip(results, program.outputs, strict=True):
            assert value is not None
            mutates = output.mutates
            if mutates is None or stays_whole(program.inputs[mutates], inputs[mutates]):
                outputs.append(value)
            else:
                if value is not locals_[mutates]:
                    locals_[mutates].copy_(value)
                outputs.append(inputs[mutates])
        return outputs

    def serves(self, values: Mapping[sympy.Symbol, int]) -> bool:
        """Whether the compiled program is right for these values of the symbols of its sizes."""
        return self.program.fits(values) and self.examples.hold(values)

    def takes(self, stored: Mapping[int, Layout], inputs: Sequence[torch.Tensor]) -> bool:
        """Whether inputs that live as shards lie as the program needs them.

        Args:
            stored: Their layouts, by position.
            inputs: Global inputs.
        """
        mesh = self.program.the_mesh
        needed = self._layouts(self.program.values(inputs))
        return all(
            layout == needed[index] or layout.same(needed[index], inputs[index].shape, mesh)
            for index, layout in stored.items()
        )

    def _layouts(self, values: Mapping[sympy.Symbol, int]) -> list[Layout]:
        if not values:
            return self.layouts
        return [Layout(concrete(layout.placements, values)) for layout in self.layouts]

    def _local(
        self, entry: Input, tensor: torch.Tensor, layout: Layout, store: Store
    ) -> torch.Tensor:
        mesh = self.program.the_mesh
        # What another program stores may come in as a plain argument: a cache that is only read.
        if stays_whole(entry, tensor) and store.find(tensor) is None:
            return scatter_one(tensor, layout, mesh, self.rank)
        return store.local(tensor, entry.name, layout, mesh, self.rank)
