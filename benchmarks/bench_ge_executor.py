"""What the reference executor of GE graphs adds to each op.

Builds a graph of 500 small ops (unary and binary ones, lists of inputs, several outputs, views) and
runs it three ways, in turn: the same torch functions called in a plain loop, the executor, and the
executor without checks. Prints microseconds per op (the median of several rounds) and what each way
adds to the plain loop.

Limit: the executor adds at most 100 us per op, checks included.

Run: `python benchmarks/bench_ge_executor.py`. Exits 1 above the limit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from rolemesh.runtime.ge.executor import Executor
from rolemesh.runtime.ge.graph import Edge, Graph, Node, TensorDesc
from rolemesh.runtime.ge.ops.table import Attributes, OpTable

LIMIT_US = 100.0
OPS = 500
SHAPE = (3, 4)

TABLE = OpTable()


@TABLE.op("Neg")
def neg(a: Attributes, x: torch.Tensor) -> torch.Tensor:
    """One input."""
    return torch.neg(x)


@TABLE.op("Add", equal=("x1", "x2"))
def add(a: Attributes, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """Two inputs of one data type."""
    return torch.add(x1, x2)


@TABLE.op("ReshapeLike", view=True)
def reshape_like(a: Attributes, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view."""
    return x.view(like.shape)


@TABLE.op("AddN", dynamic=("x",), equal=("x",))
def add_n(a: Attributes, x: Sequence[torch.Tensor]) -> torch.Tensor:
    """A list of inputs."""
    return torch.add(x[0], x[1])


@TABLE.op("AddMul", equal=("x1", "x2"))
def add_mul(a: Attributes, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two outputs."""
    return torch.add(x1, x2), torch.mul(x1, x2)


INPUTS = {
    "Neg": ("x",),
    "Add": ("x1", "x2"),
    "ReshapeLike": ("x", "like"),
    "AddN": ("x0", "x1"),
    "AddMul": ("x1", "x2"),
}


def main() -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    nodes = random_nodes(OPS)
    graph = Graph.of("bench", nodes)
    inputs = [torch.randn(SHAPE), torch.randn(SHAPE)]
    checked = Executor(graph, TABLE.ops)
    unchecked = Executor(graph, TABLE.ops, check=False)
    plain = plain_loop(graph)
    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        "plain loop": lambda: plain(inputs),
        "executor": lambda: checked.run(inputs),
        "without checks": lambda: unchecked.run(inputs),
    }
    first = [way() for way in ways.values()]
    for other in first[1:]:
        if not all(map(torch.equal, first[0], other)):
            print("the ways give different results")
            return 1
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way) / OPS * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians["plain loop"]
    print(f"{OPS} ops on {list(SHAPE)}, {rounds} rounds")
    print(f"{'':<16}{'us/op':>8}{'added':>8}{'ratio':>8}")
    for name, value in medians.items():
        print(f"{name:<16}{value:>8.2f}{value - base:>8.2f}{value / base:>8.2f}")
    if medians["executor"] - base > LIMIT_US:
        print(f"above the limit of {LIMIT_US:g} us per op")
        return 1
    return 0


def seconds(way: Callable[[], object]) -> float:
    """How long a few runs take, per run."""
    repeats = 3
    start = time.perf_counter()
    for _ in range(repeats):
        way()
    return (time.perf_counter() - start) / repeats


def random_nodes(count: int) -> list[Node]:
    """Two inputs, `count` random ops on earlier tensors, and a result."""
    draw = random.Random(0)
    desc = TensorDesc("y", torch.float32, SHAPE, described=True, numel=12)
    nodes = [
        Node(f"x{index}", "Data", outputs=(desc,), attributes=Attributes({"index": index}))
        for index in range(2)
    ]
    edges = [Edge("x0", 0), Edge("x1", 0)]
    for index in range(count):
        kind = draw.choice(list(INPUTS))
        names = INPUTS[kind]
        sources = tuple(draw.choice(edges[-8:]) for _ in names)
        outputs = 2 if kind == "AddMul" else 1
        name = f"{kind}_{index}"
        nodes.append(
            Node(
                name,
                kind,
                sources,
                tuple(TensorDesc(name, torch.float32) for name in names),
                outputs=(desc,) * outputs,
            )
        )
        edges += [Edge(name, output) for output in range(outputs)]
    used = {edge for node in nodes for edge in node.inputs}
    ends = tuple(edge for edge in edges if edge not in used)
    descs = tuple(TensorDesc(f"input{i}", torch.float32, SHAPE) for i in range(len(ends)))
    return [*nodes, Node("out", "NetOutput", ends, descs)]


def plain_loop(graph: Graph) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """A function that calls the ops' functions one after the other."""
    attributes = Attributes({})
    calls = [
        (node, TABLE.ops[node.type].function)
        for node in graph.nodes.values()
        if node.type in TABLE.ops
    ]

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        values = {Edge("x0", 0): inputs[0], Edge("x1", 0): inputs[1]}
        with torch.no_grad():
            for node, function in calls:
                arguments = [values[edge] for edge in node.inputs if edge is not None]
                result = (
                    function(attributes, arguments)
                    if node.type == "AddN"
                    else function(attributes, *arguments)
                )
                results = result if isinstance(result, tuple) else (result,)
                for output, tensor in enumerate(results):
                    values[Edge(node.name, output)] = tensor
        return [values[edge] for edge in graph.net_output.inputs if edge is not None]

    return run


if __name__ == "__main__":
    sys.exit(main())
