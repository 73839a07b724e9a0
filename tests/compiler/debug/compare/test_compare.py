"""The single device against every stage: right models have no difference, wrong ones a first."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.compiler.debug.compare import faults
from tests.models import forget_compiled
from torch import nn

from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.compare.compare import compare_stages
from rolemesh.compiler.debug.compare.compare_model import compare_model
from rolemesh.compiler.debug.compare.compare_report import report_json, report_text
from rolemesh.compiler.debug.compare.reference import known_memory
from rolemesh.compiler.debug.compare.reports import StageReport
from rolemesh.compiler.debug.compare.stages import CAPTURE, PhaseRun, stages_of
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.pipeline import ShardOptions
from rolemesh.runtime.ge import engine
from rolemesh.runtime.ge.ops.all import OPS

pytestmark = pytest.mark.xdist_group("faults")

WHOLE = ("canonicalise", "seed", "absorb", "propagate", "push_back")
COLLECTIVES = ("gather_once", "sink", "bucket", "prefetch", "schedule")
STAGES = (*WHOLE, "partition", *COLLECTIVES, "verify")
REWRITING = ("canonicalise", "absorb")


def quiet(message: str) -> None:
    del message


def compared(run: PhaseRun, tolerance: float = 1e-3, rank: int | None = None) -> list[StageReport]:
    return [found.report for found in compare_stages(run, tolerance, rank=rank)]


@pytest.mark.parametrize(
    ("model", "mesh", "dtype"),
    [("hf:llama", "tp=4", "bf16"), ("hf:deepseek_v32", "dp=2,tp=2", "fp32")],
)
def test_every_stage_of_a_right_model_is_equal(model: str, mesh: str, dtype: str) -> None:
    options = CheckOptions(model, "pd_mixed", Mesh.parse(mesh), 11, 3, dtype=dtype, layers=2)
    found = compare_model(options, quiet)
    assert list(found) == ["prefill", "decode"]
    for stages in found.values():
        assert [stage.stage for stage in stages] == list(STAGES)
        for stage in stages:
            assert stage.ok, report_text(found, everything=False)
            assert stage.unmatched == () or stage.stage in REWRITING or stage.stage not in WHOLE
        by_name = {stage.stage: stage for stage in stages}
        # Only marks of rows have no counterpart; whatever is gathered or cut has one.
        assert all("owned_rows" in name for name in by_name["verify"].unmatched)
        assert len(by_name["verify"].nodes) > len(by_name["push_back"].nodes) > 100
        if dtype == "fp32":
            worst = by_name["verify"].worst
            assert worst is not None
            assert 0.0 < worst.gap.max_rel < 1e-5


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_decoding_starts_from_a_real_prefill_and_owned_weights_are_read_by_owners(
    role: str,
) -> None:
    run = faults.shard_again(role, role, "tp=3")
    names = [entry.name for entry in run.programs[CAPTURE].inputs]
    keys = run.inputs[names.index("past_key_values.layers[2].keys")]
    assert (role == "decode") == bool(keys.any())
    assert all(stage.ok for stage in compared(run))


def test_a_fault_is_found_at_its_node_and_on_its_ranks() -> None:
    with faults.one_buffer_for_all():
        run = faults.shard_again("prefill", "prefill")
    by_stage = {stage.stage: stage for stage in compared(run)}
    assert [name for name, stage in by_stage.items() if not stage.ok] == ["prefetch", "schedule"]
    first = by_stage["prefetch"].first
    assert first is not None
    # Rank 0 owns the weight of layer 0, rank 1 that of layer 1; the others read the wrong one.
    assert (first.name, first.op, first.gap.ranks) == ("wait", "mesh.wait", (2, 3))
    assert first.module == "model.layers.0.self_attn.q_proj"
    assert first.source.startswith("modeling_llama.py:")
    assert run.failure is not None
    assert run.failure.step.name == "verify"
    for rank in (0, 2):
        *_, found = compare_stages(run, 1e-3, ("prefetch",), rank)
        assert found.report.first is not None
        assert (found.report.first.name == "wait") == (rank in first.gap.ranks)


def test_an_op_that_raises_is_the_first_difference() -> None:
    with faults.gathers_the_wrong_dim():
        run = faults.shard_again("prefill", "pd_mixed")
    partition = next(stage for stage in compared(run) if stage.stage == "partition")
    first, last = partition.first, partition.nodes[-1]
    assert first is not None
    assert (first.op, first.gap.max_abs) == ("mesh.all_gather", math.inf)
    assert last.error.startswith("RuntimeError: ")
    text = report_text({"prefill": [partition]}, everything=True)
    assert f"%{first.name} = mesh.all_gather" in text
    assert "inserted: " in text
    (phase,) = report_json({"prefill": [partition]})
    assert isinstance(phase, dict)
    assert phase["stages"][0]["first"]["max_abs_err"] is None


def test_text_and_json_name_what_differs() -> None:
    with faults.drops_all_reduces():
        run = faults.shard_again("decode", "decode")
    stages = compared(run)
    text = report_text({"decode": stages}, everything=False)
    assert "first difference, after partition:\n    %pow_1 = aten.pow" in text
    assert "on ranks 0, 1, 2, 3" in text
    (phase,) = report_json({"decode": stages})
    assert isinstance(phase, dict)
    found = {stage["stage"]: stage for stage in phase["stages"]}
    assert found["push_back"]["ok"]
    assert found["push_back"]["first"] is None
    assert found["partition"]["first"]["name"] == "pow_1"
    assert found["partition"]["divergent"] > 10
    assert len(found["partition"]["nodes"]) == found["partition"]["compared"]


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(x.shape[0], x.shape[1], 8).slice_scatter(x, 2, 1, 7)
        return self.down(torch.tanh(self.up(room[:, :, 1:7]))).cumsum(1)


def test_symbolic_sizes_are_those_of_the_inputs_and_unwritten_memory_is_known() -> None:
    torch.manual_seed(0)
    model, x = Sized(), torch.randn(3, 13, 6)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        traced = trace(model, x)
    assert traced.program.scope is not None
    options = ShardOptions(Mesh({"tp": 4}), "prefill")
    programs, failure = stages_of(traced.program, options, "prefill")
    assert failure is None
    for tokens in (13, 5, 3):
        named = dict(model.named_parameters())
        inputs = tuple(
            named[entry.name].detach() if entry.name in named else torch.randn(3, tokens, 6)
            for entry in traced.program.inputs
        )
        run = PhaseRun("prefill", options, programs, inputs, None, True)
        stages = compared(run)
        assert [stage.stage for stage in stages] == list(STAGES)
        assert all(stage.ok for stage in stages), report_text({"": stages}, everything=False)
    forget_compiled()


def test_known_memory_is_the_same_everywhere_and_ends() -> None:
    with known_memory():
        assert bool(torch.empty(5).isnan().all())
        assert torch.empty(2, dtype=torch.int64).tolist() == [torch.iinfo(torch.int64).max] * 2
    assert not torch.are_deterministic_algorithms_enabled()


def test_ge_graphs_are_compared_value_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    options = CheckOptions("hf:llama", "decode", Mesh({"tp": 2}), 5, 3, layers=1, target="ge")
    (ge,) = compare_model(options, quiet, stage="ge")["decode"]
    assert ge.ok
    assert len(ge.nodes) > len(ge.unmatched) > 0
    cos = OPS["Cos"]
    wrong = {**OPS, "Cos": dataclasses.replace(cos, function=lambda attributes, x: x.cos() + 0.1)}
    monkeypatch.setattr(engine, "OPS", wrong)
    (ge,) = compare_model(options, quiet, stage="ge")["decode"]
    assert ge.first is not None
    assert (ge.first.name, ge.first.gap.ranks) == ("cos", (0, 1))
    assert ge.first.gap.max_abs == pytest.approx(0.1, rel=1e-3)
    assert len(ge.divergent) > 5


@pytest.mark.parametrize(
    ("changes", "arguments", "code", "says"),
    [
        ({"target": "inductor"}, {}, "RM003", "rolemesh check runs every target"),
        ({}, {"rank": 2}, "RM018", "the mesh has the ranks 0 to 1"),
        ({}, {"phase": "prefill"}, "RM004", "its phases are decode"),
        ({}, {"stage": "ge"}, "RM018", "ge needs --target ge"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    changes: dict[str, str], arguments: dict[str, object], code: str, says: str
) -> None:
    base = {"model": "hf:llama", "role": "decode", "mesh": Mesh({"tp": 2}), "layers": 1}
    with pytest.raises(RolemeshError) as error:
        compare_model(CheckOptions(**(base | changes)), quiet, **arguments)  # type: ignore[arg-type]
    assert error.value.code == code
    assert says in str(error.value)
