"""Cost and memory analysis: formulas that give the numbers exactly, and sizes known by hand."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import pytest
import sympy
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from tests.models import PipelineStage, Prompt, Setup, sharded_once, traced

from rolemesh.compiler.analysis import CostAnalysis
from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.ir.placement import Owner
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.memory import MemoryAnalysis
from rolemesh.passes.symbols import BATCH, TOKENS
from rolemesh.runtime.lockstep import scatter_inputs

pytestmark = pytest.mark.xdist_group("analysis")

LLAMA = Setup("llama")
DSA = Setup("deepseek_v32", "sdpa", "batched_mm", layers=2)
RANKS = (2, 3, 4, 8)
EVEN, UNEVEN = Prompt(3, 8), Prompt(2, 13)  # 24 and 26 tokens, for which the programs are alike


class Case(NamedTuple):
    """One phase of one role."""

    setup: Setup
    role: str
    phase: str

    def sharded(self, prompt: Prompt, ranks: int) -> Sharded:
        step = None if self.phase == "prefill" else 0
        return sharded_once(self.setup, prompt, ranks, self.role, step)

    def cost(self, prompt: Prompt, ranks: int) -> CostAnalysis:
        return _cost(self, prompt, ranks)


@functools.cache
def _cost(case: Case, prompt: Prompt, ranks: int) -> CostAnalysis:
    return case.sharded(prompt, ranks).cost_analysis()


CASES = [
    Case(setup, role, phase)
    for setup, (role, phase) in itertools.product(
        (LLAMA, DSA),
        [
            ("prefill", "prefill"),
            ("pd_mixed", "prefill"),
            ("pd_mixed", "decode"),
            ("decode", "decode"),
        ],
    )
]
NAMES = [f"{case.setup.model}-{case.role}-{case.phase}" for case in CASES]


def at(cost: CostAnalysis, **sizes: int) -> list[int]:
    """The formulas of all collectives at other sizes; those not given stay."""
    given = {symbol: sizes.get(str(symbol), size) for symbol, size in cost.sizes.items()}
    return [int(entry.formula.subs(given)) for entry in cost.collectives]


def received(cost: CostAnalysis) -> list[int]:
    return [entry.record.bytes_received for entry in cost.collectives]


# ---- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("prompt", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_formulas_give_the_numbers(case: Case, prompt: Prompt) -> None:
    for ranks in RANKS:
        cost = case.cost(prompt, ranks)
        assert cost.collectives
        assert at(cost) == received(cost)
        assert cost.bytes_received == sum(received(cost))
        rest = cost.formula.subs(cost.sizes) - cost.bytes_received
        assert 0 <= rest < len(cost.collectives)  # each number is rounded down


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("ranks", RANKS)
def test_formulas_predict_another_size(case: Case, ranks: int) -> None:
    """Traced at one size, evaluated at the other: the numbers of a program traced there."""
    cost, other = case.cost(UNEVEN, ranks), case.cost(EVEN, ranks)
    kinds, others = ([entry.record.op for entry in c.collectives] for c in (cost, other))
    assert kinds == others, "the sizes lie on two sides of a flip"
    assert at(cost, B=EVEN.batch, T=EVEN.tokens if case.phase == "prefill" else 1) == received(
        other
    )


def test_the_exchange_around_the_output_projection_reads_as_in_the_roles_document() -> None:
    sharded = CASES[NAMES.index("deepseek_v32-pd_mixed-prefill")].sharded(EVEN, 4)
    formulas = {
        entry.record.op: entry.formula
        for entry in sharded.cost_analysis().collectives
        if entry.record.module == "model.layers.1.self_attn.o_proj"
    }
    p = sympy.Symbol("tp", positive=True, integer=True)
    padded = sympy.ceiling(TOKENS / p)  # tokens of a rank
    heads = 16 * sympy.ceiling(16 / p)  # of K = 16 heads x 16, whole heads of a rank
    expected = {
        "all_to_all": (p - 1) * BATCH * padded * heads * 4,
        "reduce_scatter": (p - 1) * BATCH * padded * 112 * 4,
    }
    assert formulas.keys() == expected.keys()
    for op, formula in expected.items():
        for ranks, tokens, batch in itertools.product(RANKS, (1, 12, 13), (1, 3)):
            sizes = {p: ranks, TOKENS: tokens, BATCH: batch}
            assert formulas[op].subs(sizes) == formula.subs(sizes)


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("ranks", RANKS)
def test_storage_is_what_the_fullest_rank_holds(case: Case, ranks: int) -> None:
    sharded = case.sharded(UNEVEN, ranks)
    program = sharded.program
    whole = [torch.zeros(node.meta["type"].shape, dtype=node.meta["type"].dtype)
             for node in program.placeholders]  # fmt: skip
    held = [0] * ranks
    for node, entry, locals_ in zip(
        program.placeholders, program.inputs, scatter_inputs(program, whole), strict=True
    ):
        placement = program.layout(node).placements[0]
        for rank, local in enumerate(locals_):
            owned = not isinstance(placement, Owner) or placement.rank == rank
            held[rank] += (
                local.nbytes if (owned and entry.kind.value != "user") or entry.mutated else 0
            )
    memory = sharded.memory_analysis()
    assert memory.weights + memory.caches == max(held)


def test_caches_are_counted_apart_from_weights() -> None:
    memory = CASES[NAMES.index("llama-decode-decode")].sharded(UNEVEN, 4).memory_analysis()
    keys = UNEVEN.batch * 1 * 40 * 12 * 4  # batch, heads of a rank, capacity, head dim
    assert memory.caches == 2 * (2 * keys + 8)  # keys, values and a length for each of two layers


class Chain(nn.Module):
    """Three tensors of 24 floats in a row; no more than two live at once."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.relu() + 1).sigmoid()


def test_temporaries_are_the_most_that_lives_at_once() -> None:
    memory = shard(trace(Chain(), torch.zeros(4, 6)), {"tp": 2}).memory_analysis()
    assert memory == MemoryAnalysis(weights=0, caches=0, pool=0, temporaries=2 * 24 * 4)
    assert memory.total == 192


# ---- arithmetic ----------------------------------------------------------------------------------


@functools.cache
def linear() -> Traced:
    return trace(nn.Linear(10, 8, bias=False).requires_grad_(False), torch.zeros(6, 10))


@pytest.mark.parametrize(
    ("spec", "ranks", "flops"),
    [
        ({}, 4, 2 * 6 * 10 * 8),
        ({"weight": P("tp", None)}, 4, 2 * 6 * 10 * 2),
        ({"weight": P("tp", None)}, 3, 2 * 6 * 10 * 3),  # 8 features over 3 ranks: chunks of 3
        ({"weight": P(None, "tp"), "input": P(None, "tp")}, 2, 2 * 6 * 5 * 8),
        ({"input": P("tp", None)}, 4, 2 * 2 * 10 * 8),  # 6 rows over 4 ranks: chunks of 2
    ],
)
def test_flops_of_one_matmul(spec: dict[str, P], ranks: int, flops: int) -> None:
    sharded = shard(linear(), {"tp": ranks}, annotations=spec)
    assert sharded.cost_analysis().flops == flops


def test_flops_of_attention_count_both_products() -> None:
    """Two products of 4 heads, 8 x 8 scores of 6 features each; the causal mask saves nothing."""
    ids = torch.zeros(1, 8, dtype=torch.int64)
    cost = shard(trace(PipelineStage(), ids), {"tp": 1}).cost_analysis()
    width, layers = PipelineStage.WIDTH, len(PipelineStage.NUMBERS)
    projections = 4 * 2 * 8 * width * width
    products = 2 * 2 * 4 * 8 * 8 * (width // 4)
    head = 2 * 8 * width * PipelineStage.VOCABULARY
    assert cost.flops == layers * (projections + products) + head


def test_a_rank_counts_the_rows_of_its_own_experts() -> None:
    """Every rank has the rows of all experts, and multiplies those of its own."""
    trace = traced(Setup("qwen3_moe", "sdpa", "grouped_mm"), EVEN)
    one, four = (shard(trace, {"tp": n}, "prefill").cost_analysis().flops for n in (1, 4))
    assert four * 4 == one
