"""The `torch.compile` backend: `torch.compile(model, backend="rolemesh", options={...})`.

PyTorch finds `rolemesh_backend` through the package's entry point, so user code imports nothing.
Dynamo calls it once per captured graph. The Program is sharded and compiled at the first call of
each phase, because the phase belongs to the call: one captured graph can serve several.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback
from torch.distributed.device_mesh import DeviceMesh

from rolemesh.compiler.cache.captured import capture_cached
from rolemesh.compiler.cache.folder import default_folder
from rolemesh.compiler.cache.sharded import Kept, rank_program
from rolemesh.compiler.cache.text import NotCacheableError
from rolemesh.compiler.capture.entry import Captured, is_overridden
from rolemesh.compiler.dump.record import writer_for
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.pipeline import (
    MeshLike,
    ShardOptions,
    as_mesh,
    check_options,
    infer_phase,
    shard_program,
)
from rolemesh.compiler.sized import SizedPrograms, Values
from rolemesh.compiler.training import Steps, compile_step
from rolemesh.lowering.targets import Target
from rolemesh.lowering.targets import target as target_named
from rolemesh.passes.cost import CostTable
from rolemesh.runtime.groups import MeshGroups, groups_for
from rolemesh.runtime.phase import current_phase
from rolemesh.runtime.rank import Call, RankProgram
from rolemesh.runtime.store import default_store

__all__ = ["BackendOptions", "Observer", "RefusedError", "observing", "rolemesh_backend"]


@dataclass(frozen=True)
class BackendOptions:
    """The options of `torch.compile`, checked.

    Attributes:
        shard: What decides the sharded Programs.
        mesh: The mesh as given, whose process groups are used.
        target: What rank programs are compiled to.
        target_options: The target's options.
        phase: Phase of every call; None to infer it, unless `rolemesh.phase` says it.
        dump: Folder to write a run directory to; None for what ROLEMESH_DUMP says.
    """

    shard: ShardOptions
    mesh: Mesh | DeviceMesh
    target: Target
    target_options: object
    phase: str | None = None
    dump: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, object]) -> BackendOptions:
        """Check the options given to `torch.compile`.

        Raises:
            RolemeshError: RM018 for an unknown, missing or ill-typed option; RM001 to RM004 and
                RM015 for values that name nothing.
        """
        check_options(options, frozenset(_TYPES))
        for name, types in _TYPES.items():
            if name in options and not isinstance(options[name], types):
                raise _bad(name, options[name], types)
        if "mesh" not in options:
            raise RolemeshError(
                "RM018",
                what="the option mesh is missing",
                where="options of torch.compile",
                why="layouts are over the axes of a mesh",
                fix='pass options={"mesh": {"tp": 4}, "role": "pd_mixed"}',
            )
        mesh: MeshLike = options["mesh"]  # type: ignore[assignment]
        shard = ShardOptions(
            as_mesh(mesh),
            **{name: options[name] for name in _SHARD_OPTIONS if name in options},  # type: ignore[arg-type]
        )
        target = target_named(str(options.get("target", "eager")))
        target_options = target.parse(options.get("target_options"))  # type: ignore[arg-type]
        phase = options.get("phase")
        if phase is not None and shard.preset is not None:
            shard.preset.tokens(str(phase))
        known = mesh if isinstance(mesh, DeviceMesh) else shard.mesh
        dump = options.get("dump")
        return cls(
            shard,
            known,
            target,
            target_options,
            None if phase is None else str(phase),
            None if dump is None else str(dump),
        )


_SHARD_OPTIONS = (
    "role",
    "axis",
    "annotations",
    "costs",
    "prefetch",
    "optimise",
    "memory_budget",
)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "mesh": (object,),
    "role": (str,),
    "target": (str,),
    "target_options": (Mapping,),
    "phase": (str,),
    "axis": (str,),
    "annotations": (Mapping,),
    "costs": (CostTable,),
    "prefetch": (int,),
    "optimise": (bool,),
    "memory_budget": (float, int),
    "dump": (str,),
}


def _bad(name: str, value: object, types: Sequence[type]) -> RolemeshError:
    expected = " or ".join(kind.__name__ for kind in types)
    return RolemeshError(
        "RM018",
        what=f"option {name!r} is {value!r}",
        where="options of torch.compile",
        why=f"it must be a {expected}",
        fix=f"pass a {expected}",
    )


def rolemesh_backend(
    gm: fx.GraphModule, example_inputs: Sequence[object], **kwargs: object
) -> Callable[..., object]:
    """Compile one Dynamo graph; the entry point that `torch.compile` calls.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs.
        **kwargs: `options`, as given to `torch.compile`.

    Raises:
        RolemeshError: For options that do not fit, or a graph that cannot be sharded.
    """
    given = kwargs.get("options")
    try:
        options = BackendOptions.parse(given if isinstance(given, Mapping) else {})
        if options.shard.preset is not None and options.shard.preset.trains:
            steps = Steps(
                options.shard, options.mesh, options.target, options.target_options, options.dump
            )
            return compile_step(steps, gm, example_inputs)
        phases = _Phases(options)
        if not is_overridden():
            phases.groups()  # what is wrong with them shows before the capture, which takes longer
        _, compiled, phases.key = capture_cached(
            phases.folder, gm, example_inputs, executor=phases.run
        )
    except RolemeshError as error:
        raise RefusedError(error) from error.__cause__
    return compiled


class RefusedError(RolemeshError, ShortenTraceback):
    """A RolemeshError that Dynamo passes on to its caller as it is, rather than wrapped.

    Args:
        error: The error to pass on.
    """

    def __init__(self, error: RolemeshError) -> None:
        Exception.__init__(self, str(error))
        vars(self).update(vars(error))
        # Dynamo shows its caller the frames from here on, and not its own.
        self.first_useful_frame = sys._getframe(1)

    def __reduce__(self) -> tuple[object, ...]:
        return RolemeshError.__reduce__(
            RolemeshError(self.code, self.what, where=self.where, why=self.why, fix=self.fix)
        )


Observer = Callable[[Program, Callable[[], list[torch.Tensor]]], list[torch.Tensor]]
"""Called in place of a run, with the rank's Program and the run; returns what the run returns."""

_OBSERVER: ContextVar[Observer | None] = ContextVar("rolemesh_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Hand every run of a compiled model inside the block to `observer`.

    Args:
        observer: Runs it, and sees the Program and what happens meanwhile.
    """
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


_MOST_CHOSEN = 256
"""Calls whose program is remembered."""


class _Phases:
    """Rank programs of one captured graph, by phase, compiled at first use.

    Attributes:
        options: The options of `torch.compile`.
        programs: By phase, one entry for each way in which the inputs were stored before.
        chosen: The program of a call, by its phase and key.
        inferred: The phase of calls that say none.
        folder: The compile cache; None if there is none.
        key: Key of the captured graph there; None if it is not kept.
    """

    def __init__(self, options: BackendOptions) -> None:
        self.options = options
        self.programs: dict[str | None, list[SizedPrograms[RankProgram]]] = {}
        self.chosen: dict[tuple[str | None, tuple[object, ...]], RankProgram] = {}
        self.inferred: str | None = None
        self.folder = default_folder()
        self.key: str | None = None

    def groups(self) -> MeshGroups:
        return groups_for(self.options.mesh)

    def run(self, captured: Captured, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        call = Call.of(captured.program, inputs, default_store())
        phase = self._phase(captured.program)
        program = self.chosen.get((phase, call.key)) or self._program(phase, captured.program, call)
        observer = _OBSERVER.get()
        if observer is None:
            return program.run(call)
        return observer(program.program, functools.partial(program.run, call))

    def _program(self, phase: str | None, captured: Program, call: Call) -> RankProgram:
        """The program for a call, compiled if there is none.

        A model captured in pieces has one storage, and one piece may serve several layers: what is
        stored stays as it is, and layers that are stored alike share a program.
        """
        stored = call.store.layouts(call.inputs, self.options.shard.mesh)
        alternatives = self.programs.setdefault(phase, [])
        for programs in alternatives:
            program = programs.at(call.values)
            if program.takes(stored, call.inputs):
                if len(self.chosen) == _MOST_CHOSEN:  # calls of ever new sizes
                    self.chosen.clear()
                self.chosen[phase, call.key] = program
                return program
        compile_program = functools.partial(self._compile, phase, stored)
        alternatives.append(SizedPrograms(captured, compile_program))
        return alternatives[-1].at(call.values)

    def _compile(
        self, phase: str | None, stored: Mapping[int, Layout], program: Program, values: Values
    ) -> RankProgram:
        options, groups = self.options, self.groups()
        writer = writer_for(options.dump)
        kept = None if writer is not None else self._kept(phase, stored, program)
        sharded = None if kept is None else kept.load()
        lowering: AbstractContextManager[object] = nullcontext(options.target_options)
        if sharded is None:
            stages = shard_program(program, options.shard, phase, stored, writer)
            sharded, lowering = stages.partitioned, stages.lowering(options.target_options)
            if kept is not None:
                kept.save(sharded)
        with lowering as chosen:
            return rank_program(sharded, options.target, chosen, groups, values, kept)

    def _kept(
        self, phase: str | None, stored: Mapping[int, Layout], program: Program
    ) -> Kept | None:
        """Where the sharded Program is kept."""
        if self.folder is None or self.key is None:
            return None
        try:
            return Kept.of(self.folder, self.key, self.options.shard, phase, stored, program)
        except NotCacheableError:
            return None

    def _phase(self, program: Program) -> str | None:
        said = current_phase() or self.options.phase or self.inferred
        if said is None:
            role = self.options.shard.preset
            said = self.inferred = None if role is None else infer_phase(program, role)
        return said
