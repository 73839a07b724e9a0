"""Host time of a compiled call: rolemesh on a mesh of one rank against plain inductor.

    python benchmarks/bench_host.py

A decode step of a small llama-shaped model (hidden 256, 4 layers, 8/4 heads, batch 1, 256 tokens of
cache), compiled by `torch.compile` with inductor, once as it is and once through the backend on a
mesh of one rank, target inductor. Nothing is exchanged, so what differs is work of the host. Both
run in turn in random order in one process; the ratio is the median over the rounds. At most 1.05 of
the whole call, in time of the calling thread: what other processes do meanwhile does not count.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist

from rolemesh.compiler.models.cases import Case, load_case

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 2048,
}
CAPACITY = 256
CALLS = 20
"""Calls of a round, which its time is the mean of."""

LIMIT = 1.05


def llama() -> Case:
    """The model and its calls."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(CONFIG))
        return load_case(f"hf:llama:{path}", tokens=13, batch=1, max_len=CAPACITY)


class Peer:
    """One way to compile the model, with a cache of its own."""

    def __init__(self, case: Case, compile_model: Callable[[torch.nn.Module], object]) -> None:
        self.model = copy.deepcopy(case.model)
        self.args, self.kwargs = case.fresh().phases["decode"]
        self.cache = self.kwargs["past_key_values"]
        self.compiled = compile_model(self.model)

    def logits(self) -> torch.Tensor:
        """One call."""
        found: torch.Tensor = self.compiled(*self.args, **self.kwargs).logits  # type: ignore[operator]
        return found

    def seconds(self) -> float:
        """Mean time of a call."""
        for layer in self.cache.layers:  # type: ignore[attr-defined]
            layer.cumulative_length.zero_()
        started = time.thread_time()
        for _ in range(CALLS):
            self.logits()
        return (time.thread_time() - started) / CALLS


def main() -> int:
    """Measure, print, and say whether the limit is met."""
    parser = argparse.ArgumentParser(description="Host time of a compiled call on one rank.")
    parser.add_argument("--rounds", type=int, default=60)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    case = llama()
    options = {"mesh": {"tp": 1}, "role": "decode", "target": "inductor"}
    peers = {
        "inductor": Peer(case, lambda model: torch.compile(model, fullgraph=True, dynamic=False)),
        "rolemesh": Peer(
            case,
            lambda model: torch.compile(
                model, backend="rolemesh", fullgraph=True, dynamic=False, options=options
            ),
        ),
    }
    with torch.no_grad():
        first = [peer.logits() for peer in peers.values()]
        torch.testing.assert_close(*first)
        for peer in peers.values():
            peer.seconds()
        times: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(parsed.rounds):
            for name in random.sample(list(peers), len(peers)):
                times[name].append(peers[name].seconds())
    dist.destroy_process_group()
    plain, ours = times["inductor"], times["rolemesh"]
    ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
    more = statistics.median(a - b for a, b in zip(ours, plain, strict=True))
    print(
        f"inductor {statistics.median(plain) * 1e6:.0f} us   "
        f"rolemesh {statistics.median(ours) * 1e6:.0f} us   difference {more * 1e6:+.0f} us   "
        f"ratio {ratio:.3f} (limit {LIMIT})"
    )
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
