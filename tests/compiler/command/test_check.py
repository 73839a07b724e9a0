"""The check finds what is equal, what is not, and reports what moves and what is stored."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rolemesh.compiler.command import check_ranks
from rolemesh.compiler.command.check import check
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.command.compare import EQUAL, difference, named_tensors
from rolemesh.compiler.command.report import CheckReport, CollectiveRow, PhaseReport, StoredRow
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.models.cases import Case, load_case
from rolemesh.lowering import chunks
from rolemesh.runtime import rank as rank_module

TP2 = Mesh({"tp": 2})


def options(role: str, **changes: object) -> CheckOptions:
    base = CheckOptions("hf:llama", role, TP2, layers=1)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Comparing.


def test_named_tensors_walks_objects_and_lists_each_tensor_once() -> None:
    class Layer:
        def __init__(self, keys: torch.Tensor) -> None:
            self.keys = keys
            self.lengths = {"a": torch.ones(1)}

    keys = torch.zeros(2)
    found = named_tensors({"x": [Layer(keys), keys], "skipped": [nn.Linear(1, 1), len, int, "s"]})
    assert list(found) == ["['x'][0].keys", "['x'][0].lengths['a']"]
    assert found["['x'][0].keys"] is keys


@pytest.mark.parametrize(
    ("want", "got", "max_abs", "equal"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0, True),
        ([1.0, -4.0], [1.0, -4.25], 0.25, True),
        ([1.0, -4.0], [1.0, -4.75], 0.75, False),
        ([0.0, 0.0], [0.0, 0.05], 0.05, True),
        ([math.nan, math.inf, -math.inf], [math.nan, math.inf, -math.inf], 0.0, True),
        ([math.nan], [0.0], math.inf, False),
        ([0.0], [math.nan], math.inf, False),
        ([math.inf], [-math.inf], math.inf, False),
        ([], [], 0.0, True),
    ],
)
def test_difference(want: list[float], got: list[float], max_abs: float, equal: bool) -> None:
    found = difference({"a": torch.tensor(want)}, {"a": torch.tensor(got)}, 0.1)
    assert found.max_abs == pytest.approx(max_abs)
    assert found.equal is equal


def test_low_precision_is_compared_by_root_mean_square() -> None:
    want = torch.ones(100)
    want[1::2] = -1
    got = want.clone()
    got[0] = -1
    fine, coarse = {"a": want}, {"a": want.bfloat16()}
    assert not difference(fine, {"a": got}, 0.25).equal
    found = difference(coarse, {"a": got.bfloat16()}, 0.25)
    assert (found.equal, found.max_abs) == (True, 2.0)
    assert not difference(coarse, {"a": got.bfloat16()}, 0.15).equal
    assert not difference(coarse, {"a": want.bfloat16() * math.nan}, 0.25).equal


def test_integers_must_be_equal_and_shapes_too() -> None:
    three, four = torch.tensor([100, 3]), torch.tensor([100, 4])
    assert not difference({"a": three}, {"a": four}, 0.1).equal
    assert difference({"a": three}, {"a": three.clone(), "b": four}, 0.1) == EQUAL
    assert not difference({"a": three}, {}, 0.1).equal
    assert not difference({"a": three}, {"a": three[:1]}, 0.1).equal
    assert not difference({"a": three}, {"a": three.float()}, 0.1).equal


def test_the_largest_difference_that_is_not_equal_is_named() -> None:
    want = {"big": torch.tensor([1e6]), "small": torch.tensor([1.0])}
    got = {"big": torch.tensor([1e6 + 8]), "small": torch.tensor([2.0])}
    found = difference(want, got, 1e-3)
    assert (found.where, found.max_abs, found.equal) == ("small", 1.0, False)


# --------------------------------------------------------------------------------------------------
# Checking.


@pytest.mark.parametrize("role", ["prefill", "decode", "pd_mixed"])
def test_lock_step_equals_the_single_device(role: str) -> None:
    report = check(options(role, decode_steps=3))
    assert report.ok, report.as_text()
    phases = {"prefill": ["prefill"], "decode": ["decode"]}.get(role, ["prefill", "decode"])
    assert [phase.phase for phase in report.phases] == phases
    assert [len(step) for step in report.tokens] == [2, 2, 2, 2]
    for phase in report.phases:
        assert phase.steps == (3 if phase.phase == "decode" else 1)
        assert phase.max_abs_err < 1e-4
        assert phase.collectives
    storage = {row.name: row for row in report.storage}
    assert storage["model.norm.weight"].bytes_local == 72 * 4
    assert storage["past_key_values.layers[0].keys"].updated


def test_a_cache_that_counts_in_a_plain_integer_is_compiled_for_each_step() -> None:
    report = check(options("decode", model="hf:gpt_oss", decode_steps=2))
    assert report.ok, report.as_text()
    assert report.phases[0].steps == 2


def test_all_roles_choose_the_same_tokens() -> None:
    tokens = [check(options(role, decode_steps=3)).tokens for role in ("prefill", "pd_mixed")]
    assert tokens[0] == tokens[1]
    assert len({step[0] for step in tokens[0]}) > 1, "a model that repeats itself proves little"


def test_checking_leaves_the_case_as_it_was() -> None:
    case = load_case("hf:llama", layers=1)
    before = {name: x.clone() for name, x in named_tensors(case.phases).items()}
    check(options("pd_mixed"), case=case)
    after = named_tensors(case.phases)
    assert all(torch.equal(x, after[name]) for name, x in before.items())


class Stateful(nn.Module):
    """Adds up what it has seen, in a buffer and in an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, tokens: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        self.seen += x.sum((0, 1))
        state += x.sum(1)
        return x + self.seen


def test_buffers_and_plain_arguments_are_compared() -> None:
    def case() -> Case:
        torch.manual_seed(0)
        return Case(
            Stateful().eval(), {"prefill": ((torch.arange(6).reshape(2, 3), torch.zeros(2, 4)), {})}
        )

    report = check(options("prefill"), case=case())
    assert report.ok, report.as_text()
    assert report.tokens == ((),)
    updated = {row.name for row in report.storage if row.updated}
    assert updated == {"seen", "state"}
    wrong = case()
    with torch.no_grad():
        wrong.phases["prefill"][0][1].fill_(math.nan)  # type: ignore[attr-defined]
    assert check(options("prefill"), case=wrong).ok, "NaN where the reference has NaN is equal"


def test_a_role_without_a_phase_of_the_case() -> None:
    case = Case(nn.Linear(2, 2), {"warm_up": ((torch.ones(1, 2),), {})})
    with pytest.raises(RolemeshError, match=r"RM004.*the case has no phase that role 'decode'"):
        check(options("decode"), case=case)


# --------------------------------------------------------------------------------------------------
# What is wrong must show.


def damage(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let every lock-step reassembly of a float tensor change it."""
    right = chunks.assemble

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        value = right(*args, **kwargs)  # type: ignore[arg-type]
        return change(value) if value.is_floating_point() else value

    monkeypatch.setattr(chunks, "assemble", wrong)


@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: x * math.nan], ids=["off", "nan"])
def test_wrong_results_are_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    damage(monkeypatch, change)
    report = check(options("prefill"))
    assert not report.ok
    text = report.as_text()
    assert "PROBLEM  prefill: result['logits'] differs by" in text
    assert "PROBLEM  prefill: state['kwargs']['past_key_values'].layers[0]" in text
    assert text.endswith("NOT equal to the single device")
    assert report.as_json()["ok"] is False


def test_wrong_tokens_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch, lambda x: x.flip(-1) if x.shape[-1] == 251 else x)
    report = check(options("prefill", tolerance=1e6))
    assert report.ok, "a difference within the tolerance may break a tie"
    damage(monkeypatch, lambda x: x)
    report = check(options("decode", tolerance=0.0))
    assert not report.ok, "without tolerance, the order of sums is a difference"


def test_tolerance_is_that_of_the_dtype() -> None:
    assert options("prefill").allowed == 1e-3
    assert options("prefill", dtype="bf16").allowed == 5e-1
    assert options("prefill", tolerance=0.5).allowed == 0.5


@pytest.mark.parametrize("name", ["tokens", "batch", "decode_steps"])
def test_sizes_count_from_one(name: str) -> None:
    with pytest.raises(RolemeshError, match=rf"RM018\] {name} is 0"):
        options("prefill", **{name: 0})


# --------------------------------------------------------------------------------------------------
# Real ranks.


@pytest.mark.processes
@pytest.mark.parametrize("role", ["prefill", "pd_mixed"])
def test_processes_equal_the_single_device(role: str) -> None:
    report = check(options(role, processes=True, decode_steps=2))
    assert report.ok, report.as_text()
    again = check(options(role, decode_steps=2))
    assert report.tokens == again.tokens
    assert report.storage == again.storage
    assert [phase.collectives for phase in report.phases] == [
        phase.collectives for phase in again.phases
    ]


@pytest.mark.processes
def test_what_processes_do_is_held_against_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_ranks, "expected_traffic", lambda *_: Counter())
    monkeypatch.setattr(rank_module.Store, "release", lambda self, tensors: None)
    report = check(options("decode", processes=True))
    assert not report.ok
    problems = "\n".join(report.problems)
    assert "decode on rank 1: the process groups moved " in problems
    assert "3 all_reduce of 576 bytes that the report does not have" in problems
    assert "parameter model.norm.weight still has its full storage" in problems


@pytest.mark.processes
def test_a_rank_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rank_module.scatter_one

    def wrong(tensor: torch.Tensor, layout: object, mesh: object, rank: int) -> torch.Tensor:
        local = right(tensor, layout, mesh, rank)  # type: ignore[arg-type]
        return local + 1 if rank == 1 and not local.is_floating_point() else local

    monkeypatch.setattr(rank_module, "scatter_one", wrong)
    report = check(options("prefill", processes=True))
    assert not report.ok
    assert any(problem.startswith("prefill on rank 1: result") for problem in report.all_problems)


@pytest.mark.processes
def test_an_error_of_ours_on_a_rank_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RolemeshError("RM010", "no rule", where="op x")

    monkeypatch.setattr(check_ranks, "gather", fail)
    with pytest.raises(RolemeshError, match=r"^\[RM010\] no rule"):
        check(options("decode", processes=True))


# --------------------------------------------------------------------------------------------------
# The report.


def test_layers_are_counted_and_the_text_fits() -> None:
    report = check(options("decode", layers=3))
    (reduce,) = [row for row in report.phases[0].collectives if row.module.endswith("o_proj")]
    assert (reduce.count, reduce.module) == (3, "model.layers.*.self_attn.o_proj")
    text = report.as_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "      3  model.layers.0-2.self_attn.o_proj.weight " in text
    assert "      3  past_key_values.layers[0-2].keys " in text


def test_json_merges_modules_and_has_no_infinity() -> None:
    row = CollectiveRow("all_reduce", "tp", None, (2, 3), "float32", 24, 2, "because", "layers.*.a")
    other = dataclasses.replace(row, module="layers.*.b", count=3)
    phase = PhaseReport("decode", 5, 1, math.inf, 0.0, (row, other), ("off",))
    stored = StoredRow("w", (4, 3), "f32[4@tp, 3]", 24)
    report = CheckReport("m", "decode", {"tp": 2}, "eager", "2 ranks", (phase,), (stored,))
    assert report.as_json() == {
        "schema_version": 1,
        "ok": False,
        "model": "m",
        "role": "decode",
        "mesh": {"tp": 2},
        "target": "eager",
        "phases": [
            {
                "phase": "decode",
                "nodes": 5,
                "max_abs_err": None,
                "collectives": [
                    {
                        "op": "all_reduce",
                        "axis": "tp",
                        "dim": None,
                        "shape": [2, 3],
                        "dtype": "float32",
                        "bytes": 24,
                        "count": 5,
                        "cause": "because",
                    }
                ],
            }
        ],
        "storage": [{"name": "w", "shape": [4, 3], "layout": "f32[4@tp, 3]", "bytes_local": 24}],
    }
