"""Ranks that issue other collectives, or the same in another order, are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.compiler.debug.diff.renamed import edited
from tests.compiler.recorded import recorded_run

from rolemesh.compiler.debug.ledger.order import divergences, ranks_in
from rolemesh.compiler.dump.reader import Run, Stage, open_stage

pytestmark = pytest.mark.xdist_group("recorded")

Nodes = list[dict[str, Any]]


def last() -> Stage:
    return recorded_run("hf:llama", "pd_mixed").program("decode").stage()


def run_of(stage: Stage) -> Run:
    return open_stage(json.dumps(stage.data), "a rank")


def ranks(edit: Callable[[Nodes], None]) -> dict[int, Run]:
    """Four ranks, the third of which has another program."""
    runs = dict.fromkeys(range(4), run_of(last()))
    runs[2] = run_of(edited(last(), edit))
    return runs


def moving(nodes: Nodes) -> Nodes:
    return [node for node in nodes if "collective" in node]


def test_ranks_that_agree() -> None:
    assert divergences(ranks(lambda nodes: None)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"op": "all_reduce"}, {"axes": ["dp"]}, {"dim": 3}, {"shape": [3, 1, 72]},
        {"dtype": "bfloat16"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_collective(change: dict[str, object]) -> None:
    def edit(nodes: Nodes) -> None:
        moving(nodes)[3]["collective"] |= change

    before = moving(last().data["nodes"])[3]["collective"]
    assert all(before[key] != value for key, value in change.items())
    (found,) = divergences(ranks(edit))
    assert (found.program, found.position) == ("pd_mixed.decode", 3)
    assert [*found.by_rank] == [0, 1, 2, 3]
    if "dtype" not in change:
        assert found.by_rank[0] == found.by_rank[1] == found.by_rank[3] != found.by_rank[2]


def test_another_reduction() -> None:
    def edit(nodes: Nodes) -> None:
        next(n for n in moving(nodes) if "op" in n["kwargs"])["kwargs"]["op"] = "max"

    (found,) = divergences(ranks(edit))
    assert " max of " in found.by_rank[2]
    assert " sum of " in found.by_rank[0]


def test_another_order() -> None:
    def edit(nodes: Nodes) -> None:
        first, second = moving(nodes)[1:3]
        places = [nodes.index(node) for node in (first, second)]
        for place, node in zip(places, (second, first), strict=True):
            nodes[place] = node

    (found,) = divergences(ranks(edit))
    assert found.position == 1
    names = [node["name"] for node in moving(last().data["nodes"])[1:3]]
    assert f"%{names[0]}," in found.by_rank[0]
    assert f"%{names[1]}," in found.by_rank[2]
    lines = found.text.splitlines()
    assert lines[0] == "pd_mixed.decode, collective 1: the ranks differ"
    assert [line[:9] for line in lines[1:]] == [f"  rank {rank}:" for rank in range(4)]


def test_a_rank_that_stops_early() -> None:
    def edit(nodes: Nodes) -> None:
        del moving(nodes)[-1]["collective"]

    (found,) = divergences(ranks(edit))
    assert found.position == len(moving(last().data["nodes"])) - 1
    assert found.by_rank[2] == "no more collectives"


def test_a_rank_without_the_program() -> None:
    runs = ranks(lambda nodes: None)
    del runs[3]
    (found,) = divergences(runs)
    assert found.position is None
    assert found.by_rank == {**dict.fromkeys(range(3), "has the program"), 3: "has it not"}


def test_a_folder_of_one_process_has_no_ranks(tmp_path: Path) -> None:
    assert ranks_in(str(recorded_run("hf:llama", "pd_mixed").folder)) == {}
    assert ranks_in("-") == {}
