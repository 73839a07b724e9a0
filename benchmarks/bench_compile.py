"""Cold compile of a deep model: capture, passes and lowering, and how they grow with depth.

Builds DeepSeek-V3.2 with its real sizes and no storage for its weights, at 8 and at 61 layers, and
compiles prefill and decode of `pd_mixed` for 4 ranks up to the graphs of rank 0: capture (Dynamo
and AOTAutograd, repeated layers once), all passes, and lowering (binding to a rank and to the eager
target). Each size has a process of its own, as a cold compile has. Prints CPU seconds per part, and
the growth.

Run: `python benchmarks/bench_compile.py`. Exits 1 above 15 s for 61 layers in all, above 4 s for
their passes, or if 61 layers take 2 times as long as 8.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

LAYERS = (8, 61)
RANKS = 4
BATCH, PROMPT, CAPACITY = 4, 512, 4096
LIMIT_SECONDS, LIMIT_PASSES, LIMIT_GROWTH = 15.0, 4.0, 2.0


def measure(layers: int) -> dict[str, float]:
    """CPU seconds of each part, prefill and decode together."""
    import torch
    from transformers import DeepseekV32Config, StaticCache

    import rolemesh
    from rolemesh.compiler.engine.ghosts import build_model
    from rolemesh.lowering.bind import bind
    from rolemesh.lowering.eager import lower_eager
    from rolemesh.lowering.signature import Signature

    config = DeepseekV32Config(
        num_hidden_layers=layers,
        mlp_layer_types=["dense"] * 3 + ["sparse"] * (layers - 3),
    )
    model = build_model(config, torch.bfloat16, torch.device("cpu"), ghosts=True)
    model.eval()
    cache = StaticCache(config=config, max_cache_len=CAPACITY)
    for layer in cache.layers:
        kind = {"dtype": torch.bfloat16}
        layer.lazy_initialization(
            torch.empty(BATCH, 1, 1, config.kv_lora_rank, **kind),
            torch.empty(BATCH, 1, 1, config.qk_rope_head_dim, **kind),
        )
        layer.lazy_initialization_indexer(torch.empty(BATCH, 1, config.index_head_dim, **kind))
    seconds = dict.fromkeys(("capture", "passes", "lowering"), 0.0)
    nodes = 0
    for phase, tokens in (("prefill", PROMPT), ("decode", 1)):
        ids = torch.zeros(BATCH, tokens, dtype=torch.long)
        gc.collect()
        with torch.no_grad():
            begin = time.process_time()
            traced = rolemesh.trace(model, ids, past_key_values=cache, use_cache=True)
            captured = time.process_time()
            sharded = rolemesh.shard(traced, {"tp": RANKS}, role="pd_mixed", phase=phase)
            partitioned = time.process_time()
            module = bind(sharded.program, 0, {"tp": "tp"})
            lower_eager(module, [], Signature.of(sharded.program, 0))
            lowered = time.process_time()
        nodes += len(sharded.program.graph.nodes)
        seconds["capture"] += captured - begin
        seconds["passes"] += partitioned - captured
        seconds["lowering"] += lowered - partitioned
    return {**seconds, "nodes": nodes}


def in_fresh_process(layers: int) -> Mapping[str, float]:
    """`measure` in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--layers", str(layers)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def total(seconds: Mapping[str, float]) -> float:
    """Seconds of all parts."""
    return seconds["capture"] + seconds["passes"] + seconds["lowering"]


def report(found: Mapping[int, Mapping[str, float]]) -> int:
    """Print the table; 1 if a limit is exceeded."""
    print(
        f"{'layers':>6}  {'nodes':>6}  {'capture':>8}  {'passes':>7}  {'lowering':>8}  {'all':>6}"
    )
    for layers, seconds in found.items():
        print(
            f"{layers:>6}  {seconds['nodes']:>6.0f}  {seconds['capture']:>8.2f}  "
            f"{seconds['passes']:>7.2f}  {seconds['lowering']:>8.2f}  {total(seconds):>6.2f}"
        )
    few, many = (found[layers] for layers in LAYERS)
    growth = total(many) / total(few)
    print(f"61 layers: {total(many):.1f} s in all (limit {LIMIT_SECONDS:.0f})")
    print(f"61 layers: {many['passes']:.1f} s of passes (limit {LIMIT_PASSES:.0f})")
    print(f"growth from 8 to 61 layers: {growth:.2f} times (limit {LIMIT_GROWTH:.0f})")
    kept = total(many) <= LIMIT_SECONDS and many["passes"] <= LIMIT_PASSES and growth < LIMIT_GROWTH
    return 0 if kept else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, help="measure one size in this process, as JSON")
    layers = parser.parse_args(arguments).layers
    if layers is not None:
        print(json.dumps(measure(layers)))
        return 0
    return report({layers: in_fresh_process(layers) for layers in LAYERS})


if __name__ == "__main__":
    sys.exit(main())
