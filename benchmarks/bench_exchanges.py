"""Collectives over gloo against the exchanges that take their place under inductor.

    python benchmarks/bench_exchanges.py

Each collective of fp32 values, as torch runs it and as `lowering/direct.py` puts it, op by op and
without a compiler, on 2 and 4 ranks, one thread each. Both run in turn in random order, after a
barrier; the slowest rank's time counts. A ratio is the median over rounds of the exchange's time by
the collective's in the same round; `CPU` is the same of the processor time of all ranks. Sizes are
those of a whole value: what a reduce_scatter and an all_reduce get, and an all_gather gives.

Exits 1 if an exchange that a program would use takes longer, but for the noise of a busy machine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"  # a rank is a thread; its libraries read this as they load

import torch
import torch.distributed as dist
from torch.fx.experimental.proxy_tensor import make_fx

from rolemesh.lowering.direct import LARGEST, exchange_directly, position_on_gloo
from rolemesh.runtime.launch import run_processes

LIMIT = 1.1
SIZES = (16, 64, 256, 1024)
"""In KiB."""
KINDS = ("reduce_scatter", "all_gather", "all_reduce")

Ratio = tuple[float, float]


def collective(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """One collective of all ranks, with its wait."""
    world = dist.group.WORLD
    assert world is not None
    ranks, name = world.size(), world.group_name
    ops = torch.ops._c10d_functional
    start: Callable[[torch.Tensor], torch.Tensor] = {
        "reduce_scatter": lambda x: ops.reduce_scatter_tensor(x, "sum", ranks, name),
        "all_gather": lambda x: ops.all_gather_into_tensor(x, ranks, name),
        "all_reduce": lambda x: ops.all_reduce(x, "sum", name),
    }[kind]
    return lambda x: ops.wait_tensor(start(x))


def measure(rounds: int) -> dict[tuple[str, int], Ratio]:
    """Run on every rank: ratios of time and of processor time, by collective and KiB."""
    torch.set_num_threads(1)
    order, found = random.Random(11), {}
    for kind in KINDS:
        for size in SIZES:
            rows = size * 256 // (dist.get_world_size() if kind == "all_gather" else 1)
            x = torch.ones(rows)
            forms = [make_fx(collective(kind), tracing_mode="fake")(x) for _ in range(2)]
            # The limit of an all_reduce is lifted: what lies beyond it is measured too.
            exchange_directly(forms[1].graph, position_on_gloo, largest=size * 1024)
            forms[1].recompile()
            taken = torch.zeros(2, 2, rounds, dtype=torch.float64)
            for form in forms:
                form(x)
            for turn in range(rounds):
                for index in order.sample((0, 1), 2):
                    dist.barrier()
                    began, worked = time.perf_counter(), time.process_time()
                    forms[index](x)
                    taken[0, index, turn] = time.perf_counter() - began
                    taken[1, index, turn] = time.process_time() - worked
            dist.all_reduce(taken[0], dist.ReduceOp.MAX)
            dist.all_reduce(taken[1])
            ratios = [statistics.median((new / old).tolist()) for old, new in taken]
            found[kind, size] = ratios[0], ratios[1]
    return found


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args()
    missed = []
    print("| collective | KiB | ranks | time | CPU |\n" + "|---" * 5 + "|")
    for ranks in given.ranks:
        first, *_ = run_processes(measure, ranks, (given.rounds,), timeout=600)
        for (kind, size), (seconds, cpu) in first.items():  # type: ignore[attr-defined]
            print(f"| {kind} | {size} | {ranks} | {seconds:.2f} | {cpu:.2f} |", flush=True)
            is_used = kind != "all_reduce" or size * 1024 <= LARGEST
            if is_used and min(seconds, cpu) > LIMIT:
                missed.append(f"{kind} of {size} KiB on {ranks} ranks: {seconds:.2f}")
    for line in missed:
        print(f"above {LIMIT}: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
