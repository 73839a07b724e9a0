"""What lowering to GE costs, against torchair alone.

    python benchmarks/bench_ge_conversion.py

Two ratios, on the bound graph of one rank of DeepSeek-V3.2 (small sizes), prefill and decode:

* conversion: `convert` against `torchair.get_compiler` on the same prepared graph. At most 1.10.
* from the bound graph: `lower_ge` (tracing, rewriting, conversion) against torchair's way from the
  same graph, AOTAutograd and its compiler, which traces too and rewrites less.

Both sides run in turn in one process; medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing

from rolemesh.compiler.api import shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.models.cases import load_case
from rolemesh.lowering.bind import bind
from rolemesh.lowering.flatten import as_fake
from rolemesh.lowering.ge.decompositions import decomposition_table
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import convert, lower_ge, prepare
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Examples
from rolemesh.runtime.groups import stand_in_groups


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call, without garbage collection."""
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    run()
    spent = time.perf_counter() - started
    gc.enable()
    return spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time of lowering to GE against torchair alone.")
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torchair = load_torchair("cpu")
    case = load_case("hf:deepseek_v32", layers=3)
    print(f"{'graph':<10} {'nodes':>6} {'convert':>9} {'torchair':>9} {'ratio':>6}", end="   ")
    print(f"{'lower_ge':>9} {'with AOT':>9} {'ratio':>6}")
    for phase in ("prefill", "decode"):
        args, kwargs = case.phases[phase]
        with torch.no_grad():
            traced = trace(case.model, *args, **kwargs)
        program = shard(traced, {"tp": 4}, "pd_mixed", phase=phase).program
        with stand_in_groups(program.the_mesh, 1) as groups:
            module = bind(program, 1, groups.names)
            examples = Examples(program, 1).inputs
            measure(phase, module, examples, Signature.of(program, 1), torchair, rounds)


def measure(phase, module, examples, signature, torchair, rounds) -> None:
    """Time both ratios on one graph."""
    options = GeOptions(frozen_parameters=False)
    fakes = as_fake(examples)
    prepared, _ = prepare(copy.deepcopy(module), fakes, signature, options, torchair)
    config = torchair.module.CompilerConfig

    def ours() -> object:
        return convert(prepared, fakes, signature, options, torchair)

    def theirs() -> object:
        with torch.no_grad(), tracing(TracingContext(fakes[0].fake_mode)):
            return torchair.module.get_compiler(config())(prepared, list(fakes))

    table = decomposition_table(torchair)

    def with_aot() -> object:
        def compiler(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
            return torchair.module.get_compiler(config())(graph, inputs)

        with torch.no_grad(), tracing(TracingContext(fakes[0].fake_mode)):
            return aot_module_simplified(
                copy.deepcopy(module), list(fakes), fw_compiler=compiler, decompositions=table
            )

    pairs = (
        (ours, theirs),
        (lambda: lower_ge(copy.deepcopy(module), examples, signature), with_aot),
    )
    columns = []
    for left, right in pairs:
        left(), right()
        times = [(seconds(left), seconds(right)) for _ in range(rounds)]
        a, b = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(x / y for x, y in times)
        columns.append(f"{a:>8.2f}s {b:>8.2f}s {ratio:>6.2f}")
    print(f"{phase:<10} {len(prepared.graph.nodes):>6} {'   '.join(columns)}")


if __name__ == "__main__":
    main()
