"""Every stage of a model against the single device: what `rolemesh compare` runs."""

from __future__ import annotations

from collections.abc import Callable, Collection

from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.compare.compare import REWRITING, compare_stages
from rolemesh.compiler.debug.compare.compare_ge import GE, compare_ge
from rolemesh.compiler.debug.compare.reports import StageReport, error_text
from rolemesh.compiler.debug.compare.stages import CAPTURE, PhaseRun, phase_runs
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.targets import target

__all__ = ["compare_model"]


def compare_model(
    options: CheckOptions,
    progress: Callable[[str], None],
    phase: str | None = None,
    stage: str | None = None,
    rank: int | None = None,
) -> dict[str, list[StageReport]]:
    """Compare the stages of a model.

    Args:
        options: The model, the role, the mesh, sizes, the target and the tolerance.
        progress: Called with what is being done.
        phase: The only phase to compare; None for all.
        stage: The only stage to compare, a pass or `ge`; None for all.
        rank: The only rank whose part is compared; None for all, and the whole values.

    Returns:
        The stages of each phase. A pass that raises is the last one, with its error.

    Raises:
        RolemeshError: RM003 for a target that cannot be compared, RM004 or RM018 if there is no
            such phase, stage or rank, and what loading, capturing and lowering raise.
    """
    _check_rank(options, rank)
    if options.target not in ("eager", GE):
        raise RolemeshError(
            "RM003",
            what=f"target {options.target!r} cannot be compared",
            where="rolemesh compare --target",
            why="its graphs run in processes of their own, and their values are not seen",
            fix=f"compare the stages, or target {GE!r}; rolemesh check runs every target",
        )
    found = {}
    for run in phase_runs(options, progress, phase):
        progress(f"comparing {run.phase}")
        _check_stage(run, stage, options)
        found[run.phase] = _phase(run, options, progress, None if stage is None else {stage}, rank)
    return found


def _phase(
    run: PhaseRun,
    options: CheckOptions,
    progress: Callable[[str], None],
    wanted: Collection[str] | None,
    rank: int | None,
) -> list[StageReport]:
    found = []
    stages = None if wanted is None else {*wanted, *REWRITING}
    for compared in compare_stages(run, options.allowed, stages, rank):
        if wanted is None or compared.report.stage in wanted:
            found.append(compared.report)
    if run.failure is not None:
        name = run.failure.step.name
        if wanted is None or name in wanted or GE in wanted:
            found.append(StageReport(name, "the pass raised", error=error_text(run.failure.error)))
    elif options.target == GE and (wanted is None or GE in wanted):
        progress(f"lowering {run.phase} for {options.mesh.size} ranks")
        chosen = target(GE).parse(options.parsed_options)
        assert isinstance(chosen, GeOptions)
        found.append(compare_ge(run, compared.after, chosen, options.allowed, rank))
    return found


def _check_rank(options: CheckOptions, rank: int | None) -> None:
    if rank is not None and not 0 <= rank < options.mesh.size:
        raise RolemeshError(
            "RM018",
            what=f"there is no rank {rank}",
            where="rolemesh compare --rank",
            why=f"the mesh has the ranks 0 to {options.mesh.size - 1}",
            fix="name one of them",
        )


def _check_stage(run: PhaseRun, stage: str | None, options: CheckOptions) -> None:
    known = [name for name in run.programs if name != CAPTURE]
    if run.failure is not None:
        known.append(run.failure.step.name)
    if options.target == GE:
        known.append(GE)
    if stage is not None and stage not in known:
        raise RolemeshError(
            "RM018",
            what=f"there is no stage {stage!r} to compare",
            where="rolemesh compare --stage",
            why=f"there are {', '.join(known)}",
            fix=f"name one of them; {GE} needs --target {GE}",
        )
