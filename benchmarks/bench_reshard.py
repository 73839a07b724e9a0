"""Time and memory of planning a reshard: 60,000 tensors, 256 to 256 ranks.

    python benchmarks/bench_reshard.py

A mixture-of-experts model of 61 layers with 512 experts each, every weight of an expert a tensor of
its own. A trainer has it on dp=32, tp=8: rows over both axes, or rows over one and features over
the other. It is served on pp=2, tp=128: rows or features over tp, small weights on all ranks or on
one. Tensors that lie alike share a table of moves; how many tables and moves there are is printed.

Timed are making the manifests, the plan with its digests, and writing and reading a manifest as
JSON. Limits: 5 s for the plan, and 1 GB of memory for the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch

from rolemesh.compiler.ir.boxes import distribute
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.manifest import Manifest, StoredTensor
from rolemesh.compiler.ir.manifest_json import decode_manifest, encode_manifest
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Shard
from rolemesh.runtime.reshard.plan import STAGING_BYTES, plan_reshard

LIMIT_SECONDS, LIMIT_BYTES = 5.0, 10**9

TRAIN = Mesh({"dp": 32, "tp": 8})
SERVE = Mesh({"pp": 2, "tp": 128})


EXPERTS = 512
LAYERS = 61


def kinds() -> dict[str, tuple[tuple[int, ...], Layout, Layout]]:
    """Shape and both layouts of the weights of a layer."""
    hidden, expert, latent, heads = 7168, 2048, 1536, 24576
    everywhere = Layout((REPLICATE, REPLICATE))

    def rows(n: int) -> tuple[Layout, Layout]:
        return Layout((Shard(0, 1, n), Shard(0, 1, n))), Layout((REPLICATE, Shard(0, 1, n)))

    def features(n: int, m: int) -> tuple[Layout, Layout]:
        return Layout((Shard(0, 1, n), Shard(1, 1, m))), Layout((REPLICATE, Shard(1, 1, m)))

    def small(n: int, after: Layout = everywhere) -> tuple[Layout, Layout]:
        return Layout((Shard(0, 1, n), REPLICATE)), after

    return {
        "norm": ((hidden,), *small(hidden)),
        "q_a_norm": ((latent,), *small(latent, Layout((REPLICATE, Owner(5))))),
        "q_a": ((latent, hidden), *features(latent, hidden)),
        "q_b": ((heads, latent), *rows(heads)),
        "kv_a": ((576, hidden), *small(576)),
        "kv_b": ((32768, 512), *rows(32768)),
        "o": ((hidden, 16384), *features(hidden, 16384)),
        "gate": ((EXPERTS, hidden), *small(EXPERTS)),
        "experts.up": ((expert, hidden), *rows(expert)),
        "experts.down": ((hidden, expert), rows(hidden)[0], features(hidden, expert)[1]),
    }


def manifests(count: int) -> tuple[Manifest, Manifest]:
    """Both manifests, of `count` tensors at most."""
    found = kinds()
    names = [
        (f"layers.{layer}.{kind}.{copy}", kind)
        for layer in range(LAYERS)
        for kind in found
        for copy in range(EXPERTS if kind.startswith("experts") else 1)
    ]
    train, serve = {}, {}
    for name, kind in names[:count]:
        shape, before, after = found[kind]
        train[name] = StoredTensor(torch.bfloat16, distribute(before, shape, TRAIN))
        serve[name] = StoredTensor(torch.bfloat16, distribute(after, shape, SERVE))
    return Manifest(TRAIN, train, "train"), Manifest(SERVE, serve, "decode")


def main() -> int:
    """Measure, print, and say whether the limits are met."""
    parser = argparse.ArgumentParser(description="Planning a reshard of many tensors.")
    parser.add_argument("--tensors", type=int, default=60_000)
    parser.add_argument("--staging", type=int, default=STAGING_BYTES, help="bytes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parsed = parser.parse_args()
    began = time.perf_counter()
    source, target = manifests(parsed.tensors)
    made = time.perf_counter()
    plan = plan_reshard(source, target, staging=parsed.staging)
    digest = plan.digest
    planned = time.perf_counter()
    data = encode_manifest(source)
    decode_manifest(data)
    read = time.perf_counter()
    tables = {id(transfer.table): transfer.table for transfer in plan.transfers}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "tensors": len(plan.transfers),
        "ranks": [source.mesh.size, target.mesh.size],
        "tables": len(tables),
        "moves": sum(len(table.moves) for table in tables.values()),
        "steps": len(plan.steps),
        "moved_GB": round(plan.moved_bytes / 1e9, 1),
        "kept_GB": round(plan.kept_bytes / 1e9, 1),
        "staged_MB": round(plan.staged_bytes / 1e6, 1),
        "manifests_s": round(made - began, 2),
        "plan_s": round(planned - made, 2),
        "write_and_read_s": round(read - planned, 2),
        "manifest_MB": round(len(data) / 1e6, 1),
        "memory_MB": round(memory / 1e6),
        "digest": digest,
    }
    if parsed.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:18} {value}")
    return 0 if planned - made <= LIMIT_SECONDS and memory <= LIMIT_BYTES else 1


if __name__ == "__main__":
    raise SystemExit(main())
