"""Nodes are matched by where they come from: other names, other order, more and fewer ops."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.compiler.debug.diff.renamed import edited, renamed
from tests.compiler.recorded import recorded_run

from rolemesh.compiler.debug.diff.matching import Matching, match
from rolemesh.compiler.dump.reader import Stage

pytestmark = pytest.mark.xdist_group("recorded")


def stage_of(phase: str, role: str = "pd_mixed", stage: str = "last") -> Stage:
    return recorded_run("hf:deepseek_v32", role).program(phase).stage(stage)


def shuffled(stage: Stage) -> dict[str, str]:
    """Names that say nothing."""
    numbers = [*range(len(stage.nodes))]
    random.Random(5).shuffle(numbers)
    return {name: f"v{number}" for name, number in zip(stage.nodes, numbers, strict=True)}


def renumbered(stage: Stage) -> dict[str, str]:
    """Names as one op more of each kind would leave them, so that most name another node."""
    by_stem = defaultdict(list)
    for name in stage.nodes:
        by_stem[re.sub(r"_\d+$", "", name)].append(name)
    return {
        name: f"{stem}_{number + 1}"
        for stem, names in by_stem.items()
        for number, name in enumerate(names)
    }


def at_any_size(left: Stage, right: Stage) -> Matching:
    return match(left, right, one_program=False, same_sizes=True)


@pytest.mark.parametrize("names", [shuffled, renumbered])
@pytest.mark.parametrize("stage", ["capture", "propagate", "partition", "verify"])
def test_names_do_not_matter(names: Any, stage: str) -> None:
    for role, phase in (("pd_mixed", "prefill"), ("prefill", "prefill"), ("decode", "decode")):
        found = stage_of(phase, role, stage)
        mapping = names(found)
        assert len(set(mapping.values())) == len(found.nodes)
        matching = at_any_size(found, renamed(found, mapping))
        assert matching.pairs == mapping
        assert not matching.moved


@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_one_op_less_leaves_the_others_their_partners(at: float) -> None:
    stage = stage_of("prefill", stage="capture")
    ops = [node for node in stage.nodes.values() if node.op != "input"]
    gone = ops[int(at * len(ops))]

    def remove(nodes: list[dict[str, Any]]) -> None:
        nodes[:] = [node for node in nodes if node["name"] != gone.name]

    less = edited(stage, remove)
    mapping = shuffled(stage)
    reads = mapping[stage.nodes[gone.name].operands[0]]  # so does what read the node that is gone
    matching = at_any_size(stage, renamed(less, {**mapping, gone.name: reads}))
    wrong = {k: v for k, v in matching.pairs.items() if mapping[k] != v}
    # Of equal ops on one line any may be the one that is gone.
    assert {stage.nodes[name].op for name in wrong} <= {gone.op}
    assert {stage.nodes[name].module for name in wrong} <= {gone.module}
    assert len(matching.pairs) == len(stage.nodes) - 1


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_lines_that_moved_in_their_file_are_found(share: float) -> None:
    stage = stage_of("decode")
    lines = sorted({int(n.source.rpartition(":")[2]) for n in stage.nodes.values() if n.source})
    first = lines[int(share * len(lines))]

    def add_line(nodes: list[dict[str, Any]]) -> None:
        for node in nodes:
            file, _, line = node.get("source", "").rpartition(":")
            if file and int(line) >= first:
                node["source"] = f"{file}:{int(line) + 1}"

    mapping = shuffled(stage)
    matching = at_any_size(stage, renamed(edited(stage, add_line), mapping))
    model = {n: p for n, p in matching.pairs.items() if not stage.nodes[n].op.startswith("mesh.")}
    assert all(mapping[name] == partner for name, partner in model.items())
    assert len(matching.pairs) == len(stage.nodes)


def test_moving_one_op_moves_one_op() -> None:
    stage = stage_of("prefill")
    later = [*stage.nodes].index("all_gather") + 1

    def move(nodes: list[dict[str, Any]]) -> None:
        # An op that only reads inputs may stand anywhere after them.
        inputs = {node["name"] for node in nodes if node["op"] == "input"}
        free = [
            node
            for node in nodes[later + 100 :]
            if node["op"] == "aten.t.default" and node["args"][0]["node"] in inputs
        ]
        nodes.remove(free[0])
        nodes.insert(later, free[0])
        moved.append(free[0]["name"])

    moved: list[str] = []
    mapping = shuffled(stage)
    matching = at_any_size(stage, renamed(edited(stage, move), mapping))
    assert matching.moved == set(moved)
    assert matching.pairs == mapping


def test_prefill_and_decode_of_a_role_match_but_for_what_one_of_them_has() -> None:
    left, right = stage_of("prefill"), stage_of("decode")
    matching = match(left, right, one_program=False, same_sizes=False)
    assert len(matching.pairs) > 0.95 * min(len(left.nodes), len(right.nodes))
    for name, partner in matching.pairs.items():
        one, other = left.nodes[name], right.nodes[partner]
        assert one.module == other.module
        assert one.source == other.source
        assert (one.op == "input") == (other.op == "input")
    inputs = {entry["node"]: entry["name"] for entry in left.head["inputs"]}
    others = {entry["node"]: entry["name"] for entry in right.head["inputs"]}
    assert all(others[matching.pairs[node]] == name for node, name in inputs.items())


def test_stages_of_one_program_match_by_name() -> None:
    left, right = (stage_of("decode", stage=name) for name in ("push_back", "partition"))
    matching = match(left, right, one_program=True, same_sizes=True)
    assert matching.pairs == {name: name for name in left.nodes}
    assert not matching.moved


def test_the_same_without_names() -> None:
    left, right = (stage_of("decode", stage=name) for name in ("push_back", "partition"))
    mapping = shuffled(right)
    matching = match(left, renamed(right, mapping), one_program=False, same_sizes=True)
    assert matching.pairs == {name: mapping[name] for name in left.nodes}
