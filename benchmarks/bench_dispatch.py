"""Rows that move by their routes against all_gather and reduce_scatter, over gloo.

    python benchmarks/bench_dispatch.py

Tokens of 512 features in fp32, 64 equally likely experts, one thread a rank. Two measurements, with
the exchanges that inductor has in the place of collectives; a ratio is the median over rounds of
the slowest rank's time with routes by that without, run in turn in random order after a barrier:

- an all_gather and a reduce_scatter of all tokens, and a dispatch and a combine;
- a step of two layers of experts (inner size 256) with residual sums, compiled.

Exits 1 if what the cost table chooses takes longer, but for the noise of a busy machine.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

os.environ["OMP_NUM_THREADS"] = "1"  # a rank is a thread; its libraries read this as they load

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import rolemesh
from rolemesh.compiler.ir.traffic import expected_share
from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.composite.gate import SWIGLU
from rolemesh.lowering.direct import exchange_directly, position_on_gloo
from rolemesh.lowering.routed_ops import define_routed_ops
from rolemesh.passes.cost import CostTable
from rolemesh.runtime.launch import run_processes

LIMIT = 1.1
HIDDEN, INNER, EXPERTS = 512, 256, 64
TOKENS, CHOICES = (1024, 4096), (1, 2, 4)

Case = tuple[int, int]
"""Tokens, and experts of each."""


class Layer(nn.Module):
    """Experts with a router and a residual sum."""

    def __init__(self, choices: int) -> None:
        super().__init__()
        self.choices = choices
        shapes = ((HIDDEN, EXPERTS), (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER))
        self.gate, self.up, self.down = (nn.Parameter(torch.randn(s) * 0.05) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[N, H]` in and out."""
        weights, ids = (x @ self.gate).softmax(-1).topk(self.choices, -1)
        experts: Tensor = torch.ops.rolemesh.experts(
            x, ids, weights, self.up, self.down, None, None, SWIGLU, False
        )
        return x + experts


def exchanges(tokens: int, choices: int) -> list[Callable[[], object]]:
    """A gather and a reduce_scatter of all tokens, and both by their routes."""
    world = dist.group.WORLD
    assert world is not None
    ranks, name = world.size(), world.group_name
    ops, routed = torch.ops._c10d_functional, torch.ops.rolemesh
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(choices, -1).indices
    chunk, whole = torch.ones(tokens // ranks, HIDDEN), torch.ones(tokens, HIDDEN)

    def exchanged(start: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
        form = make_fx(lambda value: ops.wait_tensor(start(value)), tracing_mode="fake")(x)
        exchange_directly(form.graph, position_on_gloo)
        form.recompile()
        return form

    gather = exchanged(lambda x: ops.all_gather_into_tensor(x, ranks, name), chunk)
    scatter = exchanged(lambda x: ops.reduce_scatter_tensor(x, "sum", ranks, name), whole)
    own = ([0, 1, tokens], EXPERTS, ranks, world.rank(), name)
    return [
        lambda: (gather(chunk), scatter(whole)),
        lambda: (routed.dispatch(chunk, ids, *own), routed.combine(whole, ids, *own)),
    ]


def steps(tokens: int, choices: int) -> list[Callable[[], object]]:
    """Two layers, compiled without routes and with them."""
    split = {"up": rolemesh.P("tp"), "down": rolemesh.P("tp")}
    annotations = {"input": rolemesh.P("tp"), **{f"*.{k}": v for k, v in split.items()}}
    found: list[Callable[[], object]] = []
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(6))
    for routing in (float("inf"), 0.0):
        torch.manual_seed(7)
        model = nn.Sequential(Layer(choices), Layer(choices)).requires_grad_(False)
        options = {
            "mesh": {"tp": dist.get_world_size()},
            "target": "inductor",
            "annotations": annotations,
            "costs": CostTable(routing=routing, routed=0.0 if not routing else 1.0),
        }
        compiled = torch.compile(model, backend="rolemesh", options=options)
        found.append(lambda run=compiled: run(x))
    torch.testing.assert_close(found[0](), found[1](), rtol=1e-4, atol=1e-4)
    return found


def measure(cases: Sequence[Case], rounds: int) -> dict[Case, tuple[float, float]]:
    """Run on every rank: ratios of the exchanges and of the step."""
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    define_composite_ops()
    define_routed_ops()
    order, found = random.Random(11), {}
    for case in cases:
        ratios = []
        for made in (exchanges, steps):
            with torch.no_grad():
                runs = made(*case)
                for run in runs:
                    run()
                taken = torch.zeros(2, rounds, dtype=torch.float64)
                for turn in range(rounds):
                    for index in order.sample((0, 1), 2):
                        dist.barrier()
                        began = time.perf_counter()
                        runs[index]()
                        taken[index, turn] = time.perf_counter() - began
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            ratios.append(statistics.median((taken[1] / taken[0]).tolist()))
        found[case] = ratios[0], ratios[1]
    return found


def chosen(tokens: int, choices: int, ranks: int) -> bool:
    """Whether the cost table lets rows move by their routes."""
    costs, whole = CostTable(), tokens * HIDDEN * 4
    share = float(expected_share(choices, EXPERTS, ranks))
    return costs.routing + costs.routed * share * whole < whole * (ranks - 1) / ranks


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", nargs="*", type=int, default=[4])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=31)
    given = parser.parse_args()
    missed = []
    print("| ranks | tokens | experts of each | share | exchanges | step | chosen |")
    print("|---" * 7 + "|")
    for ranks in given.ranks:
        cases = [(tokens, choices) for tokens in given.tokens for choices in CHOICES]
        first, *_ = run_processes(measure, ranks, (cases, given.rounds), timeout=1800)
        for (tokens, choices), ratios in first.items():  # type: ignore[attr-defined]
            share = float(expected_share(choices, EXPERTS, ranks))
            is_chosen = chosen(tokens, choices, ranks)
            cells = (ranks, tokens, choices, f"{share:.2f}", *(f"{r:.2f}" for r in ratios))
            print(f"| {' | '.join(map(str, cells))} | {'yes' if is_chosen else 'no'} |", flush=True)
            if is_chosen and max(ratios) > LIMIT:
                missed.append(f"{tokens} tokens, {choices} each, {ranks} ranks: {ratios}")
    for line in missed:
        print(f"above {LIMIT}: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
