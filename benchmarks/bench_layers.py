"""The inductor target on a deep model: layers compiled once, against the whole graph.

    python benchmarks/bench_layers.py

A llama-shaped model (hidden 256, 8/4 heads, composite attention) on a mesh of one rank, with 8 and
24 layers: prefill of 300 tokens, and a decode step of 8 sequences with a cache of 512. Compiled
both ways in one process with torch's caches off, in processor time, that of the C++ compilers
included. Steps run in turn in random order; their ratio is the median over the rounds, in time of
the calling thread. Exits 1 if layers compiled once take more than 0.7 of the time to compile 24 of
them, if 24 take 2 times as long as 8, or if a step takes 1.1 times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch._inductor.config
import torch.distributed as dist

import rolemesh
from rolemesh.compiler.api import Compiled
from rolemesh.compiler.models.cases import Case, load_case

LAYERS = (8, 24)
CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
}
SIZES = {"prefill": (1, 300), "decode": (8, 13)}
CAPACITY = 512
REPEATS = {"once": 2, "whole": 1000}
LIMIT_COMPILE, LIMIT_GROWTH, LIMIT_STEP = 0.7, 2.0, 1.1


def llama(layers: int, phase: str) -> Case:
    """The model and its calls."""
    batch, tokens = SIZES[phase]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        name = f"hf:llama:{path}"
        return load_case(name, tokens=tokens, batch=batch, max_len=CAPACITY, attn="rolemesh")


class Way:
    """The model compiled one way, with a cache of its own."""

    def __init__(self, case: Case, phase: str, repeats: int) -> None:
        self.args, self.kwargs = case.fresh().phases[phase]
        traced = rolemesh.trace(case.model, *self.args, **self.kwargs)
        sharded = rolemesh.shard(traced, {"tp": 1}, role="pd_mixed", phase=phase)
        started = sum(os.times()[:4])  # with that of the compilers it starts
        lowered = rolemesh.lower(sharded, target="inductor", options={"repeats": repeats})
        self.compiled: Compiled = lowered.compile()
        self.compile_seconds = sum(os.times()[:4]) - started

    def step(self) -> tuple[float, torch.Tensor]:
        """Seconds of one call, and its logits."""
        for layer in self.kwargs["past_key_values"].layers:  # type: ignore[attr-defined]
            layer.cumulative_length.zero_()
        started = time.thread_time()
        output = self.compiled(*self.args, **self.kwargs)
        return time.thread_time() - started, output.logits  # type: ignore[attr-defined]


def measure(layers: int, phase: str, rounds: int) -> tuple[dict[str, float], float]:
    """Seconds to compile each way, and the ratio of steps."""
    case = llama(layers, phase)
    ways = {name: Way(case, phase, repeats) for name, repeats in REPEATS.items()}
    first = [way.step()[1] for way in ways.values()]
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-4)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            times[name].append(ways[name].step()[0])
    ratio = statistics.median(a / b for a, b in zip(times["once"], times["whole"], strict=True))
    return {name: way.compile_seconds for name, way in ways.items()}, ratio


def main() -> int:
    """Measure, print, and say whether the limits are met."""
    parser = argparse.ArgumentParser(description="Layers compiled once by inductor.")
    parser.add_argument("--rounds", type=int, default=40)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    rolemesh.integrate("transformers")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    met = True
    with torch.no_grad():
        for phase in SIZES:
            once: list[float] = []
            for layers in LAYERS:
                seconds, ratio = measure(layers, phase, parsed.rounds)
                once.append(seconds["once"])
                print(
                    f"{phase:8} {layers:3} layers   compile: once {seconds['once']:5.1f} s   "
                    f"whole {seconds['whole']:5.1f} s   step: once / whole {ratio:.2f}",
                    flush=True,
                )
                met = met and ratio <= LIMIT_STEP
            growth = once[-1] / once[0]
            print(f"{phase:8} from {LAYERS[0]} to {LAYERS[-1]} layers: {growth:.2f} times")
            met = met and growth <= LIMIT_GROWTH and once[-1] <= LIMIT_COMPILE * seconds["whole"]
    dist.destroy_process_group()
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
