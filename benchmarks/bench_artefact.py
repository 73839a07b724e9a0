"""A compiled model in a new process: loaded from an artefact, against compiled anew.

    python benchmarks/bench_artefact.py
    python benchmarks/bench_artefact.py --rounds 5 --targets eager inductor

The model of `examples/demo.py`: DeepSeek-V3.2 as `transformers` ships it, 7 layers, small sizes,
random weights, in fp32 on 4 ranks over gloo with one thread each, role `pd_mixed`. Measured are the
first prefill (4 prompts of 48 tokens) and the first decode step (4 tokens) of new processes:

* cold: from `rolemesh.trace` to the result, all caches empty;
* warm: from `rolemesh.load` of an artefact with both programs to the result of each.

Not counted are the interpreter, imports and building the model (columns of their own), and bringing
weights to where they are stored: every rank cuts its shards out of whole tensors, the same in both,
and timed by doing it (column `weights`; it is inside of the other times too, and taken off in the
column `warm, net`). The slowest rank counts; medians over rounds, warm rounds in new processes. CPU
is the processor time of a rank's warm start: what it takes where every rank has a core of its own.

Exits 1 if a warm start takes more than 0.5 s net for both calls, or more than a tenth of the cold.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"  # a rank is a thread; its libraries read this as they load

import torch
import torch.distributed as dist

import rolemesh
from rolemesh.compiler.api import Compiled
from rolemesh.compiler.artefact.load import Loaded
from rolemesh.compiler.models.cases import Case, language_model_case
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.runtime.launch import run_processes
from rolemesh.runtime.store import Store, default_store

MOST_SECONDS = 0.5
LEAST_RATIO = 10.0
RANKS, LAYERS, BATCH, PROMPT = 4, 7, 4, 48
ROLE = "pd_mixed"


class First(NamedTuple):
    """What the first calls of new processes took, in seconds on the slowest rank.

    Attributes:
        model: Building the model.
        load: From `trace` or `load` to compiled programs.
        calls: Of each phase, to its result.
        weights: Cutting the shards of weights and caches out of whole tensors.
        processor: Processor time of loading and of all calls.
        sums: Of the logits' absolute values, by phase.
    """

    model: float
    load: float
    calls: tuple[float, ...]
    weights: float
    processor: float
    sums: tuple[float, ...]

    @property
    def net(self) -> float:
        """All but building the model and bringing the weights."""
        return self.load + sum(self.calls) - self.weights


def demo_case() -> Case:
    """The demo's model and calls."""
    config = tiny_config("deepseek_v32", layers=LAYERS)
    return language_model_case(tiny_model(config), batch=BATCH, tokens=PROMPT, max_len=PROMPT + 1)


def compiled(case: Case, target: str) -> list[Compiled]:
    """Both programs, from the model."""
    found = []
    for phase, (args, kwargs) in case.phases.items():
        traced = rolemesh.trace(case.model, *args, **kwargs)
        mesh = {"tp": dist.get_world_size()}
        sharded = rolemesh.shard(traced, mesh, role=ROLE, phase=phase)
        found.append(rolemesh.lower(sharded, target).compile())
    return found


def first_calls(path: str, target: str, warm: bool) -> First:
    """Run on every rank, in a new process."""
    begin = time.perf_counter()
    case = demo_case()
    model = time.perf_counter() - begin
    weights = _timed_storing(default_store())
    dist.barrier()
    with torch.no_grad():
        begin, used = time.perf_counter(), time.process_time()
        if warm:
            programs: Any = rolemesh.load(path, case.model)
        else:
            programs = Loaded(tuple(compiled(case, target)))
        load = time.perf_counter() - begin
        calls, sums = [], []
        for phase, (args, kwargs) in case.phases.items():
            begin = time.perf_counter()
            with rolemesh.phase(phase):
                result = programs(*args, **kwargs)
            calls.append(time.perf_counter() - begin)
            sums.append(result.logits.double().abs().sum().item())
    processor = time.process_time() - used
    if not warm:
        rolemesh.save(programs.programs, path)
    measured = [model, load, *calls, weights[0], processor]
    seconds = torch.tensor(measured, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    model, load, *calls, stored, processor = seconds.tolist()
    return First(model, load, tuple(calls), stored, processor, tuple(sums))


def _timed_storing(store: Store) -> list[float]:
    """Seconds that the store takes to cut shards and to free whole tensors, from here on."""
    seconds = [0.0]

    def timed(name: str) -> None:
        function = getattr(store, name)

        def call(*args: object) -> object:
            begin = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[0] += time.perf_counter() - begin

        setattr(store, name, call)

    timed("local")
    timed("release")
    return seconds


def run(path: str, target: str, *, warm: bool) -> First:
    """The first calls in new processes."""
    first, *_ = run_processes(
        "bench_artefact:first_calls", RANKS, (path, target, warm), timeout=1800
    )
    assert isinstance(first, tuple)
    return First(*first)


def import_seconds() -> float:
    """What a new interpreter takes for torch and `rolemesh.load`."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import rolemesh; rolemesh.load"], check=True)
    return time.perf_counter() - begin


def measure(target: str, rounds: int) -> bool:
    """Print a row; whether the limits are kept."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ["ROLEMESH_CACHE_DIR"] = str(Path(folder, "rolemesh"))
        path = str(Path(folder, "artefact"))
        cold = run(path, target, warm=False)
        warm = [run(path, target, warm=True) for _ in range(rounds)]
        size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    for one in warm:
        if any(abs(a - b) > 1e-4 * b for a, b in zip(one.sums, cold.sums, strict=True)):
            raise ValueError("the logits of a loaded program are not those of the compiled one")
    load = statistics.median(one.load for one in warm)
    calls = [statistics.median(column) for column in zip(*(w.calls for w in warm), strict=True)]
    net = statistics.median(one.net for one in warm)
    weights = statistics.median(one.weights for one in warm)
    ratio = cold.net / net
    processor = statistics.median(one.processor for one in warm)
    print(
        f"| {target} | {size / 1e6:.1f} | {import_seconds():.1f} | {cold.model:.1f} "
        f"| {cold.net:.2f} | {load:.2f} | {calls[0]:.2f} | {calls[1]:.2f} | {weights:.2f} "
        f"| {net:.2f} | {processor:.2f} | {ratio:.0f} |",
        flush=True,
    )
    return net <= MOST_SECONDS and ratio >= LEAST_RATIO


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--targets", nargs="*", default=["eager", "inductor"])
    given = parser.parse_args()
    print(
        "| target | MB | imports, s | model | cold, net | load | prefill | decode | weights "
        "| warm, net | CPU | cold / warm |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    kept = [measure(target, given.rounds) for target in given.targets]
    if not all(kept):
        print(f"above {MOST_SECONDS} s, or less than {LEAST_RATIO:.0f} times faster than cold")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
