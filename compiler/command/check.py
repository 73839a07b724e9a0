"""The check: a role's sharded programs against the single device, on all ranks.

The single device runs the whole plan first (prefill, then greedy decode). Then the ranks run the
phases of the role, and one device the others: for the role `decode` the prefill before, whose
cache the ranks take over; for the role `prefill` the decoding after, from the cache that the ranks
filled. After each step every tensor of the result and of the arguments is compared.

Ranks run in lock-step in this process, with NaN wherever a rank must not read, or as real processes
over gloo (`rolemesh.compiler.command.check_ranks`). With the target `ge`, lock-step runs GE graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch

from rolemesh.compiler.api import Sharded, lockstep, lower, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.command.check_ranks import run_on_processes
from rolemesh.compiler.command.report import CheckReport, PhaseReport, describe
from rolemesh.compiler.command.steps import (
    RankResult,
    Record,
    Step,
    StepResult,
    compare_step,
    drive,
    plan,
    reference,
    restore,
    worst,
)
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.cases import Case
from rolemesh.compiler.roles import role_named

__all__ = ["Progress", "check"]

Progress = Callable[[str], None]
"""Told what is being done."""

Run = Callable[..., object]
"""Takes the model's arguments and `poison`, and returns what the model returns."""


def _quiet(message: str) -> None:
    return


def check(
    options: CheckOptions, progress: Progress = _quiet, case: Case | None = None
) -> CheckReport:
    """Compare a role's programs with the single device.

    Args:
        options: What to check.
        progress: Called with what is being done.
        case: The case, if it is there already; only for ranks in lock-step.

    Raises:
        RolemeshError: For bad options and models; see docs/errors.md.
    """
    role = role_named(options.role)
    progress(f"loading {options.model}")
    case = options.load() if case is None else case
    with torch.no_grad():
        steps = plan(case, role, options.decode_steps)
        progress("running the single device")
        records = reference(case, steps)
        engine = _processes if options.real_ranks else _lockstep
        ranks = engine(case, steps, records, options, progress)
    return _report(options, steps, ranks)


def _lockstep(
    case: Case,
    steps: Sequence[Step],
    records: Sequence[Record],
    options: CheckOptions,
    progress: Progress,
) -> list[RankResult]:
    programs: dict[str, tuple[Sharded, Run]] = {}
    # oneDNN's low-precision matrix product may read past the end of a row, where NaN would show.
    poison = all(weight.dtype.itemsize >= 4 for weight in case.model.parameters())

    def call(step: Step, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if not step.phase:
            return case.model(*args, **kwargs)
        for fresh in (False, True):
            if fresh or step.phase not in programs:
                progress(f"compiling {step.name}")
                traced = trace(case.model, *args, **kwargs)
                sharded = shard(
                    traced,
                    options.mesh,
                    options.role,
                    phase=step.phase,
                    optimise=options.optimise,
                    dump=options.dump,
                )
                programs[step.phase] = sharded, _run_of(sharded, options)
            progress(f"running {step.name} on {options.mesh.size} ranks")
            try:
                return programs[step.phase][1](*args, poison=poison, **kwargs)
            except RolemeshError as error:
                # Some caches count in a plain integer, which makes each step a Program of its own.
                if fresh or error.code != "RM020":
                    raise
        raise AssertionError("the second try returns or raises")

    case = case.fresh()
    results = []
    made = drive(case, steps, call, records)
    for step, record, (arguments, result) in zip(steps, records, made, strict=True):
        found, _ = compare_step(case, step, arguments, result, record, options.allowed)
        results.append(found)
    compiled = {phase: describe(sharded.program) for phase, (sharded, _) in programs.items()}
    return [RankResult(tuple(results), compiled)]


def _run_of(sharded: Sharded, options: CheckOptions) -> Run:
    """Runs all ranks: the Program's own nodes for `eager`, the ranks' lowered graphs otherwise."""
    if options.target == "eager":
        return functools.partial(lockstep, sharded, check=True)
    return lower(sharded, options.target, options.parsed_options).lockstep()


def _processes(
    case: Case,
    steps: Sequence[Step],
    records: Sequence[Record],
    options: CheckOptions,
    progress: Progress,
) -> list[RankResult]:
    last = max(index for index, step in enumerate(steps) if step.phase)
    progress(f"compiling, and running on {options.mesh.size} processes")
    found = run_on_processes(case.fresh(), steps[: last + 1], records[: last + 1], options)
    state = found[0].state
    assert state is not None, "rank 0 sends the state"
    after = _continue(case.fresh(), steps, records, last, state, options.allowed)
    return [*found, RankResult(tuple(after), {})]


def _continue(
    case: Case,
    steps: Sequence[Step],
    records: Sequence[Record],
    last: int,
    state: Mapping[str, torch.Tensor],
    tolerance: float,
) -> list[StepResult]:
    """Run on one device what follows the ranks' last step, from the state they left.

    The steps before run too: some caches count in plain integers, which are no part of the state.
    """

    def call(step: Step, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        result = case.model(*args, **kwargs)
        if step is steps[last]:
            restore(case, (args, kwargs), state)
        return result

    results = []
    made = drive(case, steps, call, records)
    for index, (step, record) in enumerate(zip(steps, records, strict=True)):
        arguments, result = next(made)
        if index > last:
            results.append(compare_step(case, step, arguments, result, record, tolerance)[0])
    return results


def _report(
    options: CheckOptions, steps: Sequence[Step], ranks: Sequence[RankResult]
) -> CheckReport:
    problems = [problem for rank in ranks for problem in rank.problems]
    several = len(ranks) > 1
    by_phase: dict[str, list[str]] = {}
    for number, rank in enumerate(ranks):
        for result in rank.results:
            who = f" on rank {number}" if several and result.step.phase else ""
            by_phase.setdefault(result.step.phase, []).extend(result.problems(who))
    phases = []
    for phase, compiled in ranks[0].compiled.items():
        found = [r for rank in ranks for r in rank.results if r.step.phase == phase]
        outputs, state = worst(found)
        phases.append(
            PhaseReport(
                phase,
                compiled.nodes,
                sum(step.phase == phase for step in steps),
                outputs.max_abs,
                state.max_abs,
                compiled.collectives,
                tuple(by_phase.get(phase, ())),
            )
        )
    storage = {row.name: row for entry in ranks[0].compiled.values() for row in entry.storage}
    return CheckReport(
        options.model,
        options.role,
        dict(zip(options.mesh.names, options.mesh.sizes, strict=True)),
        options.target,
        f"{options.mesh.size} " + ("processes" if options.real_ranks else "ranks in lock-step"),
        tuple(phases),
        tuple(storage.values()),
        tuple(result.chosen for result in (*ranks[0].results, *ranks[-1].results * several)),
        (*problems, *by_phase.get("", ())),
    )
