"""Random Programs with random layouts give what the whole graph gives, on every rank.

Most have symbolic sizes on two axes: passes run once, all ranks at values that are not the hints.
A failure prints a small Program that fails alike, and the file to replay it from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.passes.fuzz import report
from tests.passes.random.bound import on_bound_graphs
from tests.passes.random.case import Call, Case, Leaf, listing
from tests.passes.random.check import Tally, check
from tests.passes.random.families import draw_case, draw_symbolic_case

from rolemesh.compiler.ir.dims import Dim

SYMBOLIC, PLAIN, BLOCK = 400, 200, 200


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", range(0, SYMBOLIC, BLOCK))
def test_ranks_agree_with_the_whole_graph_at_any_size(first: int, tmp_path: Path) -> None:
    tally = Tally()
    for seed in range(first, first + BLOCK):
        case = draw_symbolic_case(seed, runs=1 + (seed % 4 == 0))
        if check(case, tally=tally):
            pytest.fail(f"seed {seed}: {report(case, 'case', tmp_path)}", pytrace=False)
    # Else too few would have run to say that none is wrong.
    assert tally.ran > 1.15 * BLOCK
    assert sum(tally.refused.values()) + tally.unfit < 0.05 * BLOCK


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", range(0, PLAIN, BLOCK))
def test_ranks_agree_with_the_whole_graph(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + BLOCK):
        case = draw_case(seed)
        if check(case):
            pytest.fail(f"seed {seed}: {report(case, 'case', tmp_path)}", pytrace=False)


@pytest.mark.filterwarnings("error")
def test_bound_graphs_agree_with_the_whole_graph() -> None:
    for seed in range(60):
        wrong = check(draw_symbolic_case(seed, runs=1), on_bound_graphs)
        assert not wrong, f"seed {seed}"


@pytest.mark.parametrize("draw", [draw_case, draw_symbolic_case])
def test_cases_are_drawn_alike_every_time(draw: Callable[[int], Case]) -> None:
    for seed in range(20):
        assert listing(draw(seed)) == listing(draw(seed))


def _calls(cases: list[Case]) -> list[Call]:
    return [step for case in cases for step in case.steps if isinstance(step, Call)]


def _leaves(cases: list[Case]) -> list[Leaf]:
    return [step for case in cases for step in case.steps if isinstance(step, Leaf)]


@pytest.mark.parametrize("draw", [draw_case, draw_symbolic_case])
def test_cases_reach_what_they_are_for(draw: Callable[[int], Case]) -> None:
    """Enough ops, outputs, mutated inputs and uneven layouts are among the cases."""
    cases = [draw(seed) for seed in range(200)]
    calls, leaves = _calls(cases), _leaves(cases)
    assert len({step.target for step in calls}) > 80
    assert len(calls) > 3.5 * len(cases)
    assert sum(any(r.mutates is not None for r in case.results) for case in cases) > 30
    assert sum(any(r.pinned is not None for r in case.results) for case in cases) > 60
    assert sum(not step.layout.is_replicated for step in leaves) > len(leaves) // 3


def test_plain_cases_are_on_one_to_three_axes() -> None:
    assert {len(draw_case(seed).mesh.names) for seed in range(40)} == {1, 2, 3}


def _symbolic(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_symbolic, value))
    return isinstance(value, Dim)


def test_sizes_of_symbolic_cases_are_symbols() -> None:
    """In inputs, op arguments and layouts; symbols, products and sums; some read from integers."""
    cases = [draw_symbolic_case(seed) for seed in range(200)]
    assert {len(case.mesh.names) for case in cases} == {2}
    assert {len(case.scope.hints) for case in cases if case.scope is not None} == {1, 2, 3}
    assert all(dict(run) != case.scope.hints for case in cases if case.scope for run in case.runs)
    symbolic = [call for call in _calls(cases) if _symbolic([list(v.shape) for v in call.types])]
    assert len(symbolic) > len(_calls(cases)) // 2
    assert len([call for call in symbolic if _symbolic(call.args)]) > 80
    layouts = [leaf.layout.placements for leaf in _leaves(cases)]
    assert len([p for p in layouts if _symbolic(p)]) > 100
    assert len([p for p in layouts if _symbolic(p) and p[0] == p[1]]) > 10  # two axes jointly
    sizes = {str(n) for call in symbolic for v in call.types for n in v.shape if _symbolic(n)}
    assert {"T", "B*T", "2*T", "T + 1", "T - 1", "T + 2", "T**2"} <= sizes
    assert any("//" in size for size in sizes)
