"""DeepSeek-V3.2 against tensor parallelism of the same model, written by hand.

    python benchmarks/bench_deepseek.py
    python benchmarks/bench_deepseek.py --ranks 4 --only decode --rounds 5

The head structure of DeepSeek-V3.2 (latents of 512, heads of 128 + 64 and 128, an indexer) with 16
heads, hidden size 512 and 3 layers (`peers/models.py`): prefill of the last 1,024 tokens of a
context of 4,096 and a decode step of 4 sequences of 4,096, each query with its best 256 keys, in
fp32 over gloo, one thread a rank. The hand-written peer (`peers/megatron_latent.py`) works on the
latents and on the picked keys alone, too. Rounds are those of `bench_step.py`; FLOPs, bytes and
collectives are of one rank, and what it really ran.

Exits 1 unless

* prefill of roles `prefill` and `pd_mixed` takes total / ranks FLOPs, within 5 %, where the total
  is the same program's on one rank;
* attention of a layer has the collectives and at most the bytes of docs/roles.md: `prefill` one
  and the weights', `pd_mixed` in decode three, `decode` one (two a layer in all).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"  # a rank is a thread; its libraries read this as they load

import torch
from peers.models import MODELS, build
from peers.rounds import Measured, ratio
from transformers import CONFIG_MAPPING

from rolemesh.compiler.api import Sharded, Traced, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.integrate import IMPLEMENTATION, integrate
from rolemesh.compiler.models.cases import static_cache
from rolemesh.runtime.launch import run_processes

NAME = "deepseek_v32"
BASE = "megatron"
ROLES = {"prefill": ("prefill", "pd_mixed"), "decode": ("decode", "pd_mixed")}
FLOPS_WITHIN = 0.05
BYTES = 4
"""Bytes of an element."""
TOLERANCE = 2e-2
"""Of logits: where two keys score alike, rounding decides which one a query gets."""


def traced_call(phase: str) -> Traced:
    """The call as captured, without storage."""
    call = MODELS[NAME].calls[phase]
    integrate("transformers")
    with torch.device("meta"), torch.no_grad():
        model = build(NAME, IMPLEMENTATION)
        cache = static_cache(model, call.batch, call.cache)
        ids = torch.zeros(call.batch, call.tokens, dtype=torch.int64)
        return trace(model, ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


def attention_traffic(sharded: Sharded) -> dict[int, tuple[Counter[str], int]]:
    """By layer, the collectives of its attention and the bytes that a rank receives in them."""
    kinds: dict[int, Counter[str]] = defaultdict(Counter)
    received: Counter[int] = Counter()
    for entry in sharded.cost_analysis().collectives:
        found = re.search(r"layers\.(\d+)\.self_attn", entry.record.module)
        if found:
            layer = int(found[1])
            kinds[layer][entry.record.op] += 1
            received[layer] += entry.record.bytes_received
    return {layer: (kinds[layer], received[layer]) for layer in kinds}


def allowed(role: str, phase: str, ranks: int) -> tuple[dict[str, int], float]:
    """What docs/roles.md says of a layer's attention: collectives, and bytes that a rank receives.

    Its letters: C what is cached per token, K the width into the output projection, D the hidden
    size, Q the elements of the query up-projection, T the tokens, f the share of other ranks.
    """
    config, call = CONFIG_MAPPING[NAME](**MODELS[NAME].fields), MODELS[NAME].calls[phase]
    cached = config.kv_lora_rank + config.qk_rope_head_dim + config.index_head_dim
    width, hidden = config.num_attention_heads * config.v_head_dim, config.hidden_size
    query = config.num_attention_heads * config.qk_head_dim * config.q_lora_rank
    tokens, share = call.batch * call.tokens, (ranks - 1) / ranks
    keys = share * tokens * cached
    moved = {
        ("prefill", "prefill"): ({"all_gather": 1, "broadcast": 2}, keys + query + width * hidden),
        ("pd_mixed", "prefill"): ({"all_gather": 2}, keys + share * width * hidden),
        ("pd_mixed", "decode"): (
            {"all_gather": 1, "all_to_all": 1, "reduce_scatter": 1},
            keys + share * (tokens / ranks * width + tokens * hidden),
        ),
        ("decode", "decode"): ({"all_reduce": 1}, 2 * share * tokens * hidden),
    }
    kinds, elements = moved[role, phase]
    return kinds, elements * BYTES


def check(traced: Traced, phase: str, ranks: int) -> list[str]:
    """What does not hold of the programs of a phase."""
    wrong = []
    for role in ROLES[phase]:
        where = f"{role} {phase} on {ranks} ranks"
        total = shard(traced, {"tp": 1}, role).cost_analysis().flops
        sharded = shard(traced, {"tp": ranks}, role)
        flops = sharded.cost_analysis().flops
        print(f"{where}: {flops / 1e9:.3f} GFLOP a rank, {flops * ranks / total:.4f} of total / p")
        if phase == "prefill" and abs(flops * ranks / total - 1) > FLOPS_WITHIN:
            wrong.append(f"{where}: FLOPs are {flops * ranks / total:.3f} of total / p")
        kinds, most = allowed(role, phase, ranks)
        for layer, (found, received) in attention_traffic(sharded).items():
            print(f"  attention {layer}: {dict(found)}, {received:,} of {most:,.0f} bytes")
            if found != kinds or received > most:
                wrong.append(f"{where}, attention {layer}: {dict(found)}, {received:,} bytes")
    return wrong


def report(phase: str, ranks: int, measured: Mapping[str, Measured]) -> None:
    """Print one table row a peer."""
    base = measured[BASE]
    assert base.counts is not None
    for peer, entry in measured.items():
        counts = entry.counts
        assert counts is not None
        cells = (
            phase,
            ranks,
            peer,
            f"{statistics.median(entry.seconds) * 1e3:.1f}",
            f"{ratio(entry.seconds, base.seconds):.3f}",
            f"{ratio(entry.cpu_seconds, base.cpu_seconds):.3f}",
            f"{counts.received / base.counts.received:.3f}",
            f"{counts.flops / base.counts.flops:.3f}",
            f"{counts.flops / 1e9:.2f}",
            f"{counts.received / 1e6:.2f}",
            sum(counts.collectives.values()),
            f"{entry.weight_bytes / 1e6:.1f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=list(ROLES), choices=list(ROLES), help="calls")
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=15, help="0: only what needs no run")
    given = parser.parse_args()
    wrong = []
    for phase in given.only:
        traced = traced_call(phase)
        for ranks in given.ranks:
            wrong += check(traced, phase, ranks)
    if given.rounds:
        print(
            "ratios to the hand-written peer, then numbers of one rank (MB received, MB of weights)"
        )
        titles = [
            "call",
            "ranks",
            "peer",
            "ms",
            "time",
            "CPU",
            "bytes",
            "FLOPs",
            "GFLOP",
            "MB",
            "collectives",
            "weights",
        ]
        print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for phase in given.only if given.rounds else ():
        peers = [BASE, *(f"rolemesh:{role}" for role in ROLES[phase])]
        for ranks in given.ranks:
            args = (NAME, phase, peers, given.rounds, TOLERANCE)
            first, *_ = run_processes("peers.rounds:measure", ranks, args, timeout=3600)
            report(phase, ranks, first)  # type: ignore[arg-type]
    for line in wrong:
        print(f"wrong: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
