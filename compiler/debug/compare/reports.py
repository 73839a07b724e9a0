"""What a comparison with the single device found: of one value, and of a whole stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from rolemesh.compiler.debug.compare.placed import Gap, Picks, gap, tensor_gap
from rolemesh.compiler.debug.compare.reference import Reference, results_of
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.program import Program, origin, tensor_types
from rolemesh.compiler.ir.serial import op_text

__all__ = ["Collector", "NodeReport", "StageReport", "error_text", "largest_gap", "rank_gap"]


@dataclass(frozen=True)
class NodeReport:
    """One value that was compared.

    Attributes:
        name: Its node.
        op: The op.
        module: Module path; empty if unknown.
        source: `file.py:line` of the model's code; empty if unknown.
        reason: Why a pass inserted the node; empty for nodes of the model.
        kind: Its type, with its layout if it has one.
        gap: How far it is from the single device's.
        error: What the op raised, if it did not run.
    """

    name: str
    op: str
    module: str
    source: str
    reason: str
    kind: str
    gap: Gap
    error: str = ""


@dataclass(frozen=True)
class StageReport:
    """A stage, compared.

    Attributes:
        stage: The pass, or `ge`.
        how: How it was run, for people.
        nodes: What was compared, in execution order.
        unmatched: Nodes that have no counterpart on the single device.
        error: What the pass raised, if there is no such stage because of that.
    """

    stage: str
    how: str
    nodes: tuple[NodeReport, ...] = ()
    unmatched: tuple[str, ...] = ()
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.error and self.first is None

    @property
    def divergent(self) -> tuple[NodeReport, ...]:
        """What differs, in execution order."""
        return tuple(node for node in self.nodes if not node.gap.equal)

    @property
    def first(self) -> NodeReport | None:
        """The first value that differs; None if all are equal."""
        return next((node for node in self.nodes if not node.gap.equal), None)

    @property
    def worst(self) -> NodeReport | None:
        """The value with the largest relative error; None if nothing was compared."""
        return max(self.nodes, key=lambda node: node.gap.max_rel, default=None)


class Collector:
    """Collects the comparisons of one stage.

    Args:
        program: The stage, of plain sizes.
        right: What the single device computes.
        tolerance: As in `rolemesh.compiler.command.compare.difference`.
        rank: The only rank whose part is compared; None for all, and the whole values.
    """

    def __init__(
        self, program: Program, right: Reference, tolerance: float, rank: int | None = None
    ) -> None:
        self._program = program
        self._right = right
        self._tolerance = tolerance
        self._rank = rank
        self._nodes: list[NodeReport] = []
        self._compared: dict[fx.Node, None] = {}
        self._unmatched: dict[fx.Node, None] = {}

    def add(self, node: fx.Node, value: object, wanted: list[torch.Tensor] | None) -> None:
        """Compare a value.

        Args:
            node: Its node.
            value: The value; of a node with a layout, each rank's.
            wanted: The results on the single device; None if there are none to compare with.
        """
        if wanted is None:
            self._unmatched[node] = None
            return
        layouts = self._program.layouts.get(node)
        if layouts:
            assert isinstance(value, Sequence)
            found = rank_gap(
                wanted,
                value,
                layouts,
                self._program,
                self._right.tensor,
                self._tolerance,
                self._rank,
            )
        else:
            pairs = zip(wanted, results_of(value), strict=True)
            found = largest_gap([tensor_gap(want, got, self._tolerance) for want, got in pairs])
        self._compared[node] = None
        self._nodes.append(_described(self._program, node, found))

    def outputs(self, value: Callable[[int], object]) -> None:
        """Compare the outputs that were not compared as values of nodes."""
        for index, node in enumerate(self._program.results):
            wanted = self._right.outputs[index]
            if isinstance(node, fx.Node) and node not in self._compared and wanted is not None:
                self.add(node, value(index), [wanted])

    def raised(self, node: fx.Node, error: Exception) -> None:
        """Note an op that did not run."""
        worst = Gap(math.inf, math.inf, False)
        self._nodes.append(_described(self._program, node, worst, error_text(error)))

    def made(self, stage: str, how: str) -> StageReport:
        """The finished report."""
        unmatched = [node.name for node in self._unmatched if node not in self._compared]
        return StageReport(stage, how, tuple(self._nodes), tuple(unmatched))


def rank_gap(
    wanted: Sequence[torch.Tensor],
    locals_: Sequence[object],
    layouts: Sequence[Layout],
    program: Program,
    picks: Picks,
    tolerance: float,
    rank: int | None = None,
) -> Gap:
    """How far the ranks' results of a node are from the single device's; see `placed.gap`."""
    by_rank = [results_of(local) for local in locals_]
    if {len(results) for results in by_rank} != {len(wanted)}:
        return Gap(math.inf, math.inf, False, tuple(range(len(by_rank))))
    mesh = program.the_mesh
    return largest_gap(
        [
            gap(want, list(results), layout, mesh, picks, tolerance, rank)
            for want, layout, results in zip(
                wanted, layouts, zip(*by_rank, strict=True), strict=True
            )
        ]
    )


def error_text(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def largest_gap(gaps: Sequence[Gap]) -> Gap:
    """Of an op's results, the one that is farthest off; one that is not equal goes first."""
    return max(gaps, key=lambda found: (not found.equal, found.max_rel), default=Gap())


def _described(program: Program, node: fx.Node, found: Gap, error: str = "") -> NodeReport:
    where, types = origin(node), tensor_types(node)
    layouts = program.layouts.get(node)
    if layouts and program.mesh is not None:
        mesh = program.mesh
        kinds = [layout.text(kind, mesh) for kind, layout in zip(types, layouts, strict=True)]
    else:
        kinds = [str(kind) for kind in types]
    kind = ", ".join(kinds)
    return NodeReport(
        node.name, op_text(node), where.module, where.source, where.reason, kind, found, error
    )
