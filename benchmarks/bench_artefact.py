"""A compiled model in a new process: loaded from an artefact, against compiled anew.

    python benchmarks/bench_artefact.py
    python benchmarks/bench_artefact.py --ranks 1 --rounds 3 --targets inductor

The model of `examples/demo.py`: DeepSeek-V3.2 as `transformers` ships it, 7 layers, small sizes,
random weights, in fp32 on 4 ranks over gloo with one thread each, role `pd_mixed`. Measured are the
first prefill (4 prompts of 48 tokens) and the first decode step (4 tokens) of new processes:

* cold: from `rolemesh.trace` to the result of each, all caches empty;
* warm: from `rolemesh.load` of an artefact with both programs to the result of each.

Both are processor seconds of a rank, the slowest one: what it takes where every rank has a core of
its own. Wall times are there too; with more ranks than cores they are mostly waits for each other.

Counted is everything from `load` on: reading and checking the files, comparing the model, building
both programs, and running them once. The column `again` has a second run of both programs, which is
no start any more. Weights are stored during the first run: whole tensors are cut into shards, which
takes a hundredth of a second here, and is counted. Not counted are the interpreter, imports,
building the model and the process group (imports and model have columns of their own, in wall
seconds): a process that serves needs them however its programs come to it. Imported are torch,
`rolemesh.load` and what all code of the target imports: a part of inductor, or torchair.

Warm figures are medians over rounds, each in new processes. What runs in processes below a rank is
not counted: g++ in a cold start, and in a warm one inductor's trials of what the processor can do.

Of target ge without CANN the first calls include what stands in for GE's compiler: the reference
executor, which reads and checks every op of a graph.

Exits 1 if a warm start takes more than 0.5 s, or more than a tenth of the cold one.
"""

from __future__ import annotations

import argparse
import importlib
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
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.runtime.launch import run_processes

MOST_SECONDS = 0.5
LEAST_RATIO = 10.0
LAYERS, BATCH, PROMPT = 7, 4, 48
ROLE = "pd_mixed"


class First(NamedTuple):
    """What the first calls of new processes took, in seconds on the slowest rank.

    Attributes:
        model: Wall time of building the model.
        load: Processor time from `trace` or `load` to compiled programs.
        calls: The same of each phase's first call.
        again: The same of all second calls.
        wall: Wall time from `trace` or `load` to the result of the last first call.
        sums: Of the logits' absolute values, by phase.
    """

    model: float
    load: float
    calls: tuple[float, ...]
    again: float
    wall: float
    sums: tuple[float, ...]

    @property
    def start(self) -> float:
        """Processor time to the results of all first calls."""
        return self.load + sum(self.calls)


def demo_case() -> Case:
    """The demo's model and calls."""
    config = tiny_config("deepseek_v32", layers=LAYERS)
    tokens = 2 * (PROMPT + 1)  # both calls are made twice
    return language_model_case(tiny_model(config), batch=BATCH, tokens=PROMPT, max_len=tokens)


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
    import_target(target)
    begin = time.perf_counter()
    case = demo_case()
    model = time.perf_counter() - begin
    dist.barrier()
    with torch.no_grad():
        begin, used = time.perf_counter(), time.process_time()
        if warm:
            programs = rolemesh.load(path, case.model)
        else:
            programs = Loaded(tuple(compiled(case, target)))
        load = time.process_time() - used
        first = [timed_call(programs, case, phase) for phase in case.phases]
        wall = time.perf_counter() - begin
        again = sum(timed_call(programs, case, phase)[0] for phase in case.phases)
    if not warm:
        rolemesh.save(programs.programs, path)
    measured = [model, load, *(seconds for seconds, _ in first), again, wall]
    slowest = torch.tensor(measured, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    model, load, *calls, again, wall = slowest.tolist()
    return First(model, load, tuple(calls), again, wall, tuple(total for _, total in first))


def import_target(target: str) -> None:
    """Import what the code of a target imports."""
    if target == "inductor":
        importlib.import_module("torch._inductor.select_algorithm")
    if target == "ge":
        load_torchair()


def timed_call(programs: Loaded, case: Case, phase: str) -> tuple[float, float]:
    """Processor time of a call, and the sum of its logits' absolute values."""
    args, kwargs = case.phases[phase]
    used = time.process_time()
    with rolemesh.phase(phase):
        result: Any = programs(*args, **kwargs)
    return time.process_time() - used, result.logits.double().abs().sum().item()


def run(path: str, target: str, ranks: int, *, warm: bool) -> First:
    """The first calls in new processes."""
    first, *_ = run_processes(
        "bench_artefact:first_calls", ranks, (path, target, warm), timeout=1800
    )
    assert isinstance(first, tuple)
    return First(*first)


def import_seconds(target: str) -> float:
    """What a new interpreter takes for torch, `rolemesh.load` and what a target's code imports."""
    code = (
        f"import bench_artefact, rolemesh; rolemesh.load; bench_artefact.import_target({target!r})"
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    return time.perf_counter() - begin


def measure(target: str, rounds: int, ranks: int) -> bool:
    """Print a row; whether the limits are kept."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ["ROLEMESH_CACHE_DIR"] = str(Path(folder, "rolemesh"))
        path = str(Path(folder, "artefact"))
        cold = run(path, target, ranks, warm=False)
        warm = [run(path, target, ranks, warm=True) for _ in range(rounds)]
        size = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    for one in warm:
        if any(abs(a - b) > 1e-4 * b for a, b in zip(one.sums, cold.sums, strict=True)):
            raise ValueError("the logits of a loaded program are not those of the compiled one")
    calls = [statistics.median(column) for column in zip(*(w.calls for w in warm), strict=True)]
    load, start, again, wall = (
        statistics.median(getattr(one, name) for one in warm)
        for name in ("load", "start", "again", "wall")
    )
    print(
        f"| {target} | {size / 1e6:.1f} | {import_seconds(target):.1f} | {cold.model:.1f} "
        f"| {cold.start:.2f} | {load:.2f} | {calls[0]:.2f} | {calls[1]:.2f} "
        f"| {start:.2f} | {again:.2f} | {cold.start / start:.0f} | {cold.wall:.1f} | {wall:.2f} |",
        flush=True,
    )
    return start <= MOST_SECONDS and cold.start >= LEAST_RATIO * start


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--targets", nargs="*", default=["eager", "inductor"])
    given = parser.parse_args()
    print(
        "| target | MB | imports, s | model | cold | load | prefill | decode | warm | again "
        "| cold / warm | cold, wall | warm, wall |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    kept = [measure(target, given.rounds, given.ranks) for target in given.targets]
    if not all(kept):
        print(f"above {MOST_SECONDS} s, or less than {LEAST_RATIO:.0f} times faster than cold")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
