"""Every role computes what the single device computes.

Unmodified models, all phases of each role, all ranks in one process: logits, every cache tensor and
the greedy tokens over several steps. Pads are NaN throughout, so a pad that is read shows.

`ROWS` is not a full product. Every value of every factor meets every value of every other factor,
and every model meets every value of every factor, in every role; a test below counts that.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.models import (
    LAYERS,
    Prompt,
    Setup,
    State,
    in_fp32,
    reference,
    run_sharded,
    start,
    traced,
)

from rolemesh.compiler.api import shard
from rolemesh.compiler.capture.tracing import Traced
from rolemesh.compiler.roles import ROLES

STEPS = 3
# fp32 sums in another order; the largest difference seen is 5e-6 on logits of size 1 to 4.
TOLERANCE = 1e-4


class Row(NamedTuple):
    """Factors of one group of tests; the numbers of ranks share its traces."""

    tokens: int
    batch: int
    attn: str
    experts: str
    ranks: tuple[int, ...]


# 24, 25 and 23 tokens are 0, 1 and p - 1 modulo each of 2, 3, 4 and 8 ranks; 3 and 1 are fewer
# tokens than ranks.
ROWS = (
    Row(24, 1, "sdpa", "batched_mm", (4, 8)),
    Row(24, 3, "eager", "grouped_mm", (2, 3)),
    Row(25, 3, "sdpa", "grouped_mm", (3, 8)),
    Row(25, 1, "eager", "batched_mm", (2, 4)),
    Row(23, 1, "sdpa", "grouped_mm", (3, 4)),
    Row(23, 3, "eager", "batched_mm", (2, 8)),
    Row(1, 1, "sdpa", "batched_mm", (2, 3)),
    Row(3, 3, "eager", "grouped_mm", (4, 8)),
)


# Two halves of the rows, each with every value of every factor.
HALVES = (ROWS[1], ROWS[3], ROWS[4], ROWS[7]), (ROWS[0], ROWS[2], ROWS[5], ROWS[6])
ROWS_OF = {
    "deepseek_v32": HALVES[0],
    "llama": HALVES[1],
    "qwen3_moe": HALVES[1],
    "gpt_oss": HALVES[0],
}


def lengths(tokens: int, ranks: int) -> set[str]:
    """What a prompt's length is to a number of ranks; one more and one less are the same for 2."""
    if tokens < ranks:
        return {"fewer than ranks"}
    named = {"even": 0, "one more": 1, "one less": ranks - 1}
    return {name for name, rest in named.items() if tokens % ranks == rest}


def test_every_pair_of_factors_is_covered() -> None:
    factors = (
        ("even", "one more", "one less", "fewer than ranks"),
        (1, 3),
        ("eager", "sdpa"),
        ("batched_mm", "grouped_mm"),
        (2, 3, 4, 8),
        tuple(LAYERS),
    )
    covered = {
        (length, row.batch, row.attn, row.experts, ranks, model)
        for model, rows in ROWS_OF.items()
        for row in rows
        for ranks in row.ranks
        for length in lengths(row.tokens, ranks)
    }
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        assert not set(itertools.product(first, second)) - {(case[i], case[j]) for case in covered}


def cases() -> Iterator[object]:
    """Every role of every row; those that share a trace are one group."""
    for model, row in ((model, row) for model, rows in ROWS_OF.items() for row in rows):
        experts = None if model == "llama" else row.experts
        group = f"{model}-{row.attn}-{experts}-B{row.batch}"
        for ranks, role in itertools.product(row.ranks, ROLES):
            yield pytest.param(
                Setup(model, row.attn, experts),
                Prompt(row.batch, row.tokens),
                ranks,
                role,
                id=f"{group}-T{row.tokens}-p{ranks}-{role}",
                marks=pytest.mark.xdist_group(group),
            )


def counts_in_python(setup: Setup) -> bool:
    """Whether the model counts tokens in a Python int, so that each decode step needs a trace."""
    return setup.model == "gpt_oss"


def decode_trace(setup: Setup, prompt: Prompt) -> Traced:
    """The trace of a decode step; one for prompts of all lengths, where it can be."""
    return traced(setup, prompt if counts_in_python(setup) else prompt._replace(tokens=5), 0)


def assert_same(got: State, want: State, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got.logits, want.logits, rtol=tolerance, atol=tolerance)
    assert torch.equal(got.tokens, want.tokens)
    assert got.length == want.length
    assert got.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        torch.testing.assert_close(
            got.tensors[name],
            tensor,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize(("setup", "prompt", "ranks", "role"), list(cases()))
def test_all_ranks_together_are_the_single_device(
    setup: Setup, prompt: Prompt, ranks: int, role: str
) -> None:
    steps = 1 if counts_in_python(setup) else STEPS
    want = reference(setup, prompt, steps)
    mesh = {"tp": ranks}
    phases = ROLES[role].phases
    if "prefill" in phases:
        prefill = shard(traced(setup, prompt), mesh, role, phase="prefill")
        state = run_sharded(prefill, *start(setup, prompt))
        assert_same(state, want[0])
    else:  # a decode node gets its cache from a prefill node
        state = State(copy.deepcopy(want[0].cache), want[0].logits)
    if "decode" in phases:
        decode = shard(decode_trace(setup, prompt), mesh, role, phase="decode")
        for step in range(1, steps + 1):
            state = run_sharded(decode, state.tokens, state.cache)
            assert_same(state, want[step])


def test_a_trace_outlives_the_building_of_other_models() -> None:
    """`transformers` keeps a registry of model classes; Dynamo would guard on its size."""
    setup, prompt = Setup("llama"), Prompt(1, 5)
    sharded = shard(traced(setup, prompt), {"tp": 2}, "prefill")
    reference(Setup("qwen3"), prompt, 0)
    assert_same(run_sharded(sharded, *start(setup, prompt)), reference(setup, prompt, 0)[0])


# ---- a coarser type ------------------------------------------------------------------------------

COARSE = [
    (Setup("llama", "sdpa", None, torch.bfloat16), Prompt(3, 23), 4),
    (Setup("llama", "eager", None, torch.bfloat16), Prompt(1, 24), 3),
    (Setup("deepseek_v32", "sdpa", "batched_mm", torch.bfloat16), Prompt(3, 23), 4),
    (Setup("deepseek_v32", "eager", "batched_mm", torch.bfloat16), Prompt(1, 24), 3),
]


def distance(x: Tensor, exact: Tensor) -> float:
    """Root of the mean square of the difference."""
    return float((x.double() - exact.double()).square().mean().sqrt())


def assert_as_close(got: State, single: State, exact: State) -> None:
    """Both round, in other places: twice the single device's distance, and an ulp of size-1 values.

    A distance is no bound of single values: where rounding makes a router or the indexer choose
    otherwise, whole rows differ, with one device as with several.
    """
    assert distance(got.logits, exact.logits) <= 2 * distance(single.logits, exact.logits) + 2**-8
    for name, tensor in exact.tensors.items():
        allowed = 2 * distance(single.tensors[name], tensor) + 2**-8
        assert distance(got.tensors[name], tensor) <= allowed, name


@pytest.mark.parametrize(
    ("setup", "prompt", "ranks", "role"),
    [
        pytest.param(*case, role, marks=pytest.mark.xdist_group(f"bf16-{case[0].model}-{case[2]}"))
        for case, role in itertools.product(COARSE, ROLES)
    ],
)
def test_bf16_is_as_close_to_fp32_as_the_single_device(
    setup: Setup, prompt: Prompt, ranks: int, role: str
) -> None:
    """Against the same weights in fp32.

    Pads are not NaN here: the bf16 matrix product of oneDNN reads into the next row for some inner
    sizes (68 for one), so that a NaN spoils the row before it.
    """
    single = reference(setup, prompt, 1)
    exact = exact_states(setup, prompt, [single[0].tokens])
    state = State(start(setup, prompt)[1], single[0].logits)
    for step, phase in enumerate(("prefill", "decode")):
        if phase not in ROLES[role].phases:
            state = State(copy.deepcopy(single[step].cache), single[step].logits)
            continue
        ids = single[0].tokens if step else start(setup, prompt)[0]
        sharded = shard(
            traced(setup, prompt, 0 if step else None), {"tp": ranks}, role, phase=phase
        )
        state = run_sharded(sharded, ids, state.cache, poison=False)
        assert_as_close(state, single[step], exact[step])


def exact_states(setup: Setup, prompt: Prompt, tokens: list[Tensor]) -> list[State]:
    """The fp32 model's states after the prompt and after each of `tokens`."""
    ids, cache = start(setup._replace(dtype=torch.float32), prompt)
    states = []
    with torch.no_grad():
        for step in [ids, *tokens]:
            logits = in_fp32(setup)(step, past_key_values=cache, use_cache=True).logits
            states.append(State(copy.deepcopy(cache), logits))
    return states
