"""Cold compile of a deep model: capture, passes and lowering, and how they grow with depth.

Builds DeepSeek-V3.2 with its real sizes and no storage for its weights, at 8 and at 61 layers, and
compiles prefill and decode of `pd_mixed` for 4 ranks up to the graphs of rank 0: capture (Dynamo
and AOTAutograd, repeated layers once), all passes, and lowering (binding to a rank and to the eager
target). Each size has a process of its own, as a cold compile has. Prints CPU seconds per part, and
the growth.

With `--target ge`, lowering is to GE graphs (`lower_ge`), beside the same with all layers written
out, and beside what torchair alone takes to convert all layers, rewritten as they are there.

Run: `python benchmarks/bench_compile.py`. Exits 1 above 15 s for 61 layers in all, above 4 s for
their passes, or if 61 layers take 2 times as long as 8. For `ge`, it exits 1 if lowering 61 layers
takes more than a quarter of the time with all layers written out, or 2 times as long as 8.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rolemesh.compiler.ir.program import Program

LAYERS = (8, 61)
RANKS = 4
BATCH, PROMPT, CAPACITY = 4, 512, 4096
LIMIT_SECONDS, LIMIT_PASSES, LIMIT_GROWTH = 15.0, 4.0, 2.0
LIMIT_GE, LIMIT_GE_GROWTH = 0.25, 2.0


def measure(layers: int, target: str) -> dict[str, float]:
    """CPU seconds of each part, prefill and decode together."""
    import torch
    from transformers import DeepseekV32Config, StaticCache

    import rolemesh
    from rolemesh.compiler.engine.ghosts import build_model

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
    lower = {"eager": lower_to_eager, "ge": lower_to_ge}[target]
    seconds: Counter[str] = Counter()
    for phase, tokens in (("prefill", PROMPT), ("decode", 1)):
        ids = torch.zeros(BATCH, tokens, dtype=torch.long)
        gc.collect()
        with torch.no_grad():
            begin = time.process_time()
            traced = rolemesh.trace(model, ids, past_key_values=cache, use_cache=True)
            captured = time.process_time()
            sharded = rolemesh.shard(traced, {"tp": RANKS}, role="pd_mixed", phase=phase)
            partitioned = time.process_time()
            seconds.update(lower(sharded.program))
        seconds["nodes"] += len(sharded.program.graph.nodes)
        seconds["capture"] += captured - begin
        seconds["passes"] += partitioned - captured
    return dict(seconds)


def lower_to_eager(program: Program) -> dict[str, float]:
    """CPU seconds of binding to rank 0 and lowering."""
    from rolemesh.lowering.bind import bind
    from rolemesh.lowering.eager import lower_eager
    from rolemesh.lowering.signature import Signature

    begin = time.process_time()
    lower_eager(bind(program, 0, {"tp": "tp"}), [], Signature.of(program, 0))
    return {"lowering": time.process_time() - begin}


def lower_to_ge(program: Program) -> dict[str, float]:
    """CPU seconds of the same, of lowering with all layers written out, and of torchair in that."""
    from rolemesh.lowering.bind import bind
    from rolemesh.lowering.flatten import as_fake
    from rolemesh.lowering.ge.loader import load_torchair
    from rolemesh.lowering.ge.options import GeOptions
    from rolemesh.lowering.ge.target import convert, lower_ge, on_device, prepare
    from rolemesh.lowering.signature import Signature
    from rolemesh.lowering.sizes import Examples
    from rolemesh.passes.base import collection_paused
    from rolemesh.runtime.groups import stand_in_groups

    torchair, signature = load_torchair("cpu"), Signature.of(program, 0)
    examples = Examples(program, 0).inputs
    options = GeOptions(device="cpu", repeats=len(program.graph.nodes))
    with stand_in_groups(program.the_mesh, 0) as groups:
        gc.collect()
        begin = time.process_time()
        lower_ge(bind(program, 0, groups.names), examples, signature, GeOptions(device="cpu"))
        lowered = time.process_time()
        module, fakes = bind(program, 0, groups.names), on_device(as_fake(examples), "cpu")
        gc.collect()
        with collection_paused():
            started = time.process_time()
            graph, _ = prepare(module, fakes, signature, options, torchair)
            prepared = time.process_time()
            convert(graph, fakes, signature, options, torchair)
            converted = time.process_time()
    return {
        "lowering": lowered - begin,
        "whole": converted - started,
        "torchair": converted - prepared,
    }


def in_fresh_process(layers: int, target: str) -> Mapping[str, float]:
    """`measure` in a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--layers", str(layers), "--target", target],
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


def report_ge(found: Mapping[int, Mapping[str, float]]) -> int:
    """Print the table of lowering to GE; 1 if a limit is exceeded."""
    print(f"{'layers':>6}  {'capture':>8}  {'passes':>7}  {'to GE':>7}  {'whole':>7}  torchair")
    for layers, seconds in found.items():
        print(
            f"{layers:>6}  {seconds['capture']:>8.2f}  {seconds['passes']:>7.2f}  "
            f"{seconds['lowering']:>7.2f}  {seconds['whole']:>7.2f}  {seconds['torchair']:>7.2f}"
        )
    few, many = (found[layers] for layers in LAYERS)
    part = many["lowering"] / many["whole"]
    growth = many["lowering"] / few["lowering"]
    print(f"61 layers: {part:.2f} of the time with all layers written out (limit {LIMIT_GE})")
    print(f"growth of lowering from 8 to 61 layers: {growth:.2f} times (limit {LIMIT_GE_GROWTH})")
    return 0 if part <= LIMIT_GE and growth <= LIMIT_GE_GROWTH else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, help="measure one size in this process, as JSON")
    parser.add_argument("--target", choices=("eager", "ge"), default="eager")
    given = parser.parse_args(arguments)
    if given.layers is not None:
        print(json.dumps(measure(given.layers, given.target)))
        return 0
    found = {layers: in_fresh_process(layers, given.target) for layers in LAYERS}
    return report_ge(found) if given.target == "ge" else report(found)


if __name__ == "__main__":
    sys.exit(main())
