"""The first calls of a new process with warm compile caches, against the hand-written model.

    python benchmarks/bench_warm.py
    python benchmarks/bench_warm.py --rounds 3 --peers rolemesh megatron

A llama-shaped model (hidden 512, 6 layers, `peers/models.py`) on 2 ranks, in fp32 over gloo, one
thread a rank: the first decode step of 8 sequences and then the first prefill of one prompt of 512
tokens, from `torch.compile`'s first call to the logits. Peers:

* `megatron`: tensor parallelism written by hand (`peers/megatron.py`);
* `rolemesh`: the same model, written for one device by the same hand, with role `pd_mixed`;
* `rolemesh:transformers`: the model of transformers instead, which Dynamo takes longer to trace;
* `dtensor` and `transformers`: that model with their tensor parallelism.

Every peer runs once to fill the caches, in a folder of this benchmark's. Then each round runs every
peer in new processes, in random order. The slowest rank's time counts; a ratio is the median over
rounds of the time by the hand-written peer's in the same round; CPU is the same of the processor
time of all ranks. Hits and misses are those of torch's caches, on rank 0: AOTAutograd's, which this
project never asks, and inductor's.

Exits 1 if `rolemesh` takes longer than the hand-written peer for both calls together.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"  # a rank is a thread; its libraries read this as they load

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers.megatron import Attention, MegatronModel, Mlp, Part
from peers.models import MODELS, build, cache_of
from peers.steps import PEERS
from torch._dynamo.utils import counters

from rolemesh.runtime.launch import run_processes

LIMIT = 1.0
BASE = "megatron"
MODEL = "llama"
RANKS = 2
PHASES = ("decode", "prefill")


class _OneRank:
    """Stands for a group of one rank."""

    def rank(self) -> int:
        """Of the one rank."""
        return 0

    def size(self) -> int:
        """One."""
        return 1


class SingleModel(MegatronModel):
    """The hand-written model for one device: the same code, less what parallelism added."""

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _whole(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.unsqueeze(1)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.table)


def rolemesh(phase: str) -> Callable[[], torch.Tensor]:
    """A first call of the single-device model through this project."""
    source, call = build(MODEL), MODELS[MODEL].calls[phase]
    whole = Part(0, 1)
    layers = [
        (Attention(layer.self_attn, whole), Mlp(layer.mlp, whole)) for layer in source.model.layers
    ]
    model = SingleModel(source, _OneRank(), layers)  # type: ignore[arg-type]
    cache = cache_of(source, call)
    ids, start = call.ids(source.config.vocab_size), torch.tensor(call.start)
    options = {"mesh": {"tp": dist.get_world_size()}, "role": "pd_mixed", "target": "inductor"}
    compiled = torch.compile(
        model, backend="rolemesh", fullgraph=True, dynamic=False, options=options
    )

    def step() -> torch.Tensor:
        with torch.no_grad():
            return compiled(ids, cache, start)

    return step


def of_peer(name: str) -> Callable[[str], Callable[[], torch.Tensor]]:
    """A first call of one of the peers of `bench_step.py`."""

    def prepared(phase: str) -> Callable[[], torch.Tensor]:
        peer = PEERS[name](MODEL, phase)
        peer.rewind()
        return peer.step

    return prepared


WARM_PEERS: Mapping[str, Callable[[str], Callable[[], torch.Tensor]]] = {
    "megatron": of_peer("megatron"),
    "rolemesh": rolemesh,
    "rolemesh:transformers": of_peer("rolemesh:pd_mixed"),
    "dtensor": of_peer("dtensor"),
    "transformers": of_peer("transformers"),
}
"""Peers by name: each prepares the first call of a phase."""


class First(NamedTuple):
    """What the first calls of one process took.

    Attributes:
        seconds: By phase.
        processor: Seconds of processor time of all ranks, both phases.
        counts: Hits and misses of the caches.
        sums: Of the logits' absolute values, by phase.
    """

    seconds: tuple[float, ...]
    processor: float
    counts: str
    sums: tuple[float, ...]


def first_calls(peer: str) -> First:
    """Run on every rank, in a new process: the first call of each phase."""
    seconds, sums, processor = [], [], 0.0
    for phase in PHASES:
        step = WARM_PEERS[peer](phase)
        dist.barrier()
        begin, used = time.perf_counter(), time.process_time()
        logits = step()
        seconds.append(time.perf_counter() - begin)
        processor += time.process_time() - used
        sums.append(logits.double().abs().sum().item())
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    work = torch.tensor(processor, dtype=torch.float64)
    dist.all_reduce(work)
    return First(tuple(slowest.tolist()), work.item(), cache_counts(), tuple(sums))


def cache_counts() -> str:
    """Hits and misses of torch's caches so far."""
    aot, inductor = counters["aot_autograd"], counters["inductor"]
    found = [
        f"AOTAutograd {aot['autograd_cache_hit']}/{aot['autograd_cache_miss']}",
        f"inductor {inductor['fxgraph_cache_hit']}/{inductor['fxgraph_cache_miss']}",
    ]
    bypassed = aot["autograd_cache_bypass"] + inductor["fxgraph_cache_bypass"]
    return ", ".join(found) + (f", bypassed {bypassed}" if bypassed else "")


def run_peer(peer: str) -> First:
    """The first calls of a peer in new processes."""
    first, *_ = run_processes("bench_warm:first_calls", RANKS, (peer,), timeout=1800)
    assert isinstance(first, tuple)
    return First(*first)


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=list(WARM_PEERS), choices=list(WARM_PEERS))
    parser.add_argument("--cache", help="folder of the caches; by default a new one")
    given = parser.parse_args()
    peers = list(dict.fromkeys([BASE, "rolemesh", *given.peers]))
    with tempfile.TemporaryDirectory() as made:
        folder = given.cache or made
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ["ROLEMESH_CACHE_DIR"] = str(Path(folder, "rolemesh"))
        cold = {peer: run_peer(peer) for peer in peers}
        for peer in peers:
            for mine, other in zip(cold[peer].sums, cold[BASE].sums, strict=True):
                if abs(mine - other) > 1e-3 * other:
                    raise ValueError(f"the logits of {peer} are not those of {BASE}")
        order = random.Random(11)
        rounds = [
            {peer: run_peer(peer) for peer in order.sample(peers, len(peers))}
            for _ in range(given.rounds)
        ]
    return report(cold, rounds)


def report(cold: Mapping[str, First], rounds: list[dict[str, First]]) -> int:
    """Print the table; returns the exit status."""
    print("| peer | cold, s | warm, s: decode | prefill | both | ratio | CPU | hits/misses, warm |")
    print("|---|---|---|---|---|---|---|---|")
    ratios = {}
    for peer in cold:
        times = [entry[peer].seconds for entry in rounds]
        shares = (sum(entry[peer].seconds) / sum(entry[BASE].seconds) for entry in rounds)
        ratios[peer] = statistics.median(shares)
        work = statistics.median(entry[peer].processor / entry[BASE].processor for entry in rounds)
        parts = [statistics.median(column) for column in zip(*times, strict=True)]
        both = statistics.median(map(sum, times))
        print(
            f"| {peer} | {sum(cold[peer].seconds):.1f} | {parts[0]:.2f} | {parts[1]:.2f} "
            f"| {both:.2f} | {ratios[peer]:.3f} | {work:.3f} | {rounds[-1][peer].counts} |"
        )
    if ratios["rolemesh"] > LIMIT:
        print(f"above {LIMIT}: rolemesh {ratios['rolemesh']:.3f}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
