"""What differs between stages: nothing of a stage and itself, and what was changed of another."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.compiler.debug.diff.renamed import edited, renamed
from tests.compiler.recorded import recorded_run
from tests.conftest import Golden

from rolemesh.compiler.debug.diff.differences import Change, Difference, Kind, Traffic, difference
from rolemesh.compiler.debug.diff.differences_text import difference_json, difference_text
from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.dump.reader import Stage

pytestmark = pytest.mark.xdist_group("recorded")

Nodes = list[dict[str, Any]]
PLAIN = Painter(["tp"], False)


def stage_of(phase: str, role: str = "pd_mixed", stage: str = "last") -> Stage:
    return recorded_run("hf:deepseek_v32", role).program(phase).stage(stage)


def other_names(stage: Stage) -> Stage:
    return renamed(stage, {name: f"n{i}" for i, name in enumerate(reversed(stage.nodes))})


def after(edit: Callable[[Nodes], None], phase: str = "prefill") -> list[Change]:
    """Differences of a stage from itself, edited and under other names."""
    stage = stage_of(phase)
    found = difference(stage, other_names(edited(stage, edit)))
    assert found
    return [*found.changes]


def first(nodes: Nodes, op: str) -> dict[str, Any]:
    return next(node for node in nodes if node["op"] == op)


def kinds(found: Difference) -> Counter[Kind]:
    return Counter(change.kind for change in found.changes)


# ---- nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["capture", "propagate", "partition", "verify"])
@pytest.mark.parametrize("role", ["pd_mixed", "prefill"])
def test_a_stage_has_no_difference_from_itself(role: str, stage: str) -> None:
    found = stage_of("prefill", role, stage)
    for other in (found, other_names(found)):
        same = difference(found, other)
        assert not same
        assert same.changes == ()
    assert not difference(found, found, one_program=True)
    assert difference_text(same, ("a", "b"), PLAIN) == "a -> b: no difference"
    assert difference_json(same)["equal"] is True


# ---- one thing -----------------------------------------------------------------------------------


def test_an_op_that_was_added() -> None:
    def add(nodes: Nodes) -> None:
        node = first(nodes, "aten.rsqrt.default")
        place = nodes.index(node) + 1
        nodes.insert(place, {**node, "name": "more", "op": "aten.neg.default"})

    stage = stage_of("prefill")
    found = difference(stage, edited(stage, add)).changes
    (change,) = found
    assert (change.kind, change.node, change.op) == (Kind.ADDED, "more", "aten.neg.default")
    (change,) = difference(edited(stage, add), stage).changes
    assert (change.kind, change.node) == (Kind.REMOVED, "more")


def test_an_op_that_was_moved() -> None:
    moved = []

    def move(nodes: Nodes) -> None:
        wait = next(n for n in reversed(nodes) if n["op"] == "aten.t.default")
        nodes.remove(wait)
        nodes.insert(next(i for i, n in enumerate(nodes) if n["op"] != "input"), wait)
        moved.append(wait["name"])

    (change,) = after(move)
    assert (change.kind, change.node) == (Kind.MOVED, moved[0])


def test_an_op_that_became_another() -> None:
    def change_op(nodes: Nodes) -> None:
        first(nodes, "aten.rsqrt.default")["op"] = "aten.sqrt.default"

    (change,) = after(change_op)
    assert (change.kind, change.what) == (Kind.CHANGED, "op")
    assert (change.before, change.after) == ("aten.rsqrt.default", "aten.sqrt.default")


def test_an_argument_that_changed() -> None:
    def change_argument(nodes: Nodes) -> None:
        first(nodes, "aten.pow.Tensor_Scalar")["args"][1] = 3

    (change,) = after(change_argument)
    assert (change.kind, change.what) == (Kind.CHANGED, "argument 1")
    assert (change.before, change.after) == ("2", "3")


def test_an_operand_that_changed() -> None:
    def swap(nodes: Nodes) -> None:
        node = next(n for n in nodes if n["op"] == "aten.mul.Tensor" and len(n["args"]) == 2)
        node["args"] = node["args"][::-1]

    found = after(swap)
    assert {change.kind for change in found} == {Kind.CHANGED}
    assert [change.what for change in found] == ["operand of argument 0", "operand of argument 1"]


def test_a_shape_that_changed() -> None:
    def widen(nodes: Nodes) -> None:
        first(nodes, "aten.rsqrt.default")["types"][0]["shape"][-1] = 5

    (change,) = after(widen)
    assert (change.kind, change.what) == (Kind.CHANGED, "result")
    assert (change.before, change.after) == ("[float32, 2, 13, 1]", "[float32, 2, 13, 5]")


def test_a_layout_that_changed() -> None:
    def gather(nodes: Nodes) -> None:
        node = first(nodes, "aten.rsqrt.default")
        node["layouts"], node["kinds"] = [["replicated"]], ["f32[2, 13, 1]"]

    (change,) = after(gather)
    assert (change.kind, change.what) == (Kind.RESHARDED, "tp: dim 1 split -> whole")
    assert (change.before, change.after) == ("f32[2, 13@tp, 1]", "f32[2, 13, 1]")


def test_a_collective_that_grew_is_in_the_totals() -> None:
    def grow(nodes: Nodes) -> None:
        first(nodes, "mesh.all_gather")["collective"]["bytes"] += 7

    stage = stage_of("prefill")
    found = difference(stage, edited(stage, grow))
    before, now = found.traffic["all_gather tp"]
    assert found.changes == ()
    assert now == Traffic(before.count, before.received + 7)
    assert found.received == (now.received - 7 + rest(found), now.received + rest(found))
    assert "all_gather tp" in difference_text(found, ("a", "b"), PLAIN)


def rest(found: Difference) -> int:
    return sum(pair[0].received for key, pair in found.traffic.items() if key != "all_gather tp")


def test_another_result_of_the_program() -> None:
    stage = stage_of("decode")
    head = json.loads(json.dumps(stage.data["program"]))
    value = next(i for i, entry in enumerate(head["outputs"]) if "mutates" not in entry)
    head["outputs"][value]["value"] = {"node": "embedding"}
    other = Stage(stage.program, stage.number, stage.name, {**stage.data, "program": head}, "")
    (change,) = difference(stage, other).changes
    assert (change.kind, change.node, change.op) == (Kind.CHANGED, "result 0", "output")
    assert change.after == "%embedding (mesh.take)"


# ---- phases and passes ---------------------------------------------------------------------------


def test_partition_adds_collectives_and_moves_nothing() -> None:
    left, right = (stage_of("decode", stage=name) for name in ("push_back", "partition"))
    found = difference(left, right, one_program=True)
    added = [change for change in found.changes if change.kind == Kind.ADDED]
    assert {change.op.split(".")[0] for change in added} == {"mesh"}
    assert not kinds(found)[Kind.MOVED] + kinds(found)[Kind.RESHARDED] + kinds(found)[Kind.REMOVED]
    assert found.memory[0] is None
    moved = [node.collective for node in right.nodes.values() if node.collective]
    count = sum(pair[1].count for pair in found.traffic.values())
    assert count == len(moved) > 0
    assert found.received == (0, sum(collective["bytes"] for collective in moved))
    # What an op reads through a collective is no other operand.
    assert not any(change.what.startswith("operand") for change in found.changes)


def test_phases_that_differ_in_tokens_differ_in_little_else_before_sharding() -> None:
    run = recorded_run("hf:deepseek_v32", "pd_mixed")
    programs = [run.program(phase) for phase in ("prefill", "decode")]
    left, right = (program.stage("capture") for program in programs)
    sizes = tuple(program.stage().data["sizes"] for program in programs)
    blind = kinds(difference(left, right))
    found = kinds(difference(left, right, sizes=(sizes[0], sizes[1])))
    assert found[Kind.TOKENS] > 200
    assert found[Kind.CHANGED] < blind[Kind.CHANGED] / 10
    assert found[Kind.ADDED] + found[Kind.REMOVED] < 10


def test_a_number_of_tokens_is_told_from_another_number() -> None:
    def widen(nodes: Nodes) -> None:
        for node in nodes:  # the hidden size, in one layer norm
            if node["op"] == "aten.rsqrt.default":
                node["types"][0]["shape"][-1] = 2
                break

    left, right = stage_of("prefill"), stage_of("decode")
    plain = [c for c in difference(left, right).changes if c.what == "result"]
    found = [c for c in difference(left, edited(right, widen)).changes if c.what == "result"]
    assert len(found) == len(plain) + 1


def test_roles_differ_in_weights_and_their_broadcasts() -> None:
    found = difference(stage_of("prefill", "prefill"), stage_of("decode", "decode"))
    assert found.traffic["broadcast tp"][1] == Traffic()
    assert found.traffic["all_reduce tp"][0] == Traffic()
    weights = [c for c in found.changes if c.op == "input" and "q_b_proj" in c.node]
    assert [c.what for c in weights] == [
        f"tp: whole on rank {layer} only -> dim 0 split" for layer in (0, 1)
    ]
    assert found.memory[0] is not None
    assert found.memory[1] is not None
    assert found.memory[0].pool > found.memory[1].pool == 0


def test_an_axis_that_only_one_mesh_has_is_whole_in_the_other() -> None:
    left = stage_of("decode")
    data = json.loads(json.dumps(dict(left.data)))
    data["program"]["mesh"] = {"dp": 3, **left.mesh}
    for node in data["nodes"]:
        node["layouts"] = [["replicated", *layout] for layout in node.get("layouts", [])]
    split = next(node for node in data["nodes"] if node["op"] == "aten.rsqrt.default")
    split["layouts"][0][0] = {"shard": [2, 1, 1]}
    found = difference(left, Stage(left.program, left.number, left.name, data, ""))
    (change,) = found.changes
    assert (change.kind, change.what) == (Kind.RESHARDED, "dp: whole -> dim 2 split")
    assert "mesh tp=4 -> dp=3,tp=4" in difference_text(found, ("a", "b"), PLAIN)


def test_outputs_are_told_apart_by_what_they_update() -> None:
    left = stage_of("decode")
    data = json.loads(json.dumps(dict(left.data)))
    outputs = data["program"]["outputs"]
    gone = outputs.pop(0)
    name = data["program"]["inputs"][gone["mutates"]]["name"]
    other = Stage(left.program, left.number, left.name, data, "")
    (change,) = difference(left, other).changes
    assert (change.kind, change.node, change.op) == (Kind.REMOVED, name, "output")


# ---- text and JSON -------------------------------------------------------------------------------


def test_text(golden: Golden) -> None:
    program = recorded_run("hf:llama", "pd_mixed").program("decode")
    left, right = program.stage("propagate"), program.stage("partition")
    found = difference(left, right, one_program=True)
    golden("diff_llama_decode", difference_text(found, ("propagate", "partition"), PLAIN))


def test_full_text_has_a_row_for_every_change() -> None:
    found = difference(stage_of("prefill"), stage_of("decode"))
    folded, full = (difference_text(found, ("a", "b"), PLAIN, full=full) for full in (False, True))
    rows = [line for line in full.splitlines() if line[:3] in ("  +", "  -", "  ~", "  @", "  >")]
    assert len(rows) == sum(count for kind, count in kinds(found).items() if kind != Kind.TOKENS)
    assert folded.count("\n") < full.count("\n") / 3
    assert "model.layers.*.self_attn x 2" in folded


def test_json_has_everything() -> None:
    found = difference(stage_of("prefill"), stage_of("decode"))
    data = json.loads(json.dumps(difference_json(found)))
    assert data["equal"] is False
    assert len(data["changes"]) == len(found.changes)
    assert data["bytes"] == {"before": found.received[0], "after": found.received[1]}
    assert data["sizes"]["before"] == {"tp": 4, "B": 2, "T": 13}
    assert data["counts"]["resharded"] == kinds(found)[Kind.RESHARDED]
    (moved,) = [c for c in data["changes"] if c["node"] == "input_ids" and c["kind"] == "resharded"]
    assert (moved["before"], moved["after"]) == ("i64[2, 13@tp]", "i64[2@tp, 1]")
