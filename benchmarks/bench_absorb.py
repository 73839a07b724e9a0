"""What absorbing the up-projection of keys and values saves: operations of a rank, and time.

    python benchmarks/bench_absorb.py

A DeepSeek-V3.2-shaped model (hidden 512, real sizes of a head, latents of 512; `peers/models.py`)
with 4096 tokens in the cache. Operations of a rank are printed as a multiple of what one device
does without the pass, divided by the number of ranks:

* decode of 4 sequences: at most 1.05, with the default prices.
* prefill of 1024 tokens: at most 1.05 with the prices of ranks that share one machine, where a rank
  expands a part of the cache and gathers the rest. With the default prices, those of an
  accelerator, every rank expands all of it, because that takes less time than a gather.

Then the decode step runs on one rank, compiled by inductor with the optimising passes and without,
in turn in random order; the ratio is the median over the rounds, at most 0.5.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from peers.models import Call, build, cache_of, rewind

import rolemesh
from rolemesh.compiler.capture.tracing import Traced
from rolemesh.passes.cost import CostTable

MODEL = "deepseek_v32"
DECODE = Call(4, 1, 4096)
PREFILL = Call(1, 1024, 4096)
SHARED_MACHINE = CostTable(flops_per_byte=50.0)
"""Prices where a byte between ranks takes as long as 50 operations of one."""

FLOPS_LIMIT = 1.05
TIME_LIMIT = 0.5


def traced(call: Call) -> Traced:
    """The model's call, captured."""
    model = build(MODEL)
    cache = cache_of(model, call)
    rewind(cache, call)
    with torch.no_grad():
        ids = call.ids(model.config.vocab_size)
        return rolemesh.trace(model, ids, past_key_values=cache, use_cache=True)


def flops(rows: list[tuple[Traced, str, str, CostTable, bool]]) -> bool:
    """Print a table of operations per rank, and say whether the limits are met."""
    print("operations of a rank by those of one device / ranks")
    print(f"{'role':9} {'phase':8} {'ranks':>5} {'without':>8} {'with':>8} {'bytes':>12}")
    good = True
    for trace, role, phase, costs, limited in rows:
        one = rolemesh.shard(trace, {"tp": 1}, role, phase=phase, optimise=False)
        total = one.cost_analysis().flops
        for ranks in (2, 4):
            mesh = {"tp": ranks}
            plain = rolemesh.shard(trace, mesh, role, phase=phase, optimise=False)
            found = rolemesh.shard(trace, mesh, role, phase=phase, costs=costs)
            before, after = (
                sharded.cost_analysis().flops * ranks / total for sharded in (plain, found)
            )
            received = found.cost_analysis().bytes_received
            limit = f"limit {FLOPS_LIMIT}" if limited else "default prices"
            print(
                f"{role:9} {phase:8} {ranks:5} {before:8.3f} {after:8.3f} {received:12,}  {limit}",
                flush=True,
            )
            good &= not limited or after <= FLOPS_LIMIT
    return good


def compiled(optimise: bool) -> Callable[[], torch.Tensor]:
    """The decode step on one rank."""
    model = build(MODEL)
    cache = cache_of(model, DECODE)
    ids = DECODE.ids(model.config.vocab_size)
    options = {"mesh": {"tp": 1}, "role": "decode", "target": "inductor", "optimise": optimise}
    function = torch.compile(
        model, backend="rolemesh", fullgraph=True, dynamic=False, options=options
    )

    def step() -> torch.Tensor:
        rewind(cache, DECODE)
        logits: torch.Tensor = function(ids, past_key_values=cache, use_cache=True).logits
        return logits

    return step


def times(rounds: int) -> bool:
    """Time the step with and without the passes, and say whether the limit is met."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    steps = {"without": compiled(False), "with": compiled(True)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        torch.testing.assert_close(steps["with"](), steps["without"](), rtol=1e-3, atol=1e-3)
        for _ in range(rounds):
            for name in random.sample(list(steps), len(steps)):
                started = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - started)
    dist.destroy_process_group()
    before, after = seconds["without"], seconds["with"]
    ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
    print(
        f"decode step on one rank: without {statistics.median(before) * 1e3:.0f} ms   "
        f"with {statistics.median(after) * 1e3:.0f} ms   ratio {ratio:.3f} (limit {TIME_LIMIT})"
    )
    return ratio <= TIME_LIMIT


def main() -> int:
    """Measure, print, and say whether the limits are met."""
    parser = argparse.ArgumentParser(description="What absorbing the up-projection saves.")
    parser.add_argument("--rounds", type=int, default=10)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    decode, prefill = traced(DECODE), traced(PREFILL)
    default = CostTable()
    good = flops(
        [
            (decode, "decode", "decode", default, True),
            (decode, "pd_mixed", "decode", default, True),
            (prefill, "prefill", "prefill", SHARED_MACHINE, True),
            (prefill, "pd_mixed", "prefill", SHARED_MACHINE, True),
            (prefill, "prefill", "prefill", default, False),
            (prefill, "pd_mixed", "prefill", default, False),
        ]
    )
    return 0 if times(parsed.rounds) & good else 1


if __name__ == "__main__":
    sys.exit(main())
