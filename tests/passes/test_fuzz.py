"""Random Programs with random layouts give what the whole graph gives, on every rank.

A failure prints the seed and a small Program that fails alike. To look at one seed again:

    python -c "from tests.passes.random_programs import *; print(check(draw_case(SEED)))"
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.passes import random_programs
from tests.passes.random_programs import Call, Case, Leaf, Ref, Result, check, draw_case, shrink

from rolemesh.compiler.ir.layout import Layout, Shard
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.passes.push_back import PushBack

CASES, BLOCK = 3000, 200


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", range(0, CASES, BLOCK))
def test_ranks_agree_with_the_whole_graph(first: int) -> None:
    for seed in range(first, first + BLOCK):
        case = draw_case(seed)
        wrong = check(case)
        if wrong:
            small = shrink(case, lambda other: _kind(check(other)) == _kind(wrong))  # noqa: B023
            pytest.fail(f"seed {seed}: {check(small)}\n{_listing(small)}", pytrace=False)


def _kind(message: str) -> str:
    return message.partition(" ")[0]


def _listing(case: Case) -> str:
    """The case as it was drawn: ops with their arguments, inputs with their values."""
    lines = [f"mesh {case.mesh}"]
    for index, step in enumerate(case.steps):
        if isinstance(step, Leaf):
            lines.append(f"{index}: {step.value.tolist()} {step.layout.placements}")
        else:
            lines.append(f"{index}: {step.target} {step.args} {step.kwargs}")
    return "\n".join([*lines, *map(str, case.results)])


def test_cases_are_drawn_alike_every_time() -> None:
    for seed in range(20):
        assert _listing(draw_case(seed)) == _listing(draw_case(seed))


def test_cases_reach_what_they_are_for() -> None:
    """Enough ops, outputs, mutated inputs and uneven layouts are among the cases."""
    cases = [draw_case(seed) for seed in range(200)]
    calls = [step for case in cases for step in case.steps if isinstance(step, Call)]
    leaves = [step for case in cases for step in case.steps if isinstance(step, Leaf)]
    assert len({step.target for step in calls}) > 80
    assert len(calls) > 4 * len(cases)
    assert sum(any(r.mutates is not None for r in case.results) for case in cases) > 30
    assert sum(any(r.pinned is not None for r in case.results) for case in cases) > 60
    assert sum(not step.layout.is_replicated for step in leaves) > len(leaves) // 3
    assert {len(case.mesh.names) for case in cases} == {1, 2, 3}


def _product(pinned: Layout | None = None) -> Case:
    """`relu(x @ w) + b` with the summed dim sharded."""
    mesh = Mesh({"tp": 2})
    aten = torch.ops.aten
    x, w, b = torch.ones(2, 3), torch.full((3, 4), 2.0), torch.ones(4)
    y = x @ w
    return Case(
        mesh,
        (
            Leaf(x, Layout((Shard(1, 1, 3),))),
            Leaf(w, Layout((Shard(0, 1, 3),))),
            Leaf(b, Layout.replicated(mesh)),
            Call(aten.mm.default, (Ref(0), Ref(1)), {}, (y,)),
            Call(aten.relu.default, (Ref(3),), {}, (y,)),
            Call(aten.add.Tensor, (Ref(4), Ref(2)), {}, (y + 1,)),
        ),
        (Result(Ref(5), pinned=pinned), Result(Ref(4))),
    )


def test_a_right_case_checks() -> None:
    assert check(_product()) == ""
    assert check(_product(Layout((Shard(0, 1, 2),)))) == ""


def test_a_wrong_value_is_found() -> None:
    case = _product()
    last = case.steps[5]
    assert isinstance(last, Call)
    wrong = dataclasses.replace(last, values=(last.values[0] + 1,))
    assert "output 0: rank 0" in check(dataclasses.replace(case, steps=(*case.steps[:5], wrong)))


def test_a_defect_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without filling pads before a sum, a product over an uneven dim reads them."""
    monkeypatch.setattr(
        "rolemesh.passes.partition._Rewrite._mask_pad", lambda self, value, *rest: value
    )
    case = _product()
    assert "nan" in check(case)
    small = shrink(case, lambda other: "nan" in check(other))
    assert len(small.results) == 1
    assert [step.target for step in small.steps if isinstance(step, Call)] == [
        torch.ops.aten.mm.default
    ]


def test_push_back_is_part_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: PushBack, program: object) -> object:
        raise RuntimeError("reached")

    monkeypatch.setattr(random_programs.PushBack, "apply", refuse)
    assert "reached" in check(_product())
