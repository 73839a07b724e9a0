"""A prefill step on the reference executor, against eager PyTorch.

    python benchmarks/bench_ge_step.py

One rank's program of a llama-shaped model (hidden 512, 4 layers, 8/4 heads, batch 1, 256 tokens),
once as a GE graph and once as the bound graph that the eager target runs. Both run in turn in one
process; the ratio is the median over the rounds. At most 3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from rolemesh.compiler.api import lower, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.models.cases import load_case
from rolemesh.lowering.bind import bind
from rolemesh.lowering.eager import lower_eager
from rolemesh.lowering.signature import Signature
from rolemesh.runtime.groups import stand_in_groups
from rolemesh.runtime.lockstep import scatter_inputs

CONFIG = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
}


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A prefill step on GE against eager PyTorch.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(CONFIG))
        case = load_case(f"hf:llama:{path}", tokens=parsed.tokens, batch=1, max_len=512)
    args, kwargs = case.phases["prefill"]
    with torch.no_grad():
        sharded = shard(trace(case.model, *args, **kwargs), {"tp": 1}, "prefill")
    program = sharded.program
    ranks = lower(sharded, "ge").lockstep().programs.at({})
    with stand_in_groups(program.the_mesh, 0) as groups:
        module = bind(program, 0, groups.names)
    eager = lower_eager(module, [], Signature.of(program, 0))
    values = dict(case.model.named_parameters()) | dict(case.model.named_buffers())
    inputs = []
    for entry, node in zip(program.inputs, program.placeholders, strict=True):
        kind = node.meta["type"]
        known = values.get(entry.name)
        inputs.append(
            torch.zeros(kind.shape, dtype=kind.dtype) if known is None else known.detach()
        )
    locals_ = scatter_inputs(program, inputs)
    mine = [ranks_[0] for ranks_ in locals_]
    state = [(x, x.clone()) for x, e in zip(mine, program.inputs, strict=True) if e.mutated]

    def fresh(run: Callable[[], object]) -> float:
        for tensor, before in state:  # GE updates caches in place, the eager graph does not
            tensor.copy_(before)
        return seconds(run)

    pair = (lambda: ranks(locals_), lambda: eager(*mine))
    for run in pair:
        fresh(run)
    times = [(fresh(pair[0]), fresh(pair[1])) for _ in range(parsed.rounds)]
    ge, plain = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    print(f"GE {ge * 1e3:.1f} ms   eager {plain * 1e3:.1f} ms   ratio {ratio:.2f} (limit 3)")


if __name__ == "__main__":
    main()
