"""One rank's compiled Program: global arguments in, the rank's part of the work, outputs out."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import sympy
import torch
import torch.distributed as dist

from rolemesh.compiler.ir.dims import concrete
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import Input, InputKind, Program
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

__all__ = ["Call", "RankProgram", "process_watch", "stays_whole"]


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


class Call(NamedTuple):
    """The inputs of one call, and what a program is chosen by.

    Attributes:
        inputs: For each input the global tensor; for a stored one, its (ghost) tensor.
        store: Where shards are kept.
        values: Values of the symbols of its sizes.
        key: Equal for calls whose inputs have the same sizes and are stored alike.
    """

    inputs: Sequence[torch.Tensor]
    store: Store
    values: Mapping[sympy.Symbol, int]
    key: tuple[object, ...]

    @classmethod
    def of(cls, program: Program, inputs: Sequence[torch.Tensor], store: Store) -> Call:
        """A call of a Program, captured or sharded."""
        values = program.values(inputs)
        return cls(inputs, store, values, (store.kinds(inputs), *values.values()))


class _Plan(NamedTuple):
    """What is to be done at each call whose inputs are stored alike.

    Attributes:
        cut: Positions of inputs that a rank has a part of, with their layouts.
        whole: Positions of inputs that are passed as they are.
        constants: Positions of constants, with this rank's parts of them.
        returned: For each output, the position of the input to return for it, if it is one.
    """

    cut: tuple[tuple[int, Layout], ...]
    whole: tuple[int, ...]
    constants: tuple[tuple[int, torch.Tensor], ...]
    returned: tuple[int | None, ...]


_MOST_PLANS = 256
"""Plans that a program remembers."""


class RankProgram:
    """A partitioned Program bound to this process's rank and compiled for a target.

    Args:
        program: The Program.
        target: The target.
        options: Its options, as `Target.parse` returns them.
        groups: Process groups of the Program's mesh.
        values: Values of the symbols of its sizes to compile by, an example.
        saved: What the target saved of it in another process, to load that.

    Attributes:
        program: The Program.
        saved: What the target saves of it; None if it saves nothing.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        options: object,
        groups: MeshGroups,
        values: Mapping[sympy.Symbol, int] | None = None,
        saved: Mapping[str, object] | None = None,
    ) -> None:
        self.program = program
        self.rank = groups.rank
        self.watch = process_watch()
        self.layouts = [program.layout(node) for node in program.placeholders]
        self.examples = Examples(program, self.rank, values)
        signature = Signature.of(program, self.rank)
        run = None
        if saved is not None and target.reload is not None:
            run = target.reload(saved, self.examples.inputs, signature)
        if run is None:
            pool = make_pool(program) if target.pooled else None
            module = bind(program, self.rank, groups.names, pool, routes=target.routes)
            run = target.lower(module, self.examples.inputs, signature, options)
        self.saved: Mapping[str, object] | None = getattr(run, "saved", None)
        self.lowered = on_process_groups(run, options) if isinstance(options, GeOptions) else run
        self._plans: dict[tuple[object, ...], _Plan] = {}

    def __call__(self, inputs: Sequence[torch.Tensor], store: Store) -> list[torch.Tensor]:
        """Run on global inputs; see `run`."""
        return self.run(Call.of(self.program, inputs, store))

    def run(self, call: Call) -> list[torch.Tensor]:
        """Run one call.

        Returns:
            The outputs; for the new value of a stored input, that input itself, whose shard has
            been updated.
        """
        inputs = call.inputs
        plan = self._plans.get(call.key) or self._plan(call)
        locals_ = call.store.locals(inputs)
        for position, layout in plan.cut:
            locals_[position] = scatter_one(
                inputs[position], layout, self.program.the_mesh, self.rank
            )
        for position in plan.whole:
            locals_[position] = inputs[position].contiguous()  # as it was compiled for
        for position, local in plan.constants:
            locals_[position] = local
        symbols = () if self.program.scope is None else call.values.values()
        with self.watch.guard():
            results = self.lowered(*locals_, *symbols)
        return [
            value if position is None else inputs[position]  # type: ignore[misc]
            for value, position in zip(results, plan.returned, strict=True)
        ]

    def _plan(self, call: Call) -> _Plan:
        """Store what is to be stored, check what is, and find what is left to do at each call."""
        program, inputs, store = self.program, call.inputs, call.store
        mesh = program.the_mesh
        layouts = self._layouts(call.values)
        for entry, tensor, layout in zip(program.inputs, inputs, layouts, strict=True):
            # What another program stores may come in as a plain argument: a cache only read here.
            if not stays_whole(entry, tensor) or store.find(tensor) is not None:
                store.local(tensor, entry.name, layout, mesh, self.rank)
        store.release(inputs)
        plain = [i for i, tensor in enumerate(inputs) if store.find(tensor) is None]
        whole = [i for i in plain if layouts[i].canonical(mesh).is_replicated]
        parts = [i for i in plain if i not in whole]
        fixed = [i for i in parts if program.inputs[i].kind is InputKind.CONSTANT]
        mutated = [output.mutates for output in program.outputs]
        plan = _Plan(
            tuple((i, layouts[i]) for i in parts if i not in fixed),
            tuple(whole),
            tuple((i, scatter_one(inputs[i], layouts[i], mesh, self.rank)) for i in fixed),
            tuple(i if i not in plain else None for i in mutated),
        )
        if len(self._plans) == _MOST_PLANS:  # calls of ever new sizes
            self._plans.clear()
        self._plans[store.kinds(inputs), *call.key[1:]] = plan
        return plan

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
        if self.program.scope is None:
            return self.layouts
        return [Layout(concrete(layout.placements, values)) for layout in self.layouts]
