"""The ahead-of-time API, in JAX's words: trace, shard, lower, compile; and lock-step runs.

    traced = rolemesh.trace(model, *args)
    sharded = rolemesh.shard(traced, mesh, role="decode")
    compiled = rolemesh.lower(sharded, target="eager").compile()
    compiled(*args)

`torch.compile(backend="rolemesh")` is the same pipeline driven by Dynamo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from rolemesh.compiler.analysis import CostAnalysis, cost_analysis, memory_analysis
from rolemesh.compiler.cache.sharded import Kept, rank_program
from rolemesh.compiler.capture.entry import Captured
from rolemesh.compiler.capture.tracing import Traced, trace, trace_training
from rolemesh.compiler.dump.record import RunWriter, writer_for
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.ledger import Collective, collectives
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.text import program_text
from rolemesh.compiler.memory import MemoryAnalysis
from rolemesh.compiler.pipeline import MeshLike, ShardOptions, Stages, as_mesh, shard_program
from rolemesh.compiler.sized import Sized, SizedPrograms, Values
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.targets import Target
from rolemesh.lowering.targets import target as target_named
from rolemesh.passes.cost import CostTable
from rolemesh.runtime.ge.ranks import GeRanks
from rolemesh.runtime.groups import MeshGroups, device_mesh_of, groups_for
from rolemesh.runtime.holder import Holder
from rolemesh.runtime.lockstep import Ledger, assemble_outputs, run_lockstep, scatter_inputs
from rolemesh.runtime.rank import Call, RankProgram
from rolemesh.runtime.step import StepProgram
from rolemesh.runtime.store import default_store

__all__ = [
    "Compiled",
    "Lowered",
    "LoweredRanks",
    "Sharded",
    "lockstep",
    "lower",
    "shard",
    "step_program",
    "trace",
    "trace_training",
]

_S = TypeVar("_S", bound=Sized)


@dataclass(frozen=True, eq=False)
class Sharded:
    """A sharded Program with the trace it came from.

    Attributes:
        traced: The trace.
        options: What it was sharded for.
        stages: The Program as decided and as partitioned.
        mesh: The mesh as the user gave it.
        dump: Where stages are written.
    """

    traced: Traced
    options: ShardOptions
    stages: Stages
    mesh: MeshLike
    dump: RunWriter | None = None

    @property
    def program(self) -> Program:
        """The Program that every rank runs."""
        return self.stages.partitioned

    def as_text(self, module: str | None = None) -> str:
        """The Program as text, or one module of it."""
        return program_text(self.program, module)

    def program_for(self, inputs: Sequence[torch.Tensor]) -> Program:
        """The Program with the plain sizes of one run.

        A Program with symbolic sizes serves all sizes that meet what its passes assumed. For
        others, which is rare, the traced Program is sharded anew.

        Args:
            inputs: The inputs of the Program, of logical shapes.
        """
        values = self.program.values(inputs)
        if self.program.fits(values):
            return self.program.at(values)
        return self.shard_again(self.traced.program.at(values)).partitioned

    def kept(self, program: Program) -> Kept | None:
        """Where this process keeps what targets make of a sharded Program; None for nowhere."""
        return None

    @property
    def decided(self) -> Program:
        """The Program with decisions; made again if only the result was read from a file."""
        if self.stages.decided is not None:
            return self.stages.decided
        again = shard_program(self.traced.program, self.options, self.program.phase or None)
        assert again.decided is not None, "the pipeline decides"
        return again.decided

    @property
    def captured(self) -> Program:
        """The traced Program, or one with its signature alone, if that is all that is needed."""
        return self.traced.program

    def shard_again(self, program: Program) -> Stages:
        """The stages of the traced Program; for that at plain sizes, it sharded likewise."""
        if program is self.captured:
            return self.stages
        return shard_program(program, self.options, self.program.phase or None, dump=self.dump)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Every collective, in the order ranks issue it."""
        return collectives(self.program)

    def cost_analysis(self) -> CostAnalysis:
        """FLOPs and bytes of one run on one rank."""
        return cost_analysis(self.decided, self.program)

    def memory_analysis(self) -> MemoryAnalysis:
        """Bytes one rank holds."""
        return memory_analysis(self.program)


def shard(
    traced: Traced,
    mesh: MeshLike,
    role: str | None = None,
    *,
    phase: str | None = None,
    axis: str | None = None,
    annotations: Mapping[str, P] | None = None,
    costs: CostTable | None = None,
    prefetch: int | None = None,
    optimise: bool = True,
    memory_budget: float = 1.0,
    dump: str | None = None,
) -> Sharded:
    """Choose layouts for a mesh and insert the collectives they need.

    Args:
        traced: What `trace` returned.
        mesh: Axis sizes by name, or a Mesh, or a DeviceMesh.
        role: `prefill`, `decode`, `pd_mixed` or `train`; None shards by annotations alone.
        phase: Phase of the role; by default decode for one new token per request, else prefill.
        axis: Mesh axis the role uses; by default `tp`, else the last one.
        annotations: `P` by name pattern of parameters, buffers and inputs; overrides the role.
        costs: Prices of collectives; by default bytes received.
        prefetch: Layers ahead that broadcasts of layer-sharded weights start.
        optimise: Whether to run the passes that change no result, only what it costs; see
            docs/passes.md.
        memory_budget: In training, share of the activations that may be kept for the backward part;
            what is not kept is computed again.
        dump: Folder to write a run directory to; by default what ROLEMESH_DUMP says. See
            docs/debugging.md.

    Raises:
        RolemeshError: For every option that does not fit; see docs/errors.md.
    """
    options = ShardOptions(
        as_mesh(mesh),
        role,
        axis,
        annotations or {},
        costs or CostTable(),
        prefetch,
        optimise,
        memory_budget,
    )
    writer = writer_for(dump)
    stages = shard_program(traced.program, options, phase, dump=writer)
    return Sharded(traced, options, stages, mesh, writer)


@dataclass(frozen=True, eq=False)
class Lowered:
    """A sharded Program for one target.

    Attributes:
        sharded: The Program.
        target: The target.
        options: The target's options.
    """

    sharded: Sharded
    target: Target
    options: object

    def as_text(self) -> str:
        """The Program as text."""
        return self.sharded.as_text()

    def compile(self) -> Compiled:
        """Bind the Program to this rank and its process groups, and compile it.

        Raises:
            RolemeshError: RM005 or RM006 if the process group does not fit the mesh.
        """
        mesh = self.sharded.mesh
        known = mesh if isinstance(mesh, DeviceMesh) else as_mesh(mesh)
        groups = groups_for(known)
        if self.sharded.stages.halves is not None:
            holders = self.sharded.traced.entry.captured.holders

            def compile_both(program: Program, values: Values) -> StepProgram:
                stages = self.sharded.shard_again(program)
                return step_program(stages, self.target, self.options, known, holders, values)

            return Compiled(self, groups, self._programs(compile_both))

        def compile_program(program: Program, values: Values) -> RankProgram:
            stages = self.sharded.shard_again(program)
            kept = self.sharded.kept(stages.partitioned)
            with stages.lowering(self.options) as options:
                return rank_program(stages.partitioned, self.target, options, groups, values, kept)

        return Compiled(self, groups, self._programs(compile_program))

    def lockstep(self) -> LoweredRanks:
        """Lower the Program for every rank, to run all of them in this process.

        Raises:
            RolemeshError: RM003 if the target's graphs need processes of their own, RM006 if this
                process is a rank of a process group, and what lowering raises.
        """
        if not isinstance(self.options, GeOptions):
            raise RolemeshError(
                "RM003",
                what=f"target {self.target.name!r} does not run in lock-step",
                where="Lowered.lockstep",
                why="its collectives are torch.distributed's, between processes",
                fix="use target 'ge', rolemesh.lockstep(sharded, ...), or one process per rank",
            )
        options = self.options

        def compile_program(program: Program, values: Values) -> GeRanks:
            stages = self.sharded.shard_again(program)
            with stages.lowering(options) as chosen:
                return GeRanks(stages.partitioned, self.target, chosen, values)

        return LoweredRanks(self, self._programs(compile_program))

    def _programs(self, compile_program: Callable[[Program, Values], _S]) -> SizedPrograms[_S]:
        captured = self.sharded.captured
        programs = SizedPrograms(captured, compile_program)
        programs.at(captured.hints)  # what cannot be compiled is refused now
        return programs


def step_program(
    stages: Stages,
    target: Target,
    options: object,
    mesh: Mesh | DeviceMesh,
    holders: Mapping[int, Holder],
    values: Values,
) -> StepProgram:
    """Compile a sharded training step for this rank. Parameters become DTensors.

    Args:
        stages: The step, with its halves.
        target: What it is compiled to.
        options: The target's options.
        mesh: The mesh; for a DeviceMesh, parameters are on it.
        holders: Where the parameters are kept, by input.
        values: Values of the symbols of its sizes to compile by, an example.

    Raises:
        RolemeshError: RM005 or RM006 if the process group does not fit the mesh, and what
            `StepProgram` raises.
    """
    assert stages.halves is not None
    groups = groups_for(mesh)
    device_mesh = mesh if isinstance(mesh, DeviceMesh) else device_mesh_of(groups)
    return StepProgram(
        stages.partitioned, stages.halves, target, options, groups, device_mesh, values, holders
    )


@dataclass(frozen=True, eq=False)
class Compiled:
    """A compiled rank program, called with the model's own (global) arguments.

    Attributes:
        lowered: What was compiled.
        groups: This rank and its process groups.
        programs: What it was compiled to, by sizes.
    """

    lowered: Lowered
    groups: MeshGroups
    programs: SizedPrograms[RankProgram] | SizedPrograms[StepProgram]

    @property
    def sharded(self) -> Sharded:
        """The sharded Program."""
        return self.lowered.sharded

    def __call__(self, *args: object, **kwargs: object) -> object:
        """What the model returns, computed by all ranks; every rank must make the call.

        A training step returns losses that `backward` may be called on, and other results as
        DTensors where they were computed. Without gradients it runs its forward part.
        """

        def run(captured: Captured, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            call = Call.of(captured.program, inputs, default_store())
            return self.programs.at(call.values).run(call)

        return self.sharded.traced.entry.call(run, *args, **kwargs)


@dataclass(frozen=True, eq=False)
class LoweredRanks:
    """The lowered programs of all ranks, called with the model's own (whole) arguments.

    Attributes:
        lowered: What was lowered.
        programs: The ranks' programs, by sizes.
    """

    lowered: Lowered
    programs: SizedPrograms[GeRanks]

    @property
    def sharded(self) -> Sharded:
        """The sharded Program."""
        return self.lowered.sharded

    def __call__(self, *args: object, poison: bool = False, **kwargs: object) -> object:
        """Run every rank in this process and return what the model returns, reassembled.

        Args:
            *args: Arguments of the model, whole. Tensors it mutates get their new values.
            poison: Fill float pads of inputs with NaN, for tests.
            **kwargs: Keyword arguments of the model.

        Raises:
            RolemeshError: RM020 if the arguments differ from the traced ones.
        """

        def run(captured: Captured, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            values = captured.program.values(inputs)
            ranks = self.programs.at(values)
            program = ranks.program.at(values)
            outputs = ranks(scatter_inputs(program, inputs, poison=poison), values=values)
            return _require_tensors(assemble_outputs(program, outputs))

        return self.sharded.traced.entry.call(run, *args, **kwargs)


def lower(
    sharded: Sharded, target: str = "eager", options: Mapping[str, object] | None = None
) -> Lowered:
    """Choose what the ranks' programs are compiled to.

    Args:
        sharded: What `shard` returned.
        target: `eager`, `inductor`, `ge` or `npugraph_ex`.
        options: Options of the target; see `GeOptions` for those of `ge`.

    Raises:
        RolemeshError: RM003 for an unknown target, RM018 for options it does not have.
    """
    chosen = target_named(target)
    return Lowered(sharded, chosen, chosen.parse(options))


def lockstep(
    sharded: Sharded,
    *args: object,
    poison: bool = False,
    check: bool = False,
    ledger: Ledger | None = None,
    **kwargs: object,
) -> object:
    """Run every rank in this process and return what the model returns, reassembled.

    Args:
        sharded: What `shard` returned.
        *args: Arguments of the model, whole. Tensors it mutates get their new values.
        poison: Fill with NaN whatever a rank must not read, for tests.
        check: Compare every local shape with the Program's layouts.
        ledger: Called with every exchange.
        **kwargs: Keyword arguments of the model.

    Raises:
        RolemeshError: RM020 if the arguments differ from the traced ones.
    """

    def run(captured: Captured, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        program = sharded.program_for(inputs)
        locals_ = scatter_inputs(program, inputs, poison=poison)
        outputs = run_lockstep(program, locals_, poison=poison, check=check, ledger=ledger)
        return _require_tensors(assemble_outputs(program, outputs))

    return sharded.traced.entry.call(run, *args, **kwargs)


def _require_tensors(values: list[torch.Tensor | None]) -> list[torch.Tensor]:
    tensors = [value for value in values if value is not None]
    assert len(tensors) == len(values), "captured outputs are tensors"
    return tensors
