"""What a rank holds, from a run directory: the numbers of the live Program."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("transformers")

from tests.compiler.debug.small_stages import node, stage
from tests.compiler.recorded import record

from rolemesh.compiler.debug.memory import memory_of
from rolemesh.compiler.dump.reader import open_run
from rolemesh.compiler.memory import MemoryAnalysis

pytestmark = pytest.mark.xdist_group("recorded")

RUNS = [
    ("hf:deepseek_v32", "pd_mixed", "tp=4"),
    ("hf:deepseek_v32", "prefill", "tp=4"),  # owners, a pool
    ("hf:deepseek_v32", "decode", "tp=4"),
    ("hf:llama", "pd_mixed", "dp=2,tp=3"),  # uneven, two axes
]


@pytest.mark.parametrize("case", RUNS, ids=[f"{m[3:]}-{r}" for m, r, _ in RUNS])
def test_the_figures_are_those_of_the_program(case: tuple[str, str, str]) -> None:
    folder, sharded = record(*case)
    for phase, found in sharded.items():
        program = open_run(folder).program(phase)
        figures, expected = memory_of(program.stage()), found.memory_analysis()
        assert figures is not None
        assert dataclasses.asdict(figures) == dataclasses.asdict(expected)
        assert figures.total == expected.total > 0
        assert memory_of(program.stage("push_back")) is None
    if case[1] == "prefill":
        assert figures.pool


def test_a_value_dies_after_its_last_use_and_a_result_never() -> None:
    nodes = [
        node("x", "input", shape=[10]),
        node("kept", "aten.neg.default", ["x"], [3]),
        node("a", "aten.neg.default", ["x"], [5], "bfloat16"),
        node("b", "aten.neg.default", ["a"], [7]),
        node("c", "aten.neg.default", ["b"], [1]),
        node("unused", "aten.neg.default", ["c"], [2], "int64"),
    ]
    nodes[0]["layouts"] = [["replicated"]]
    inputs = [{"node": "x", "name": "x", "kind": "user"}]
    made = stage(nodes, {"tp": 2}, inputs=inputs, outputs=[{"value": {"node": "kept"}}])
    peak = 3 * 4 + 5 * 2 + 7 * 4  # kept, a, b; then a dies before c and unused come
    assert memory_of(made) == MemoryAnalysis(0, 0, 0, peak)
