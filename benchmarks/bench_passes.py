"""Compile time of the passes per node, and how it grows.

Builds Programs of repeated transformer-like blocks (attention with a cache, and a gated MLP) as
plain graphs, and times rules + propagate + push back + partition + verify on them: tokens split by
sequence, weights by heads, columns and rows, 4 ranks. Prints microseconds per node for each size
(the median of several runs, taken in turn over all sizes) and the exponent of a log-log fit.

Run: `python benchmarks/bench_passes.py`. Exits 1 above 200 us a node or an exponent above 1.05.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import fx

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.program import Input, InputKind, Output, Program
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.base import collection_paused
from rolemesh.passes.partition import Partition
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.verify import Verify

aten = torch.ops.aten
SIZES = (500, 2_000, 5_000, 20_000)
LIMIT_US = 200.0
LIMIT_EXPONENT = 1.05
BATCH, TOKENS, HIDDEN, HEADS, HEAD_DIM, INNER, CACHE = 2, 32, 96, 8, 12, 160, 64


class Builder:
    """Builds a Program block by block."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[Input] = []
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        self.results: list[fx.Node] = []
        self.outputs: list[Output] = []

    def input(
        self, name: str, shape: tuple[int, ...], shard: Shard | None, **kind: object
    ) -> fx.Node:
        """A placeholder of `shape` in a layout of one axis."""
        node = self.graph.placeholder(name.replace(".", "_"))
        node.meta["type"] = TensorType(shape, torch.float32)
        whole = Layout.replicated(Mesh({"tp": 4}))
        self.layouts[node] = (whole if shard is None else Layout((shard,)),)
        self.inputs.append(Input(name, **kind))  # type: ignore[arg-type]
        return node

    def op(self, shape: tuple[int, ...], target: Callable[..., object], *args: object) -> fx.Node:
        """A call with a result of `shape`."""
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["type"] = TensorType(shape, torch.float32)
        return node


def norm(b: Builder, x: fx.Node) -> fx.Node:
    """RMS norm over the last dim."""
    shape = (BATCH, TOKENS, HIDDEN)
    square = b.op(shape, aten.pow.Tensor_Scalar, x, 2)
    mean = b.op((BATCH, TOKENS, 1), aten.mean.dim, square, [-1], True)
    scale = b.op(
        (BATCH, TOKENS, 1),
        aten.rsqrt.default,
        b.op((BATCH, TOKENS, 1), aten.add.Tensor, mean, 1e-6),
    )
    return b.op(shape, aten.mul.Tensor, x, scale)


def linear(b: Builder, x: fx.Node, weight: fx.Node, out: int) -> fx.Node:
    """`[batch, tokens, n] -> [batch, tokens, out]`."""
    width = x.meta["type"].shape[-1]
    flat = b.op((BATCH * TOKENS, width), aten.reshape.default, x, [BATCH * TOKENS, width])
    product = b.op(
        (BATCH * TOKENS, out), aten.mm.default, flat, b.op((width, out), aten.t.default, weight)
    )
    return b.op((BATCH, TOKENS, out), aten.reshape.default, product, [BATCH, TOKENS, out])


def heads(b: Builder, x: fx.Node) -> fx.Node:
    """`[batch, tokens, heads * d] -> [batch, heads, tokens, d]`."""
    split = b.op(
        (BATCH, TOKENS, HEADS, HEAD_DIM), aten.reshape.default, x, [BATCH, TOKENS, HEADS, HEAD_DIM]
    )
    return b.op((BATCH, HEADS, TOKENS, HEAD_DIM), aten.transpose.int, split, 1, 2)


def block(b: Builder, x: fx.Node, where: fx.Node, layer: int) -> fx.Node:
    """One decoder layer: pd_mixed's prefill layouts."""
    width = HEADS * HEAD_DIM
    weight = {"kind": InputKind.PARAMETER}
    names = ("q", "k", "v")
    hidden = norm(b, x)
    q, k, v = (
        heads(
            b,
            linear(
                b,
                hidden,
                b.input(f"layers.{layer}.{n}.weight", (width, HIDDEN), None, **weight),
                width,
            ),
        )
        for n in names
    )
    shape = (BATCH, HEADS, CACHE, HEAD_DIM)
    filled = []
    for name, value in (("keys", k), ("values", v)):
        position = len(b.inputs)
        cache = b.input(f"cache.{layer}.{name}", shape, None, kind=InputKind.USER, mutated=True)
        written = b.op(shape, aten.index_copy.default, cache, 2, where, value)
        b.results.append(written)
        b.outputs.append(Output(position))
        filled.append(
            b.op(
                (BATCH * HEADS, CACHE, HEAD_DIM),
                aten.reshape.default,
                written,
                [BATCH * HEADS, CACHE, HEAD_DIM],
            )
        )
    queries = b.op(
        (BATCH * HEADS, TOKENS, HEAD_DIM),
        aten.reshape.default,
        q,
        [BATCH * HEADS, TOKENS, HEAD_DIM],
    )
    keys = b.op((BATCH * HEADS, HEAD_DIM, CACHE), aten.transpose.int, filled[0], 1, 2)
    scores = b.op((BATCH * HEADS, TOKENS, CACHE), aten.bmm.default, queries, keys)
    weights = b.op((BATCH * HEADS, TOKENS, CACHE), aten._softmax.default, scores, -1, False)
    mixed = b.op((BATCH * HEADS, TOKENS, HEAD_DIM), aten.bmm.default, weights, filled[1])
    mixed = b.op(
        (BATCH, HEADS, TOKENS, HEAD_DIM),
        aten.reshape.default,
        mixed,
        [BATCH, HEADS, TOKENS, HEAD_DIM],
    )
    mixed = b.op((BATCH, TOKENS, HEADS, HEAD_DIM), aten.transpose.int, mixed, 1, 2)
    mixed = b.op((BATCH, TOKENS, width), aten.reshape.default, mixed, [BATCH, TOKENS, width])
    out = b.input(f"layers.{layer}.o.weight", (HIDDEN, width), Shard(1, 1, HEADS), **weight)
    x = b.op((BATCH, TOKENS, HIDDEN), aten.add.Tensor, x, linear(b, mixed, out, HIDDEN))
    hidden = norm(b, x)
    gate = b.input(f"layers.{layer}.gate.weight", (INNER, HIDDEN), Shard(0, 1, INNER), **weight)
    up = b.input(f"layers.{layer}.up.weight", (INNER, HIDDEN), Shard(0, 1, INNER), **weight)
    down = b.input(f"layers.{layer}.down.weight", (HIDDEN, INNER), Shard(1, 1, INNER), **weight)
    inner = (BATCH, TOKENS, INNER)
    gated = b.op(inner, aten.silu.default, linear(b, hidden, gate, INNER))
    gated = b.op(inner, aten.mul.Tensor, gated, linear(b, hidden, up, INNER))
    return b.op((BATCH, TOKENS, HIDDEN), aten.add.Tensor, x, linear(b, gated, down, HIDDEN))


def program_of(nodes: int) -> Program:
    """A Program of at least `nodes` nodes, inputs included, in whole layers."""
    b = Builder()
    x = b.input("x", (BATCH, TOKENS, HIDDEN), Shard(1, 1, TOKENS), kind=InputKind.USER)
    where = b.input("where", (TOKENS,), None, kind=InputKind.USER)
    where.meta["type"] = TensorType((TOKENS,), torch.int64)
    layer = 0
    while len(b.graph.nodes) < nodes:
        x = block(b, x, where, layer)
        layer += 1
    b.results.append(x)
    b.outputs.append(Output())
    b.graph.output(tuple(b.results))
    return Program(
        f"layers={layer}",
        b.graph,
        tuple(b.inputs),
        tuple(b.outputs),
        mesh=Mesh({"tp": 4}),
        layouts=b.layouts,
    )


PASSES = (Propagate(), PushBack(), Partition(), Verify())


def measure(program: Program) -> list[float]:
    """Seconds of each pass in one run, under the conditions of the pipeline."""
    seconds = []
    with collection_paused():
        for step in PASSES:
            begin = time.perf_counter()
            program = step.apply(program)
            seconds.append(time.perf_counter() - begin)
    return seconds


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of the least-squares line through (log nodes, log seconds)."""
    xs = [math.log(nodes) for nodes, _ in points]
    ys = [math.log(seconds) for _, seconds in points]
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum(
        (x - mx) ** 2 for x in xs
    )


def main() -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs per size; the median counts")
    rounds = parser.parse_args().rounds
    programs = [program_of(size) for size in SIZES]
    measure(programs[0])  # rules are looked up by op once per process
    runs: list[list[list[float]]] = [[] for _ in programs]
    for _ in range(rounds):
        for index, program in enumerate(programs):
            gc.collect()
            runs[index].append(measure(program))
    print(f"{'nodes':>7}  {'us/node':>8}  " + "  ".join(f"{step.name:>10}" for step in PASSES))
    points = []
    for program, times in zip(programs, runs, strict=True):
        nodes = len(program.graph.nodes)
        total = statistics.median(sum(run) for run in times)
        parts = [statistics.median(run[i] for run in times) for i in range(len(PASSES))]
        points.append((nodes, total))
        print(
            f"{nodes:>7}  {total / nodes * 1e6:>8.1f}  "
            + "  ".join(f"{part / nodes * 1e6:>10.1f}" for part in parts)
        )
    slope = exponent(points)
    worst = max(total / nodes * 1e6 for nodes, total in points)
    print(f"growth exponent {slope:.3f} (limit {LIMIT_EXPONENT})")
    print(f"worst {worst:.1f} us/node (limit {LIMIT_US:.0f})")
    return 0 if worst <= LIMIT_US and slope <= LIMIT_EXPONENT else 1


if __name__ == "__main__":
    sys.exit(main())
