"""The first pass after which a model computes something else, and the fewest ops that show it.

Stages are compared in the order of the passes; the first that differs, or the first pass that
raises, is the one. What differs first in it is where the search for a small part starts: that node
alone, with right operands; if it is right then, what leads to it, and what runs before it, until
the part fails; and then without every op that the failure does not need (`shrink`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.bisect.replay import Replay, replay_of
from rolemesh.compiler.debug.bisect.repro import Repro, measure
from rolemesh.compiler.debug.bisect.shrink import shrink
from rolemesh.compiler.debug.bisect.subgraph import Parts, cone
from rolemesh.compiler.debug.compare.compare import Compared, compare_stages
from rolemesh.compiler.debug.compare.placed import pick_names
from rolemesh.compiler.debug.compare.reference import value_name
from rolemesh.compiler.debug.compare.reports import NodeReport, error_text
from rolemesh.compiler.debug.compare.stages import PhaseRun, phase_runs
from rolemesh.compiler.ir.program import Program

__all__ = ["Fault", "bisect", "first_fault"]


@dataclass(frozen=True, eq=False)
class Fault:
    """What was found.

    Attributes:
        phase: The phase.
        stage: The pass.
        node: The first value that differs; None if the pass raised.
        error: What the pass raised, or the op.
        repro: The fault by itself.
    """

    phase: str
    stage: str
    node: NodeReport | None
    error: str
    repro: Repro | Replay

    @property
    def title(self) -> str:
        """The fault in one line."""
        if self.node is None:
            return f"pass {self.stage} raises {self.error}"
        if self.error:
            return f"after pass {self.stage} %{self.node.name} raises {self.error}"
        return f"pass {self.stage} gives %{self.node.name} another value than the single device"

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the ops that show it."""
        program = self.repro.after if isinstance(self.repro, Repro) else self.repro.program
        return tuple(node.name for node in program.ops)


def bisect(
    options: CheckOptions, progress: Callable[[str], None], phase: str | None = None
) -> Fault | None:
    """Find the first pass of a model that differs from the single device.

    Args:
        options: The model, the role, the mesh, sizes and the tolerance.
        progress: Called with what is being done.
        phase: The only phase to look at; None for all.

    Returns:
        The fault; None if all stages of all phases are right.

    Raises:
        RolemeshError: For what cannot be loaded, captured, or is refused by the pipeline.
    """
    for run in phase_runs(options, progress, phase):
        found = first_fault(run, options.allowed, progress)
        if found is not None:
            return found
    return None


def first_fault(run: PhaseRun, tolerance: float, progress: Callable[[str], None]) -> Fault | None:
    """The first pass of a phase that differs from the single device.

    Args:
        run: The stages and inputs.
        tolerance: As in `rolemesh.compiler.command.compare.difference`.
        progress: Called with what is being done.
    """
    progress(f"comparing the stages of {run.phase}")
    for compared in compare_stages(run, tolerance):
        report = compared.report
        if report.first is not None:
            progress(f"looking for the smallest part of {report.stage} that fails")
            repro = _Search(run, compared, report.first, tolerance).found()
            return Fault(run.phase, report.stage, report.first, report.first.error, repro)
    if run.failure is None:
        return None
    name = run.failure.step.name
    progress(f"looking for the smallest part that {name} fails on")
    return Fault(run.phase, name, None, error_text(run.failure.error), replay_of(run))


class _Search:
    """The search for the fewest ops of a stage that give something wrong from right values."""

    def __init__(
        self, run: PhaseRun, compared: Compared, first: NodeReport, tolerance: float
    ) -> None:
        self.run = run
        self.compared = compared
        self.first = first
        self.tolerance = tolerance
        right = compared.right
        compared_names = {node.name for node in compared.report.nodes}
        self.parts = Parts(compared.program, lambda node: node.name in compared_names)
        self.node = self.parts.nodes[first.name]
        self.wanted = right.find(self.node) or self._output()

    def found(self) -> Repro:
        """The fault by itself."""
        keep: Sequence[str] = ()
        for keep in self._wider():
            if self._fails(keep):
                keep = shrink(keep, self._fails)
                break
        return self._repro(self._part(keep))

    def _output(self) -> list[torch.Tensor]:
        """What a node must be that has no counterpart but is an output."""
        index = self.compared.program.results.index(self.node)
        wanted = self.compared.right.outputs[index]
        assert wanted is not None
        return [wanted]

    def _wider(self) -> Iterator[list[str]]:
        """Ops besides the node itself: none, those that lead to it, those that run before it."""
        ops = [node.name for node in self.compared.program.ops]
        before = ops[: ops.index(self.node.name)] if self.node.name in ops else []
        yield []
        ring, reached = [self.node], {self.node}
        while len(reached) <= len(before) and ring:
            ring = [x for node in ring for x in node.all_input_nodes if x not in reached]
            reached.update(ring)
            yield [name for name in before if self.parts.nodes[name] in reached]
        count = 2
        while count < len(before):
            yield before[-count:]
            count *= 2
        yield before

    def _part(self, keep: Sequence[str]) -> Program:
        ops = [self.node.name] if self.node.op == "call_function" else []
        return self.parts.part([*keep, *ops], [self.node.name])

    def _fails(self, keep: Sequence[str]) -> bool:
        part = self._part(keep)
        named = self.compared.right.tensor
        try:
            gap = measure(part, named, self.wanted, self.tolerance, self.run.poison)
        except Exception as error:  # noqa: BLE001 - as the stage itself did, or by being cut
            return error_text(error) == self.first.error
        return not self.first.error and not gap.equal

    def _repro(self, after: Program) -> Repro:
        right = self.compared.right
        names = {value_name(node) for node in after.placeholders}
        target = value_name(self.node)
        before = self._single(target, names)
        names |= {value_name(node) for node in before.placeholders}
        for layouts in after.layouts.values():
            names |= {name for layout in layouts for name in pick_names(layout)}
        inputs = {name: right.tensor(name) for name in sorted(names)}
        return Repro(
            self.compared.report.stage,
            self.node.name,
            before,
            after,
            inputs,
            self.tolerance,
            self.run.poison,
        )

    def _single(self, target: str, stops: set[str]) -> Program:
        """The ops on one device that give the target from the same values."""
        program = self.compared.right.program
        if all(node.name != target for node in program.graph.nodes):
            index = self.compared.program.results.index(self.node)
            target = str(program.results[index])
        return Parts(program, lambda _: True).part(cone(program, target, stops), [target])
