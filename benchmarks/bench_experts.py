"""Experts as one op against the implementations of `transformers`, on the CPU.

    python benchmarks/bench_experts.py

A layer of experts (hidden 512, inner 256) of `transformers` with each implementation, for 8 tokens
and for 512, with 8 experts of which a token has 2 and with 64 of which it has 8. All run in turn in
random order on one thread, in time of that thread; ratios are medians over the rounds. The one op
must take at most as long as every other implementation, but for the noise of such a measurement;
and a rank that holds a quarter of the experts at most 0.4 of the time of all of them for 512
tokens, since it does no work for the tokens of the other ranks. Next to it is a rank that holds a
quarter of the inner features of every expert, and has work for every token.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import rolemesh
from rolemesh.lowering.composite.experts import experts_of_rank
from rolemesh.lowering.composite.gate import SWIGLU

HIDDEN, INNER = 512, 256
SIZES = ((8, 2), (64, 8))
"""Experts, and how many of them a token has."""
TOKENS = {"decode": 8, "prefill": 512}
PEERS = ("rolemesh", "grouped_mm", "batched_mm", "eager")
RANKS = 4

LIMIT = 1.05
RANK_LIMIT = 0.4


def layer(experts: int, dtype: torch.dtype) -> MixtralExperts:
    """The experts of one layer with random weights."""
    made = MixtralExperts(
        MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=experts)
    )
    for parameter in made.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.05).to(dtype)
    return made.requires_grad_(False)


def rounds(runs: Mapping[str, Callable[[], Tensor]], count: int) -> dict[str, float]:
    """Median over the rounds of each run's time relative to that of `rolemesh`."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(count):
        order = list(runs)
        random.shuffle(order)
        took = {}
        for name in order:
            started = time.thread_time()
            runs[name]()
            took[name] = time.thread_time() - started
        for name in runs:
            found[name].append(took["rolemesh"] / took[name])
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def measure(experts: int, each: int, tokens: int, dtype: torch.dtype, count: int) -> bool:
    """Print one line of ratios; returns whether a limit is missed."""
    module = layer(experts, dtype)
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    routes = torch.arange(tokens * each).reshape(tokens, each)
    ids = (routes % experts)[torch.randperm(tokens)]  # as many tokens for each expert
    weights = torch.rand(tokens, each).softmax(-1).to(dtype)

    def peer(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            module.config._experts_implementation = name
            return module(hidden, ids, weights)

        return run

    held = experts // RANKS

    def one_rank() -> Tensor:
        up, down = module.gate_up_proj[held : 2 * held], module.down_proj[held : 2 * held]
        return experts_of_rank(
            hidden, ids, weights, up, down, None, None, SWIGLU, False,
            size=experts, parts=RANKS, index=1,
        )  # fmt: skip

    halves = module.gate_up_proj.chunk(2, 1)
    columns = torch.cat([half[:, : INNER // RANKS] for half in halves], 1)
    rows = module.down_proj[:, :, : INNER // RANKS].contiguous()

    def inner_features() -> Tensor:
        found: Tensor = torch.ops.rolemesh.experts(
            hidden, ids, weights, columns, rows, None, None, SWIGLU, False
        )
        return found

    want = peer("eager")()
    torch.testing.assert_close(peer("rolemesh")(), want, rtol=2e-2, atol=2e-2)
    runs = {name: peer(name) for name in PEERS} | {"rank": one_rank, "inner": inner_features}
    if tokens > TOKENS["decode"] and experts > SIZES[0][0]:
        del runs["batched_mm"]  # it would copy a gigabyte of weights
    ratios = rounds(runs, count)
    rank, inner = 1 / ratios.pop("rank"), 1 / ratios.pop("inner")
    others = {name: ratio for name, ratio in ratios.items() if name != "rolemesh"}
    line = "  ".join(f"{name} {ratio:4.2f}" for name, ratio in others.items())
    kind = str(dtype).removeprefix("torch.")
    print(
        f"{experts:>3} experts, {tokens:>3} tokens, {kind:<8}  {line}"
        f"  one of 4 ranks {rank:4.2f}, by inner features {inner:4.2f}"
    )
    return max(others.values()) > LIMIT or (tokens == TOKENS["prefill"] and rank > RANK_LIMIT)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Experts as one op against transformers' own.")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rolemesh.integrate("transformers")
    print(f"time relative to each implementation of transformers; limits {LIMIT}, {RANK_LIMIT}")
    cases = itertools.product((torch.float32, torch.bfloat16), SIZES, TOKENS.values())
    with torch.no_grad():
        missed = [measure(*size, tokens, dtype, arguments.rounds) for dtype, size, tokens in cases]
    sys.exit(any(missed))


if __name__ == "__main__":
    main()
