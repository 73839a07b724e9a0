"""Gates of mixtures of experts: the same experts and weights, or left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, graph_text, hits
from torch import Tensor

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GATE = {"moe_gating_top_k": 1}


def softmax_gate(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, experts = x.softmax(-1, dtype=F32).topk(k, dim=-1)
    return weights, experts


def renormalised(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, experts = softmax_gate(x, k)
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), experts


def experts_alone(x: Tensor, k: int) -> tuple[Tensor, ...]:
    return (softmax_gate(x, k)[1] + 1,)


def weights_alone(x: Tensor, k: int) -> tuple[Tensor, ...]:
    return (softmax_gate(x, k)[0] * 2,)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (5, 5), (300, 1)])
@pytest.mark.parametrize("gate", [softmax_gate, renormalised, experts_alone, weights_alone])
def test_softmax(gate: Callable[..., object], experts: int, k: int, dtype: torch.dtype) -> None:
    assert hits(lambda x: gate(x, k), f(7, experts, dtype=dtype)) == GATE


def sigmoid_gate(**change: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The gate of DeepSeek-V3 for 16 experts in 4 groups, but for what is given."""
    o: dict[str, Any] = {
        "scores": torch.sigmoid,
        "choice": lambda scores, bias: scores + bias,
        "two": lambda groups: groups.topk(2, dim=-1)[0],
        "totals": lambda pairs: pairs.sum(-1),
        "best": lambda totals: totals.topk(2, dim=-1, sorted=False)[1],
        "marks": lambda totals, best: torch.zeros_like(totals).scatter(1, best, 1),
        "spread": lambda marks: marks[..., None].expand(-1, 4, 4).reshape(-1, 16).bool(),
        "kept": lambda choice, mask: choice.masked_fill(~mask, -math.inf),
        "chosen": lambda kept: kept.topk(3, dim=-1, sorted=False)[1],
        "picked": lambda scores, chosen: scores.gather(1, chosen),
        "shares": lambda picked: picked / (picked.sum(-1, keepdim=True) + 1e-20),
        "scaled": lambda shares: shares * 2.5,
        "more": lambda scores, chosen, picked: (),
    }
    o |= change

    def gate(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        scores = o["scores"](x)
        choice = kept = o["choice"](scores, bias)
        if o["best"] is not None:
            totals = o["totals"](o["two"](choice.view(-1, 4, 4)))
            mask = o["spread"](o["marks"](totals, o["best"](totals)))
            kept = o["kept"](choice, mask)
        chosen = o["chosen"](kept)
        picked = o["picked"](scores, chosen)
        weights = o["scaled"](o["shares"](picked))
        # The order of what is chosen is free: sorted, both forms agree.
        order = chosen.argsort(-1)
        more = o["more"](scores, chosen, picked)
        return chosen.gather(1, order), weights.gather(1, order), *more

    return gate


def inputs(dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return f(9, 16, dtype=dtype), f(16, dtype=dtype, seed=1) / 4


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"best": None},
        {"best": None, "choice": lambda scores, bias: scores},
        {"choice": lambda scores, bias: bias + scores},
        {"choice": lambda scores, bias: scores},
        {"scaled": lambda shares: shares},
        {"best": lambda totals: totals.topk(1)[1], "scaled": lambda shares: shares},
        {"marks": lambda totals, best: torch.zeros(9, 4).to(totals.dtype).scatter(-1, best, 1)},
        {"kept": lambda choice, mask: choice.masked_fill(mask.logical_not(), -math.inf)},
    ],
)
def test_sigmoid(change: dict[str, Any]) -> None:
    assert hits(sigmoid_gate(**change), *inputs()) == GATE


@pytest.mark.parametrize(
    "change",
    [
        {"scores": torch.tanh},
        {"scores": lambda x: x},
        {"choice": lambda scores, bias: torch.add(scores, bias, alpha=2)},
        {"choice": lambda scores, bias: scores * bias},
        {"choice": lambda scores, bias: scores + bias[:1]},
        {"choice": lambda scores, bias: scores + 0.5},
        {"two": lambda groups: groups.topk(3, dim=-1)[0]},
        {
            "two": lambda groups: groups.topk(2, dim=1)[0],
            "totals": lambda pairs: pairs.sum(1),
        },
        {"two": lambda groups: groups.topk(2, dim=-1, largest=False)[0]},
        {"totals": lambda pairs: pairs.amax(-1)},
        {"totals": lambda pairs: pairs.mean(-1)},
        {"best": lambda totals: totals.topk(2, dim=-1, largest=False)[1]},
        {"marks": lambda totals, best: torch.ones_like(totals).scatter(1, best, 1)},
        {"marks": lambda totals, best: torch.zeros_like(totals).scatter(1, best, 0)},
        {"spread": lambda marks: marks[:, None].expand(-1, 4, 4).reshape(-1, 16).bool()},
        {"kept": lambda choice, mask: choice.masked_fill(~mask, 0.0)},
        {"kept": lambda choice, mask: choice.masked_fill(mask, -math.inf)},
        {"chosen": lambda kept: kept.topk(3, dim=-1, largest=False)[1]},
        {"chosen": lambda kept: kept.topk(9, dim=-1)[1]},
        {"picked": lambda scores, chosen: (scores * 2).gather(1, chosen)},
        {"shares": lambda picked: picked},
        {"shares": lambda picked: picked / (picked.sum(0, keepdim=True) + 1e-20)},
        {"shares": lambda picked: picked / picked.sum(-1, keepdim=True)},
        {"shares": lambda picked: picked / (picked.amax(-1, keepdim=True) + 1e-20)},
        {"more": lambda scores, chosen, picked: (scores,)},
        {"more": lambda scores, chosen, picked: (picked.sum(-1),)},
    ],
)
def test_near_misses_stay(change: dict[str, Any]) -> None:
    forms = both_forms(sigmoid_gate(**change), *inputs())
    assert not any(forms.made.values())
    assert graph_text(forms.after.graph) == graph_text(forms.before.graph)


def test_rounded_scores_stay() -> None:
    x, bias = inputs(BF16)
    assert hits(sigmoid_gate(), x, bias) == {}
    assert hits(sigmoid_gate(), x, bias.float()) == {}
    assert hits(sigmoid_gate(), x.float(), bias) == {}
    assert hits(lambda x: tuple(x.softmax(-1).topk(2)), x) == {}


def test_softmax_that_is_needed_or_of_other_shape_stays() -> None:
    def needed(x: Tensor) -> tuple[Tensor, ...]:
        scores = x.softmax(-1)
        return *scores.topk(2), scores

    assert hits(needed, f(7, 8)) == {}
    assert hits(lambda x: tuple(x.softmax(-1).topk(2)), f(3, 7, 8)) == {}
    assert hits(lambda x: tuple(x.softmax(0).topk(2)), f(7, 8)) == {}
    assert hits(lambda x: tuple(x.softmax(-1).topk(2, 0)), f(7, 8)) == {}
    assert hits(lambda x: tuple(x.softmax(-1).topk(2, largest=False)), f(7, 8)) == {}
    assert hits(lambda x: tuple(x.log_softmax(-1).topk(2)), f(7, 8)) == {}


def test_documented_numbers_of_experts() -> None:
    def gate(x: Tensor) -> tuple[Tensor, ...]:
        return softmax_gate(x, 2)

    assert hits(gate, f(3, 2048)) == GATE
    assert hits(gate, f(3, 2049)) == {}
    assert hits(gate, f(3, 2049), within_limits=False) == GATE


def grouped(groups: int, each: int) -> Callable[..., tuple[Tensor, ...]]:
    experts = groups * each

    def gate(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        scores = x.sigmoid()
        choice = scores + bias
        totals = choice.view(-1, groups, each).topk(2, dim=-1)[0].sum(-1)
        marks = torch.zeros_like(totals).scatter(1, totals.topk(2)[1], 1)
        mask = marks[..., None].expand(-1, groups, each).reshape(-1, experts).bool()
        chosen = choice.masked_fill(~mask, -math.inf).topk(2)[1]
        picked = scores.gather(1, chosen)
        return chosen, picked / (picked.sum(-1, keepdim=True) + 1e-20)

    return gate


@pytest.mark.parametrize(
    ("groups", "each", "within"), [(8, 3, True), (8, 2, False), (64, 32, True), (65, 3, False)]
)
def test_documented_groups(groups: int, each: int, within: bool) -> None:
    given = f(3, groups * each), f(groups * each, seed=1)
    assert hits(grouped(groups, each), *given) == (GATE if within else {})
    assert hits(grouped(groups, each), *given, within_limits=False) == GATE


def test_text(golden: Callable[[str, str], None]) -> None:
    forms = both_forms(grouped(4, 4), *inputs())
    before, after = graph_text(forms.before.graph), graph_text(forms.after.graph)
    golden("moe_gating", f"{before}\n\n-- fused\n\n{after}")
