"""Time of a step on 2 and 4 ranks, against tensor parallelism written by hand.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --models llama --only decode --ranks 2 --rounds 20

A llama-shaped and a qwen3_moe-shaped model (`peers/models.py`), prefill of one prompt of 512 tokens
and a decode step of 8 sequences with a cache of 512, in fp32 over gloo, one thread a rank. Peers:
tensor parallelism written by hand (`peers/megatron.py`), DTensor, transformers' own, and this
project with each role that can run the call; `--peers` may name another, the role `decode` without
`rolemesh.integrate`. All run in the same processes: every rank checks their logits against one
device, then each round runs every peer once, in random order, after a barrier. The slowest rank's
time counts. A ratio is the median over rounds of the time by the hand-written peer's in the same
round; `CPU` is the same of the processor time of all ranks, `MB` what a rank receives in a step,
`weights` what it holds, in MB.

Exits 1 if the best role takes longer than the hand-written peer for any call.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Mapping

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"  # a rank is a thread; its libraries read this as they load

from peers.rounds import Measured, ratio
from peers.steps import PEERS, Counts

from rolemesh.runtime.launch import run_processes

LIMIT = 1.0
BASE = "megatron"
SHAPES = ("llama", "qwen3_moe")
PHASES = ("prefill", "decode")


def counted(counts: Counts | None) -> tuple[str, str]:
    """MB that a rank receives, and in how many collectives."""
    if counts is None:
        return "-", "-"
    return f"{counts.received / 1e6:.2f}", str(sum(counts.collectives.values()))


def report(model: str, phase: str, ranks: int, measured: Mapping[str, Measured]) -> float:
    """Print one table row a peer.

    Returns:
        The time ratio of the best role.
    """
    base = measured[BASE]
    best = math.inf
    for peer, entry in measured.items():
        time = ratio(entry.seconds, base.seconds)
        if peer.startswith("rolemesh:"):
            best = min(best, time)
        cells = (
            model,
            phase,
            ranks,
            peer,
            f"{statistics.median(entry.seconds) * 1e3:.2f}",
            f"{time:.3f}",
            f"{ratio(entry.cpu_seconds, base.cpu_seconds):.3f}",
            *counted(entry.counts),
            f"{entry.weight_bytes / 1e6:.1f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return best


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="*", default=SHAPES, choices=SHAPES)
    parser.add_argument("--only", nargs="*", default=PHASES, choices=PHASES, help="calls")
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=20)
    peers = [peer for peer in PEERS if "without" not in peer]
    parser.add_argument("--peers", nargs="*", default=peers, choices=list(PEERS))
    given = parser.parse_args()
    missed = []
    titles = ["model", "call", "ranks", "peer", "ms", "time", "CPU", "MB", "collectives", "weights"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for model in given.models:
        for phase in given.only:
            peers = [
                peer
                for peer in PEERS
                if peer == BASE or (peer in given.peers and (phase, peer) not in _CANNOT)
            ]
            for ranks in given.ranks:
                args = (model, phase, peers, given.rounds)
                first, *_ = run_processes("peers.rounds:measure", ranks, args, timeout=3600)
                best = report(model, phase, ranks, first)  # type: ignore[arg-type]
                if best > LIMIT:
                    missed.append(f"{model} {phase} on {ranks} ranks: {best:.3f}")
    for line in missed:
        print(f"above {LIMIT}: {line}")
    return 1 if missed else 0


_CANNOT = {("decode", "rolemesh:prefill")}
"""Roles that do not run a phase."""

if __name__ == "__main__":
    sys.exit(main())
