"""The single device against every stage, value by value.

The captured Program runs on one device and all its values are kept. What a stage is compared by:

* canonicalise, compose, absorb: their ops run on one device too;
* seed: each input, cut for the ranks and put together again;
* propagate, push_back: each op alone, from right operands, on all ranks (`alone`);
* partition and after: all ranks in lock-step, with NaN wherever a rank must not read.

Both may give a value another name; later stages are matched with what they made, if that was
right. Outputs are always compared. What has unspecified contents is not: pads, rows of other ranks,
and memory that nobody has written to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from rolemesh.compiler.debug.compare.alone import apart
from rolemesh.compiler.debug.compare.placed import place
from rolemesh.compiler.debug.compare.reference import (
    Reference,
    Values,
    known_memory,
    run_single,
    value_name,
)
from rolemesh.compiler.debug.compare.reports import Collector, StageReport
from rolemesh.compiler.debug.compare.stages import CAPTURE, PhaseRun
from rolemesh.compiler.ir.program import Program, origin
from rolemesh.passes.absorb import Absorb
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.compose import Compose
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.seed import Seed
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs

__all__ = ["DECIDING", "REWRITING", "Compared", "compare_stages", "given"]

REWRITING = (Canonicalise.name, Compose.name, Absorb.name)
"""Stages that compute some values otherwise, of whole tensors."""

DECIDING = (Propagate.name, PushBack.name)
"""Stages whose Programs have decisions, and no ops that run on local tensors yet."""


@dataclass(frozen=True, eq=False)
class Compared:
    """A stage's comparison.

    Attributes:
        report: What was found.
        program: What ran: the stage of plain sizes; of a stage that decides, its ops apart.
        right: What it was compared with.
        after: What later stages are compared with.
    """

    report: StageReport
    program: Program
    right: Reference
    after: Reference


def compare_stages(
    run: PhaseRun,
    tolerance: float,
    stages: Collection[str] | None = None,
    rank: int | None = None,
) -> Iterator[Compared]:
    """Compare stages, one after the other.

    Args:
        run: The stages and inputs.
        tolerance: As in `rolemesh.compiler.command.compare.difference`.
        stages: The stages to give; None for all.
        rank: The only rank whose part is compared; None for all, and the whole values.
    """
    program = run.at(CAPTURE)
    right = Reference.of(program, run_single(program, run.inputs))
    last: Compared | None = None
    for stage in run.programs:
        if stage == CAPTURE:
            continue
        if stage in REWRITING:
            found = _single_stage(run, stage, right, tolerance)
            right = found.after
        elif stages is not None and stage not in stages:
            continue
        elif last is not None and _runs_alike(run, last.report.stage, stage):
            how = f"the same graph as {last.report.stage}"
            found = replace(last, report=replace(last.report, stage=stage, how=how))
        elif stage == Seed.name:
            found = _seed_stage(run, right, tolerance, rank)
        else:
            found = last = _rank_stage(run, stage, right, tolerance, rank)
        if stages is None or stage in stages:
            yield found


def _runs_alike(run: PhaseRun, first: str, second: str) -> bool:
    a, b = run.programs[first], run.programs[second]
    return a.graph is b.graph and a.layouts == b.layouts and not (a.decisions or b.decisions)


def _single_stage(run: PhaseRun, stage: str, right: Reference, tolerance: float) -> Compared:
    """The ops of a stage on one device."""
    program = run.at(stage)
    values: Values = {}
    raised: Exception | None = None
    try:
        run_single(program, run.inputs, values)
    except Exception as error:  # noqa: BLE001 - a fault that is reported
        raised = error
    collect = Collector(program, right, tolerance)
    same = _same(program, right)
    for node in program.ops:
        if node.name in values:
            collect.add(node, values[node.name], right.find(node) if node in same else None)
    if raised is not None:
        collect.raised(next(node for node in program.ops if node.name not in values), raised)
    else:
        results = program.results
        collect.outputs(lambda index: values[str(results[index])])
    report = collect.made(stage, "its ops on one device")
    return Compared(report, program, right, _renamed(right, program, values))


def _same(program: Program, right: Reference) -> frozenset[fx.Node]:
    """Nodes of the rewritten graph that are named as an earlier node from the same place.

    A new node may be given a name that an earlier one happened to have.
    """
    captured = {node.name: origin(node) for node in right.program.graph.nodes}
    return frozenset(
        node
        for node in program.graph.nodes
        if captured.get(node.name) == origin(node) and right.find(node) is not None
    )


def _renamed(right: Reference, program: Program, values: Values) -> Reference:
    """The right values by the names of the rewritten graph, with those that only it has."""
    same = {node.name for node in _same(program, right)}
    known = {name: value for name, value in right.values.items() if name in same}
    return Reference(program, {**values, **known}, right.outputs)


def _seed_stage(run: PhaseRun, right: Reference, tolerance: float, rank: int | None) -> Compared:
    """Each input, cut for the ranks and put together again."""
    program = run.at(Seed.name)
    collect = Collector(program, right, tolerance, rank)
    for node, tensor in zip(program.placeholders, run.inputs, strict=True):
        try:
            layout, mesh = program.layout(node), program.the_mesh
            locals_ = place(tensor, layout, mesh, right.tensor, poison=run.poison)
        except Exception as error:  # noqa: BLE001 - a fault that is reported
            collect.raised(node, error)
        else:
            collect.add(node, locals_, right.find(node))
    return Compared(collect.made(Seed.name, "each input cut for the ranks"), program, right, right)


def _rank_stage(
    run: PhaseRun, stage: str, right: Reference, tolerance: float, rank: int | None
) -> Compared:
    """All ranks in lock-step; of a stage that decides, each op alone."""
    alone = stage in DECIDING
    program = run.programs[stage]
    values = program.values(run.inputs)
    program = (apart(program) if alone else program).at(values)
    collect = Collector(program, right, tolerance, rank)
    seen: set[fx.Node] = set()

    def observe(node: fx.Node, locals_: Sequence[object]) -> None:
        seen.add(node)
        if not (alone and node.op == "placeholder"):
            collect.add(node, locals_, right.find(node))

    try:
        if alone:
            locals_ = given(program, right, poison=run.poison)
        else:
            locals_ = scatter_inputs(program, run.inputs, poison=run.poison)
        with known_memory():
            outputs = run_lockstep(program, locals_, poison=run.poison, observe=observe)
    except Exception as error:  # noqa: BLE001 - a fault that is reported
        collect.raised(next(node for node in program.graph.nodes if node not in seen), error)
    else:
        collect.outputs(lambda index: outputs[index])
    how = "each op alone on all ranks" if alone else "all ranks in lock-step"
    return Compared(collect.made(stage, how), program, right, right)


def given(program: Program, right: Reference, *, poison: bool) -> list[list[torch.Tensor]]:
    """Each rank's local tensor of inputs that stand for values."""
    mesh, picks = program.the_mesh, right.tensor
    return [
        place(picks(value_name(node)), program.layout(node), mesh, picks, poison=poison)
        for node in program.placeholders
    ]
