"""What writing a run directory costs, as a share of compile time.

Compiles tiny models of four layers, both phases of `pd_mixed`: captures them, and shards them with
and without a run directory, in turn. Prints the median seconds of each and

    (shard with - shard without) / (capture + shard without)

Run: `python benchmarks/bench_dump.py`. Exits 1 above 0.10.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.dump.record import RunWriter
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.models.cases import Case
from rolemesh.compiler.pipeline import ShardOptions, shard_program

MODELS = ("hf:deepseek_v32", "hf:llama")
ROLE = "pd_mixed"
MESH = Mesh({"tp": 4})
LIMIT = 0.10

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that some work took, and its result."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def capture(case: Case) -> dict[str, Program]:
    """The captured Program of each phase."""
    torch._dynamo.reset()
    with torch.no_grad():
        return {
            phase: trace(case.model, *args, **kwargs).program
            for phase, (args, kwargs) in case.phases.items()
        }


def shard(programs: dict[str, Program], writer: RunWriter | None) -> None:
    """Shard every phase."""
    for phase, program in programs.items():
        shard_program(program, ShardOptions(MESH, ROLE), phase, dump=writer)


def write(programs: dict[str, Program], folder: Path) -> None:
    """Shard every phase and write a run directory."""
    shard(programs, RunWriter(folder))


def measure(model: str, rounds: int) -> tuple[int, float, float, float]:
    """Nodes captured; median seconds of the capture, and of sharding without and with writing."""
    case = CheckOptions(model, ROLE, MESH, layers=4).load()
    programs: dict[str, Program] = {}
    captures, without, writing = [], [], []
    for index in range(rounds + 1):
        seconds, programs = timed(functools.partial(capture, case))
        plain, _ = timed(functools.partial(shard, programs, None))
        with tempfile.TemporaryDirectory() as folder:
            recorded, _ = timed(functools.partial(write, programs, Path(folder, "run")))
        if index:  # the first round looks rules up
            captures.append(seconds)
            without.append(plain)
            writing.append(recorded)
    nodes = sum(len(program.graph.nodes) for program in programs.values())
    return nodes, *map(statistics.median, (captures, without, writing))


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs per model; the median counts")
    rounds = parser.parse_args().rounds
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.pop("ROLEMESH_DUMP", None)
    torch.set_num_threads(1)
    print(f"{'model':<16}  {'nodes':>6}  {'capture s':>9}  {'shard s':>8}  {'with dump':>9}  ratio")
    worst = 0.0
    for model in MODELS:
        nodes, captured, plain, recorded = measure(model, rounds)
        ratio = (recorded - plain) / (captured + plain)
        worst = max(worst, ratio)
        times = f"{captured:>9.2f}  {plain:>8.3f}  {recorded:>9.3f}"
        print(f"{model:<16}  {nodes:>6,}  {times}  {ratio:.3f}")
    print(f"worst ratio {worst:.3f} (limit {LIMIT:.2f})")
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
