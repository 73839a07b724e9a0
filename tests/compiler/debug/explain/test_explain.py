"""What a name means, the user's own words in explanations, and their text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.compiler.debug.explain.explained import explained
from tests.conftest import Golden
from torch import Tensor, nn

from rolemesh.compiler.annotate import constrain
from rolemesh.compiler.api import shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.debug.explain.explain import Explanation, explain
from rolemesh.compiler.debug.explain.explain_text import explanation_text
from rolemesh.compiler.debug.paint import Painter
from rolemesh.compiler.dump.reader import RecordedProgram, open_run
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.spec import P

pytestmark = pytest.mark.xdist_group("recorded")

MIXED = {phase: ("hf:deepseek_v32", "pd_mixed", phase, "tp=4") for phase in ("prefill", "decode")}
LLAMA = ("hf:llama", "pd_mixed", "decode", "dp=2,tp=2")


class Annotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8, bias=False)
        self.down = nn.Linear(8, 10, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = constrain(torch.relu(self.up(x)), P("dp", None))
        return self.down(hidden), torch.ones(4, 10).cumsum(0)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> RecordedProgram:
    folder = str(tmp_path_factory.mktemp("run") / "annotated")
    traced = trace(Annotated().requires_grad_(False), torch.rand(4, 6))
    annotations = {"*up.weight": P("tp", None)}
    shard(traced, {"dp": 2, "tp": 2}, annotations=annotations, dump=folder)
    return open_run(folder).program()


def named(program: RecordedProgram, op: str, module: str) -> str:
    """The first node of an op in a module."""
    nodes = program.stage().nodes.values()
    return next(node.name for node in nodes if node.op == op and node.module == module)


def text_of(found: Explanation, *, full: bool = False) -> str:
    return explanation_text(found, Painter((), False), full=full)


def ends(found: Explanation) -> dict[str, tuple[str, str]]:
    return {c.axis: (c.links[-1].how, c.links[-1].text) for c in found.layout}


def test_annotations_of_the_user_are_where_chains_end(annotated: RecordedProgram) -> None:
    given = "annotated by the user: '*up.weight' is P('tp', None)"
    asked = "constrained by the user: P('dp', None)"
    assert ends(explain(annotated, "up.weight"))["tp"] == ("annotation", given)
    assert ends(explain(annotated, "relu")) == {
        "dp": ("annotation", asked),
        "tp": ("annotation", given),
    }
    assert ends(explain(annotated, "mm_1"))["dp"] == ("annotation", asked)
    assert ends(explain(annotated, "cumsum"))["dp"][0] == "constant"


def test_push_back_is_told_from_propagate(annotated: RecordedProgram) -> None:
    (link, *_) = explain(annotated, "relu", "dp").layout[0].links
    assert link.how == "wanted"
    assert link.decision is not None
    assert link.replaced is not None
    assert (link.decision.stage, link.decision.choice) == ("push_back", "split i")
    assert (link.replaced.stage, link.replaced.choice) == ("propagate", "whole")


def test_a_returned_value_is_gathered_for_the_output(annotated: RecordedProgram) -> None:
    move = explain(annotated, "all_gather_1").move
    assert move is not None
    assert (move.purpose, move.user, move.value) == ("output", "output", "mm_1")
    (side,) = move.sides
    assert side.axis == "dp"
    assert side.user.links[-1].text == "every rank returns the whole output"


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> RecordedProgram:
    """Seven columns on two ranks, a number of rows that may change, and an axis of one rank."""
    folder = str(tmp_path_factory.mktemp("run") / "padded")
    layers = nn.Linear(6, 7, bias=False), nn.ReLU(), nn.Linear(7, 10, bias=False)
    rows = torch.rand(4, 6)
    torch._dynamo.mark_dynamic(rows, 0)
    traced = trace(nn.Sequential(*layers).requires_grad_(False), rows)
    annotations = {"0.weight": P("tp", None), "2.weight": P(None, "tp")}
    shard(traced, {"tp": 2, "dp": 1}, annotations=annotations, dump=folder)
    return open_run(folder).program()


def test_pads_that_must_not_count(padded: RecordedProgram) -> None:
    masks = [n for n in padded.stage().nodes.values() if n.op == "mesh.mask_pad"]
    assert len(masks) == 2
    for mask in masks:
        found = explain(padded, mask.name)
        move = found.move
        assert move is not None
        assert (move.purpose, move.user) == ("pads", "mm_1")
        assert move.before == move.after
        (side,) = move.sides
        assert side.axis == "tp"
        decision = side.user.links[0].decision
        assert decision is not None
        assert "reduce={j}" in decision.rule
        assert decision.choice == "split j"
        text = text_of(found)
        assert f"%mm_1 = aten.mm(%relu, %t_1) must not count the pads of %{move.value}\n" in text
        assert f"\non tp: dim {side.before['shard'][0]} split\n" in text


def test_sizes_that_are_symbols_and_an_axis_of_one_rank(padded: RecordedProgram) -> None:
    found = explain(padded, "mm_1")
    assert "\n  a rank holds [s0, 10]\n" in text_of(found)
    tp, dp = found.layout
    assert [link.how for link in dp.links] == ["one rank"]
    assert tp.links[-1].how == "annotation"
    assert tp.links[0].placement == {"partial": "sum"}


def test_one_axis(annotated: RecordedProgram) -> None:
    assert [chain.axis for chain in explain(annotated, "relu").layout] == ["dp", "tp"]
    assert [chain.axis for chain in explain(annotated, "relu", "tp").layout] == ["tp"]
    gathered = explain(annotated, "all_gather", "dp").move
    assert gathered is not None
    assert gathered.sides == ()
    with pytest.raises(RolemeshError, match=r"\[RM002\] the mesh has no axis 'pp'") as error:
        explain(annotated, "relu", "pp")
    assert error.value.why == "its axes are dp, tp"


def test_names_of_weights_nodes_and_patterns() -> None:
    program = explained(MIXED["prefill"]).record
    name = "model.layers.0.self_attn.o_proj.weight"
    found = explain(program, name)
    assert found.name == name
    assert found.local == [112, 64]
    for other in ("*layers.0.self_attn.o_proj.weight", found.node, f"%{found.node}"):
        assert explain(program, other) == found
    assert explain(program, "all_to_all").stage == "verify"
    assert explain(program, "mm_7").stage == "push_back"


def test_a_weight_tells_who_brings_it_elsewhere_under_another_form() -> None:
    program = explained(("hf:deepseek_v32", "pd_mixed", "long prefill", "tp=4")).record
    found = explain(program, "model.layers.1.self_attn.o_proj.weight")
    gather, *_ = found.moves  # its start, and the wait for it
    move = explain(program, gather).move
    assert move is not None
    assert move.value != found.node
    assert move.sides[0].value.links[-1].node == found.node


def test_each_value_of_a_bundle_has_its_own_cause() -> None:
    program = explained(("hf:deepseek_v32", "prefill", "prefill", "tp=4")).record
    nodes = program.stage().nodes
    bundle = next(
        n for n in nodes.values() if n.op == "mesh.all_gather_start" and len(n.kinds) == 3
    )
    (wait,) = program.stage().users[bundle.name]
    picks = program.stage().users[wait]
    moves = [explain(program, pick).move for pick in picks]
    assert [move.value for move in moves if move] == list(bundle.operands)
    for move, pick in zip(moves, picks, strict=True):
        assert move is not None
        assert [step.node for step in move.steps] == [bundle.name, wait, pick]


@pytest.mark.parametrize(
    ("name", "what", "why", "fix"),
    [
        ("mm_*", "47 nodes fit 'mm_*'", "and 11 more", "name one of them"),
        ("al_to_all", "there is no node 'al_to_all'", "named as in", "did you mean 'all_to_all"),
        ("model.layers.0.self_attn.o_proj.wieght", "there is no node", "", "o_proj.weight'"),
        ("qqqq", "there is no node 'qqqq'", "", "see rolemesh show"),
    ],
)
def test_names_that_do_not_fit(name: str, what: str, why: str, fix: str) -> None:
    program = explained(MIXED["prefill"]).record
    if name == "mm_*":
        count = sum(n.startswith("mm_") for n in program.stage().nodes)
        what, why = what.replace("47", str(count)), why.replace("11", str(count - 12))
    with pytest.raises(RolemeshError) as error:
        explain(program, name)
    assert error.value.code == "RM018"
    assert what in error.value.what
    assert why in error.value.why
    assert fix in error.value.fix


def test_a_node_that_canonicalise_replaced() -> None:
    program = explained(MIXED["prefill"]).record
    left = program.stage("push_back").nodes
    gone = [n for n in program.stage("capture").nodes.values() if n.name not in left and n.source]
    assert gone
    with pytest.raises(RolemeshError, match="is there only before canonicalise") as error:
        explain(program, gone[0].name)
    assert gone[0].op in error.value.why
    assert gone[0].source in error.value.why


def test_a_program_without_decisions_is_refused(tmp_path: Path) -> None:
    program = explained(MIXED["prefill"]).record
    entry = {**program.entry, "stages": program.entry["stages"][:3]}
    with pytest.raises(RolemeshError, match="no stage propagate and no stage push_back"):
        explain(RecordedProgram(program.folder, entry), "mm_1")


def test_a_program_that_was_not_partitioned_has_layouts() -> None:
    program = explained(MIXED["prefill"]).record
    decided = program.stage_names.index("push_back") + 1
    entry = {**program.entry, "stages": program.entry["stages"][:decided]}
    found = explain(RecordedProgram(program.folder, entry), "mm_7")
    assert found.layout == explain(program, "mm_7").layout
    assert found.local is None
    assert found.moves == ()


def test_text_and_json_of_all_kinds_of_nodes() -> None:
    program = explained(MIXED["decode"]).record
    nodes = {node.op: node for node in program.stage().nodes.values()}
    assert len(nodes) > 40
    for node in list(nodes.values())[::4]:
        found = explain(program, node.name)
        text = text_of(found, full=True)
        assert text.startswith(found.name)
        assert found.source in text
        assert found.module in text
        assert json.loads(json.dumps(found.as_json()))["node"] == node.name


def test_text_of_the_all_to_all_before_the_output_projection(golden: Golden) -> None:
    program = explained(MIXED["decode"]).record
    name = named(program, "mesh.all_to_all", "model.layers.0.self_attn.o_proj")
    lines = text_of(explain(program, name)).splitlines()
    attention = slice(
        next(i for i, line in enumerate(lines) if "%reshape_26 " in line),
        next(i for i, line in enumerate(lines) if "%pow_1 " in line),
    )
    lines[attention] = ["  ..."]
    golden("o_proj_all_to_all", "\n".join(lines))


def test_text_of_the_gather_of_the_output_projection(golden: Golden) -> None:
    program = explained(("hf:deepseek_v32", "pd_mixed", "long prefill", "tp=4")).record
    name = named(program, "mesh.all_gather", "model.layers.0.self_attn.o_proj")
    text = text_of(explain(program, name))
    golden("o_proj_gather", "\n".join(text.splitlines()[:33]))


def test_text_of_a_layout_on_two_axes(golden: Golden) -> None:
    program = explained(LLAMA).record
    name = named(program, "aten.mean.dim", "model.layers.0.input_layernorm")
    golden("llama_norm", text_of(explain(program, name)))


def test_reading_loads_no_torch() -> None:
    folder = explained(MIXED["prefill"]).record.folder
    script = (
        "import sys\nfrom rolemesh.compiler.cli.main import main\n"
        f"assert main(['explain', {str(folder)!r}, 'all_to_all', '--program', 'prefill']) == 0\n"
        "assert not {'torch', 'numpy', 'sympy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)
