"""Every stage of a case's Programs with real inputs: what compare and bisect work on.

The case runs on the single device, call by call. Where the role runs a call, its flat inputs are
kept as they are at that moment, so that a decode phase starts from what a real prefill left, and
the passes are run one by one. A pass that raises ends the list of stages and is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from rolemesh.compiler.capture.entry import Captured, reference_executor
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.command.steps import Step, drive, plan
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.pipeline import ShardOptions, shard_program
from rolemesh.compiler.roles import role_named
from rolemesh.passes.base import Pass

__all__ = [
    "CAPTURE",
    "Failure",
    "PhaseRun",
    "phase_runs",
    "stages_of",
]

CAPTURE = "capture"
"""The stage before all passes."""


@dataclass(frozen=True)
class Failure:
    """A pass that raised.

    Attributes:
        step: The pass, with its options.
        error: What it raised.
    """

    step: Pass
    error: Exception


@dataclass(frozen=True, eq=False)
class PhaseRun:
    """One phase of a role: its stages, and inputs to run them on.

    Attributes:
        phase: The phase.
        options: What it is sharded for.
        programs: The Program after each pass, by the pass's name, in order; first the captured one.
        inputs: The inputs of all of them, whole.
        failure: The pass that raised, if one did.
        poison: Whether to fill with NaN what a rank must not read.
    """

    phase: str
    options: ShardOptions
    programs: Mapping[str, Program]
    inputs: tuple[torch.Tensor, ...]
    failure: Failure | None
    poison: bool

    def at(self, stage: str) -> Program:
        """A stage with the plain sizes of the inputs."""
        program = self.programs[stage]
        return program.at(program.values(self.inputs))


def stages_of(
    captured: Program, options: ShardOptions, phase: str | None
) -> tuple[dict[str, Program], Failure | None]:
    """Run the passes one by one.

    Args:
        captured: The captured Program.
        options: What to shard it for.
        phase: Phase of the role.

    Returns:
        The Program after each pass, and the pass that raised, if one did.

    Raises:
        RolemeshError: What the pipeline itself refuses, such as RM007.
    """
    programs = {CAPTURE: captured}
    failures: list[Failure] = []

    def through(step: Pass, program: Program) -> Program:
        try:
            programs[step.name] = step.apply(program)
        except Exception as error:
            failures.append(Failure(step, error))
            raise
        return programs[step.name]

    try:
        shard_program(captured, options, phase, through=through)
    except Exception:
        if not failures:
            raise
    return programs, failures[0] if failures else None


def phase_runs(
    options: CheckOptions, progress: Callable[[str], None], phase: str | None = None
) -> Iterator[PhaseRun]:
    """Each phase of the role that the case has, at its first call, one after the other.

    Args:
        options: The model, the role, the mesh and sizes.
        progress: Called with what is being done.
        phase: The only phase to give; None for all.

    Raises:
        RolemeshError: RM004 if the role runs no such phase of the case, and for models that cannot
            be loaded or captured.
    """
    role = role_named(options.role)
    progress(f"loading {options.model}")
    case = options.load().fresh()
    # oneDNN's low-precision matrix product may read past the end of a row, where NaN would show.
    poison = all(weight.dtype.itemsize >= 4 for weight in case.model.parameters())
    chosen = ShardOptions(options.mesh, options.role, optimise=options.optimise)
    steps = plan(case, role, 1)
    known = [step.phase for step in steps if step.phase]
    if phase is not None and phase not in known:
        raise RolemeshError(
            "RM004",
            what=f"there is no phase {phase!r}",
            where=f"{options.model}, role {options.role}",
            why=f"its phases are {', '.join(known)}",
            fix="name one of them with --phase",
        )
    found: dict[str, PhaseRun] = {}

    def call(step: Step, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if not step.phase or step.phase in found or phase not in (None, step.phase):
            return case.model(*args, **kwargs)
        progress(f"compiling {step.name}")
        traced = trace(case.model, *args, **kwargs)
        programs, failure = stages_of(traced.program, chosen, step.phase)

        def run(captured: Captured, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            kept = tuple(tensor.clone() for tensor in inputs)
            found[step.phase] = PhaseRun(step.phase, chosen, programs, kept, failure, poison)
            return reference_executor(captured, inputs)

        return traced.entry.call(run, *args, **kwargs)

    given: set[str] = set()
    with torch.no_grad():
        for _ in drive(case, steps, call):
            for name in found.keys() - given:
                given.add(name)
                yield found[name]
