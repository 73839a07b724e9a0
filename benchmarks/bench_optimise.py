"""What each pass over collectives saves: collectives, bytes, simulated and measured time.

    python benchmarks/bench_optimise.py

Each row is one pass on a program that it is for, without it and with it (all other passes run in
both). Collectives and bytes are those of one rank; the simulated time is that of
`rolemesh.compiler.debug.timeline` on the default machine. Measured times are of 2 gloo ranks,
target eager, both programs in turn in random order in the same processes: the median of the rounds'
ratios. On a machine with as few cores as ranks, an exchange has no core of its own to run on.

Exits 1 if a pass saves nothing of what it is there to save, or if a program is slower by more than
the limit.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rolemesh.compiler.api import Sharded, lower, trace
from rolemesh.compiler.capture.tracing import Traced
from rolemesh.compiler.debug.timeline.timeline import timeline
from rolemesh.compiler.dump.reader import open_stage
from rolemesh.compiler.dump.stage_json import StageEncoder
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.models.cases import Case, load_case
from rolemesh.compiler.pipeline import ShardOptions, shard_program
from rolemesh.passes.base import Pass
from rolemesh.runtime.launch import run_processes

RANKS = 2
LIMIT = 1.1
"""Most that a program may take with a pass, relative to without it, for noise."""


class Forms(nn.Module):
    """One value needed whole, cast and scaled."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over all rows of a value, and of a form of it."""
        return x.cumsum(0), (x.double() * 3).flip(0, 1)


@dataclass(frozen=True)
class Row:
    """A pass, and what it is measured on.

    Attributes:
        step: Its name.
        case: What it works on, for people.
        saves: `collectives`, `bytes` or `time`.
        traced: Traces the model.
        role: The role; None for annotations alone.
        phase: The phase.
        call: Arguments of each call; fresh, for caches are changed.
        annotations: Layouts of inputs.
    """

    step: str
    case: str
    saves: str
    traced: Traced
    role: str | None
    phase: str | None
    call: Callable[[], tuple[tuple[object, ...], Mapping[str, object]]]
    annotations: Mapping[str, P]

    def sharded(self, *, without: bool) -> Sharded:
        """The program with every pass, or with all but this one."""

        def through(step: Pass, program: Program) -> Program:
            return program if without and step.name == self.step else step.apply(program)

        options = ShardOptions(Mesh({"tp": RANKS}), self.role, annotations=self.annotations)
        stages = shard_program(self.traced.program, options, self.phase, through=through)
        return Sharded(self.traced, options, stages, options.mesh)


def model_row(
    step: str, saves: str, model: str, role: str, phase: str, tokens: int, **extra: object
) -> Row:
    """A row on a phase of a tiny model."""
    case = load_case(f"hf:{model}", tokens=tokens, batch=4, layers=3, max_len=tokens + 8)

    def call() -> tuple[tuple[object, ...], Mapping[str, object]]:
        args, kwargs = Case.fresh(case).phases[phase]
        return args, {**kwargs, **extra}

    args, kwargs = call()
    asked = "".join(f", {name}={value}" for name, value in extra.items())
    name = f"{model} {role} {phase}, 4 x {tokens if phase == 'prefill' else 1} tokens{asked}"
    return Row(step, name, saves, trace(case.model, *args, **kwargs), role, phase, call, {})


def rows() -> list[Row]:
    """The rows of the table."""
    x = torch.randn(96, 64)
    forms = trace(Forms(), x)
    layouts = {"x": P("tp")}
    return [
        Row("gather_once", "two forms of x[96@tp, 64]", "bytes", forms, None, None,
            lambda: ((x,), {}), layouts),
        model_row("sink", "bytes", "llama", "pd_mixed", "prefill", 96, logits_to_keep=1),
        model_row("bucket", "collectives", "deepseek_v32", "pd_mixed", "decode", 32),
        model_row("bucket", "collectives", "deepseek_v32", "prefill", "prefill", 64),
        model_row("schedule", "time", "deepseek_v32", "pd_mixed", "prefill", 64),
        model_row("schedule", "time", "qwen3_moe", "prefill", "prefill", 64),
    ]  # fmt: skip


def simulated(sharded: Sharded) -> float:
    """Microseconds of a run on the default machine."""
    encoder = StageEncoder()
    encoder.encode(sharded.stages.decided, "decided", 0)
    text = encoder.encode(sharded.program, "last", 1)
    stage = open_stage(text, "a program").program().stage()
    return max(event.end for event in timeline(stage))


def ratio_of_ranks(row: Row, programs: tuple[Sharded, Sharded], rounds: int) -> float:
    """The measured time with the pass over that without it, on this rank."""
    torch.set_num_threads(1)
    compiled = [lower(sharded, "eager").compile() for sharded in programs]
    order = random.Random(0)
    ratios = []
    with torch.no_grad():
        for run in compiled:
            args, kwargs = row.call()
            run(*args, **kwargs)
        for _ in range(rounds):
            taken = [0.0, 0.0]
            for index in order.sample((0, 1), 2):
                calls = [row.call() for _ in range(3)]
                dist.barrier()
                started = time.perf_counter()
                for args, kwargs in calls:
                    compiled[index](*args, **kwargs)
                taken[index] = time.perf_counter() - started
            ratios.append(taken[1] / taken[0])
    return statistics.median(ratios)


def main() -> int:
    """Measure, print, and say whether every pass saves what it should."""
    parser = argparse.ArgumentParser(description="What each pass over collectives saves.")
    parser.add_argument("--rounds", type=int, default=15)
    parsed = parser.parse_args()
    print(f"{'pass':12} {'program':58} {'collectives':>13} {'bytes':>19} {'simulated us':>16} gloo")
    missed = []
    with torch.no_grad():
        for row in rows():
            programs = row.sharded(without=True), row.sharded(without=False)
            counts = [len(p.collectives) for p in programs]
            moved = [sum(r.bytes_received for r in p.collectives) for p in programs]
            times = [simulated(p) for p in programs]
            found = run_processes(
                ratio_of_ranks, RANKS, (row, programs, parsed.rounds), timeout=300, fork=True
            )
            measured = statistics.mean(float(str(value)) for value in found)
            print(
                f"{row.step:12} {row.case:58} {counts[0]:5} -> {counts[1]:4} "
                f"{moved[0]:8} -> {moved[1]:7} {times[0]:6.1f} -> {times[1]:6.1f} {measured:5.2f}"
            )
            better = {"collectives": counts, "bytes": moved, "time": times}[row.saves]
            if better[1] >= better[0]:
                missed.append(f"{row.step} saves no {row.saves} of {row.case}")
            if measured > LIMIT:
                missed.append(f"{row.step} makes {row.case} take {measured:.2f} of the time")
    print("\n".join(missed) or "every pass saves what it is for")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
