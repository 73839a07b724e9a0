"""The fuzz finds what is wrong, makes it small, and a file of it fails again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.passes import fuzz
from tests.passes.random import check as checking
from tests.passes.random.case import Call, Case, Fill, Leaf, Ref, Result, listing
from tests.passes.random.check import Tally, check
from tests.passes.random.families import draw_symbolic_case
from tests.passes.random.files import load, save
from tests.passes.random.shrink import shrink

from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.rule import OpCall, Rule, RuleBuilder
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.rules.defaults import FAMILIES
from rolemesh.passes.rules.registry import LocalCall, LocalForm, Rules

aten = torch.ops.aten


def value(*shape: int) -> TensorType:
    return TensorType(shape, torch.float32)


def product(size: int = 3, pinned: Layout | None = None) -> Case:
    """`relu(x @ w) + b` of ones, with the summed dim, of extent `size`, sharded."""
    mesh = Mesh({"tp": 2})
    ones = Fill(0, 1, 2)
    y = value(2, 4)
    return Case(
        mesh,
        (
            Leaf(value(2, size), ones, Layout((Shard(1, 1, size),))),
            Leaf(value(size, 4), ones, Layout((Shard(0, 1, size),))),
            Leaf(value(4), ones, Layout.replicated(mesh)),
            Call(aten.mm.default, (Ref(0), Ref(1)), {}, (y,)),
            Call(aten.relu.default, (Ref(3),), {}, (y,)),
            Call(aten.add.Tensor, (Ref(4), Ref(2)), {}, (y,)),
        ),
        (Result(Ref(5), pinned=pinned), Result(Ref(4))),
    )


def symbolic_product(*runs: int) -> Case:
    scope = Scope()
    size = scope.symbol("T", 4)
    assert isinstance(size, Dim)
    values = tuple({size.formula: run} for run in runs)
    return dataclasses.replace(product(size), scope=scope, runs=values)


def test_a_right_case_checks() -> None:
    assert check(product()) == ""
    assert check(product(pinned=Layout((Shard(0, 1, 2),)))) == ""
    tally = Tally()
    assert check(symbolic_product(2, 3, 9), tally=tally) == ""
    assert (tally.ran, tally.unfit, sum(tally.refused.values())) == (3, 0, 0)


def test_a_wrong_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run_whole = checking.run_whole

    def off_by_one(*args: object) -> object:
        inputs, (first, second) = run_whole(*args)  # type: ignore[arg-type]
        return inputs, [first + 1, second]

    monkeypatch.setattr(checking, "run_whole", off_by_one)
    assert "output 0: rank 0" in check(product())


def test_values_at_which_the_graph_is_another_one_are_left_out() -> None:
    case = symbolic_product(3, 5)
    cut = Call(aten.slice.Tensor, (Ref(0), 1, 0, 4), {}, (value(2, 4),))
    tally = Tally()
    case = dataclasses.replace(case, steps=(*case.steps, cut), results=(Result(Ref(6)),))
    assert check(case, tally=tally) == ""
    assert tally.ran == 1
    assert tally.unfit + sum(tally.refused.values()) == 1


def test_a_defect_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without filling pads before a sum, a product over an uneven dim reads them."""
    monkeypatch.setattr(
        "rolemesh.passes.partition.Rewrite._mask_pad", lambda self, value, *rest: value
    )
    case = product()
    assert "nan" in check(case)
    small = shrink(case, lambda other: "nan" in check(other))
    assert len(small.results) == 1
    assert [step.target for step in small.steps if isinstance(step, Call)] == [aten.mm.default]


def test_push_back_is_part_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PushBack, program: object) -> object:
        raise RuntimeError("reached")

    monkeypatch.setattr(PushBack, "apply", refuse)
    assert "reached" in check(product())


def broken_rules() -> Rules:
    """Rules of which two are wrong, in tables of their own."""

    def cumsum(call: OpCall) -> Rule:
        """Says that a running sum passes along its own dim."""
        builder = RuleBuilder()
        dims = builder.dims(call.operands[0].shape)
        return builder.build([dims], [dims], linear=((True,),))

    def expand_local(local: LocalCall) -> LocalForm:
        """Takes hints for sizes."""
        sizes = [size.hint if isinstance(size, Dim) else size for size in local.result_shape()]
        return aten.expand.default, (local.args[0], sizes), {}

    return Rules(
        (*(family.RULES for family in FAMILIES), {"aten::cumsum": cumsum}),
        (*(family.LOCAL for family in FAMILIES), {"aten::expand": expand_local}),
    )


@pytest.mark.parametrize("op", [aten.cumsum.default, aten.expand.default])
def test_a_wrong_rule_is_found_shrunk_and_replayed(
    op: torch._ops.OpOverload, tmp_path: Path
) -> None:
    rules = broken_rules()

    def wrong(case: Case) -> bool:
        return any(isinstance(s, Call) and s.target is op for s in case.steps) and bool(
            check(case, rules=rules)
        )

    found = next(case for case in map(draw_symbolic_case, range(400)) if wrong(case))
    small = shrink(found, wrong)
    calls = [step.target for step in small.steps if isinstance(step, Call)]
    assert op in calls
    assert len(calls) <= 2  # one may need another op beside it to be sharded
    assert len(small.steps) <= 4
    assert len(small.runs) == len(small.mesh.names) == len(small.results) == 1
    assert (small.scope is None) is (op is aten.cumsum.default)  # one fails at plain sizes too
    path = tmp_path / "case.json"
    save(small, path, check(small, rules=rules))
    assert listing(load(path)) == listing(small)
    assert wrong(load(path))
    assert not check(load(path))


def test_files_keep_everything(tmp_path: Path) -> None:
    for seed in range(40):
        case = draw_symbolic_case(seed)
        save(case, tmp_path / "case.json", "")
        assert listing(load(tmp_path / "case.json")) == listing(case)


def test_the_command_reports_a_failure_and_replays_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ["--count", "3", "--out", str(tmp_path)]
    assert fuzz.main(right) == 0
    assert "3 cases, 0 wrong" in capsys.readouterr().out
    monkeypatch.setattr(fuzz, "draw_symbolic_case", lambda seed, runs: product())
    monkeypatch.setattr(
        "rolemesh.passes.partition.Rewrite._mask_pad", lambda self, value, *rest: value
    )
    assert fuzz.main(["--count", "1", "--seed", "7", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    path = tmp_path / "seed-7.json"
    assert f"--replay {path}" in text
    assert fuzz.main(["--replay", str(path)]) == 1
    monkeypatch.undo()
    assert fuzz.main(["--replay", str(path)]) == 0
    assert capsys.readouterr().out.endswith("right\n")
