"""All peers of one call on every rank: checked, counted, then timed in rounds of random order."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from peers.models import reference
from peers.steps import PEERS, Counts, Peer

__all__ = ["Measured", "measure", "ratio"]

_WARM_UP = 3


@dataclass(frozen=True)
class Measured:
    """What one peer took, on the rank that reports.

    Attributes:
        seconds: Of the slowest rank, by round.
        cpu_seconds: Processor time of all threads of all ranks, by round: what the step costs
            where ranks wait for each other or share cores with other processes.
        weight_bytes: Bytes of weights that the rank holds.
        counts: What a step does on the rank; None if nothing can tell.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    weight_bytes: int
    counts: Counts | None


def measure(
    name: str, phase: str, peers: Sequence[str], rounds: int, tolerance: float = 2e-3
) -> dict[str, Measured]:
    """Run on every rank: build the peers, check their logits, time them.

    Args:
        name: A model.
        phase: A call of it.
        peers: Names of peers.
        rounds: Number of rounds; in each one every peer runs once.
        tolerance: Largest difference of a logit, whose standard deviation is 1, from one device's.

    Raises:
        ValueError: If a peer's logits are not those of one device.
    """
    wanted = reference(name, phase)
    made: dict[str, Peer] = {}
    for peer in peers:
        made[peer] = PEERS[peer](name, phase)
        for _ in range(_WARM_UP):
            made[peer].rewind()
            logits = made[peer].step()
        error = (logits - wanted).abs().max().item()
        if logits.shape != wanted.shape or not error < tolerance:
            raise ValueError(f"{peer} is off by {error:g} on {name} {phase}")
    seconds: dict[str, list[float]] = {peer: [] for peer in peers}
    cpu: dict[str, list[float]] = {peer: [] for peer in peers}
    order = random.Random(11)
    for _ in range(rounds):
        for peer in order.sample(list(peers), len(peers)):
            made[peer].rewind()
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            made[peer].step()
            seconds[peer].append(time.perf_counter() - began)
            cpu[peer].append(time.process_time() - worked)
    slowest = torch.tensor([seconds[peer] for peer in peers], dtype=torch.float64)
    work = torch.tensor([cpu[peer] for peer in peers], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    dist.all_reduce(work)
    return {
        peer: Measured(times.tolist(), spent.tolist(), *_counted(made[peer]))
        for peer, times, spent in zip(peers, slowest, work, strict=True)
    }


def _counted(peer: Peer) -> tuple[int, Counts | None]:
    peer.rewind()
    return peer.weight_bytes(), None if peer.count is None else peer.count()


def ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of one peer's time by the base's in the same round."""
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))
