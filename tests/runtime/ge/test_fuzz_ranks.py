"""Random Programs with random layouts, lowered to a GE graph for each rank, give what the whole
graph gives. The cases are those of `tests/passes/test_fuzz.py`."""

from __future__ import annotations

import pytest
import torch
from tests.passes.random.case import Call, Case, Leaf
from tests.passes.random.check import Locals, Sharded, check
from tests.passes.random.families import draw_case
from tests.passes.random.shrink import shrink_alike

from rolemesh.compiler.ir.placement import Owner
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.targets import target
from rolemesh.runtime.ge.ranks import GeRanks

CASES, BLOCK = 12, 6


def on_ge(sharded: Sharded, inputs: Locals) -> list[list[torch.Tensor | None]]:
    return GeRanks(sharded.plain, target("ge"), GeOptions())(inputs)


def problem(case: Case) -> str:
    return check(case, on_ge, tolerance=1e-6)  # attributes of GE ops, such as an epsilon, are fp32


def applies(case: Case) -> bool:
    """Whether ranks that are processes could run a case.

    torch traces `_grouped_mm` in bf16 only, and one who owns no part of a tensor has none to cut
    along another axis.
    """
    leaves = [step for step in case.steps if isinstance(step, Leaf)]
    calls = [step for step in case.steps if isinstance(step, Call)]
    owners = [leaf for leaf in leaves if any(isinstance(p, Owner) for p in leaf.layout.placements)]
    grouped = any(call.target is torch.ops.aten._grouped_mm.default for call in calls)
    return not grouped and not (owners and len(case.mesh.names) > 1)


@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_ranks_on_ge_agree_with_the_whole_graph(first: int) -> None:
    for seed in range(first, first + BLOCK):
        case = draw_case(seed)
        if applies(case) and problem(case):
            small = shrink_alike(case, problem)
            pytest.fail(f"seed {seed}: {problem(small)}", pytrace=False)


def test_most_cases_apply() -> None:
    assert sum(applies(draw_case(seed)) for seed in range(CASES)) > CASES // 2
