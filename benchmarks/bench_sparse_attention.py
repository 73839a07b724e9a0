"""Sparse attention against dense attention, by length of the context, on the CPU.

    python benchmarks/bench_sparse_attention.py

Absorbed MLA: 16 query heads, one head of 512 latents as keys and values, with a tail of 64
features, and 512 keys named by each query. The last 128 queries of a prompt, and one query of each
of 8 sequences, attend to 2048, 4096 and 8192 keys: sparse attention to those they name, dense
attention to all that come before. All run in turn in random order on one thread, in time of that
thread; ratios are medians over the rounds.

Sparse attention is O(queries * named): in float32, from 2048 to 8192 keys its time may grow by 1.25
at most, where that of dense attention grows fourfold, and it must take at most 0.6 of the time of
dense attention at 4096 keys, and 0.35 at 8192. In bfloat16 a prompt with 2048 keys is still faster
dense on a machine with matrix units, and the op computes it so.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rolemesh.lowering.composite.define import define_composite_ops

HEADS, LATENT, ROTARY, NAMED = 16, 512, 64, 512
CONTEXTS = (2048, 4096, 8192)
CALLS = {"prefill": (1, 128), "decode": (8, 1)}
"""Sequences, and queries of each."""
SCALE = 0.05

GROWTH_LIMIT = 1.25
LIMITS = {4096: 0.6, 8192: 0.35}


def runs(batch: int, rows: int, keys: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Sparse and dense attention over one context; they are equal where all are named."""
    query, query_tail = (torch.randn(batch, HEADS, rows, n).to(dtype) for n in (LATENT, ROTARY))
    key, key_tail = (torch.randn(batch, 1, keys, n).to(dtype) for n in (LATENT, ROTARY))
    tails = {"query_tail": query_tail, "key_tail": key_tail}
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows).expand(batch, 1, -1, -1)
    scores = torch.rand(batch, rows, keys).masked_fill(~mask[:, 0], -1)
    indices = scores.topk(NAMED, -1).indices.int()
    ops = torch.ops.rolemesh
    return {
        "sparse": lambda: ops.sparse_attention(query, key, key, indices, mask, SCALE, **tails),
        "dense": lambda: ops.attention(query, key, key, mask, SCALE, **tails),
    }


def rounds(
    cases: Mapping[tuple[str, int], Callable[[], Tensor]], count: int
) -> dict[tuple[str, int], list[float]]:
    """Seconds of each case in each round."""
    took: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for run in cases.values():
        run()
    for _ in range(count):
        order = list(cases)
        random.shuffle(order)
        for case in order:
            started = time.thread_time()
            cases[case]()
            took[case].append(time.thread_time() - started)
    return took


def measure(call: str, dtype: torch.dtype, count: int) -> bool:
    """Print the lines of one kind of call; returns whether a limit is missed."""
    cases = {
        (name, keys): run
        for keys in CONTEXTS
        for name, run in runs(*CALLS[call], keys, dtype).items()
    }
    took = rounds(cases, count)

    def ratio(above: tuple[str, int], below: tuple[str, int]) -> float:
        pairs = zip(took[above], took[below], strict=True)
        return statistics.median(a / b for a, b in pairs)

    missed = False
    for keys in CONTEXTS:
        relative = ratio(("sparse", keys), ("dense", keys))
        growth = {name: ratio((name, keys), (name, CONTEXTS[0])) for name in ("sparse", "dense")}
        kind = str(dtype).removeprefix("torch.")
        print(
            f"{call:<8} {kind:<8} {keys:>5} keys  sparse {growth['sparse']:4.2f}"
            f"  dense {growth['dense']:4.2f}  sparse / dense {relative:4.2f}"
        )
        slow = growth["sparse"] > GROWTH_LIMIT or relative > LIMITS.get(keys, float("inf"))
        missed |= dtype is torch.float32 and slow
    return missed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Sparse attention against dense attention.")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    define_composite_ops()
    print(f"{NAMED} named keys; time relative to {CONTEXTS[0]} keys, and to dense attention")
    kinds = itertools.product((torch.float32, torch.bfloat16), CALLS)
    missed = [measure(call, dtype, arguments.rounds) for dtype, call in kinds]
    sys.exit(any(missed))


if __name__ == "__main__":
    main()
