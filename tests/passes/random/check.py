"""Whether a case computes what the whole graph does: through the passes, then on all ranks.

The passes run once, with symbolic sizes; all ranks then run at each of the case's values. Values
that the Program does not fit are left out and counted, as are values at which capture would have
given another graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from tests.layouts import pad_masks
from tests.passes.random.case import Case, UnfitValuesError, Values, program_of, run_whole
from torch import fx

from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.pipeline import optimising
from rolemesh.lowering import chunks
from rolemesh.passes.cost import CostTable
from rolemesh.passes.partition import Partition
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.rules import default_rules
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.schedule import Schedule
from rolemesh.passes.verify import Verify
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs

__all__ = ["Run", "Sharded", "Tally", "check", "in_lockstep", "kind_of"]

Locals = Sequence[Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Sharded:
    """What all ranks are to run.

    Attributes:
        program: The partitioned Program.
        values: Values of its symbols.
        plain: The Program at these values.
    """

    program: Program
    values: Values
    plain: Program


Run = Callable[[Sharded, Locals], Sequence[Sequence[torch.Tensor | None]]]
"""Runs all ranks of a program on their local inputs."""


@dataclass
class Tally:
    """What became of the values that cases were to run at.

    Attributes:
        ran: How many values ran.
        refused: Assumptions that values did not meet, and how often.
        unfit: Values at which the graph is another one.
        assumptions: Everything that was assumed, met or not.
    """

    ran: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unfit: int = 0
    assumptions: Counter[str] = field(default_factory=Counter)


def in_lockstep(sharded: Sharded, inputs: Locals) -> Sequence[Sequence[torch.Tensor | None]]:
    """Run the program's own nodes."""
    return run_lockstep(sharded.plain, inputs, poison=True, check=True)


def check(
    case: Case,
    run: Run = in_lockstep,
    *,
    tolerance: float = 1e-8,
    rules: Rules | None = None,
    tally: Tally | None = None,
) -> str:
    """Take a case through the passes and all ranks; empty if right, else what is wrong.

    Args:
        case: The case.
        run: Runs all ranks.
        tolerance: Of values that are not fp32, absolute and relative.
        rules: Sharding rules.
        tally: Counts the values that ran and those that did not.
    """
    tally = tally or Tally()
    program = captured = program_of(case)
    rules = rules or default_rules()
    try:
        for step in (Propagate(rules=rules), PushBack(), Partition(rules=rules)):
            program = step.apply(program)
        for step in (*optimising(CostTable(), composite=False), Schedule()):
            program = step.apply(Verify().apply(program))
        program = Verify().apply(program)
    except Exception as error:  # noqa: BLE001 - any error is what is looked for
        return f"{type(error).__name__}: {error}\n{program}"
    if program.scope is not None:
        tally.assumptions.update(map(str, program.scope.assumptions))
    if not program.fits(program.hints):
        return f"Unmet assumptions at the hints: {program.scope and program.scope.assumptions}"
    for values in case.runs:
        if not program.fits(values):
            assert program.scope is not None
            unmet = [a for a in program.scope.assumptions if a.subs(values) != sympy.true]
            tally.refused.update(map(str, unmet))
            continue
        try:
            tensors, expected = run_whole(case, captured, values)
        except UnfitValuesError:
            tally.unfit += 1
            continue
        tally.ran += 1
        wrong = _run(program, values, tensors, expected, run, tolerance)
        if wrong:
            at = ", ".join(f"{symbol}={value}" for symbol, value in values.items())
            return f"{wrong}\nat {at or 'plain sizes'}\n{program}"
    return ""


def kind_of(message: str) -> str:
    """What sort of failure a message tells of."""
    return message.partition(" ")[0]


def _run(
    program: Program,
    values: Values,
    tensors: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    run: Run,
    tolerance: float,
) -> str:
    try:
        if program.values(tensors) != dict(values):
            return f"Values {program.values(tensors)} are read from the inputs"
        plain = program.at(values)
        locals_ = run(Sharded(program, values, plain), scatter_inputs(plain, tensors, poison=True))
    except Exception as error:  # noqa: BLE001 - any error is what is looked for
        return f"{type(error).__name__}: {error}"
    for index, (want, found) in enumerate(zip(expected, locals_, strict=True)):
        wrong = _difference(plain, index, want, found, tolerance)
        if wrong:
            return f"output {index}: {wrong}"
    return ""


def _difference(
    program: Program,
    index: int,
    expected: torch.Tensor,
    found: Sequence[torch.Tensor | None],
    exact: float,
) -> str:
    value = program.results[index]
    assert isinstance(value, fx.Node)
    layout, mesh = program.layout(value), program.the_mesh
    wants = chunks.scatter(expected, layout, mesh)
    masks = pad_masks(expected.shape, layout, mesh)
    for rank, (want, mask, have) in enumerate(zip(wants, masks, found, strict=True)):
        assert have is not None
        if not chunks.holds(program.output_layout(index), mesh, rank):
            continue  # another rank has the new value
        tolerance = 1e-4 if want.dtype == torch.float32 else exact
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"rank {rank} has {have.dtype} {list(have.shape)}, not {list(want.shape)}"
        a, b = have[mask], want[mask]
        if not torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance):
            return f"rank {rank} has\n{have}\nnot\n{want}"
    return ""
