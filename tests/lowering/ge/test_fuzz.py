"""Random graphs through torchair and the reference executor equal eager PyTorch.

A failing graph is cut down to the fewest ops that still fail and written as a script of its own,
whose path the failure shows. The tests run 1,500 graphs; a longer run, with the files in FOLDER:

    python -m tests.lowering.ge.test_fuzz 0 5000 FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tests.lowering.ge.random_graphs import Grown, grow
from tests.lowering.ge.random_ops import OPS
from torch import Tensor, fx

from rolemesh.compiler.ir.program import Input, InputKind, Output
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.lowering.signature import Signature
from rolemesh.runtime.ge.engine import ReferenceEngine

CASES = 300
BATCHES = 30
# Ops run one by one in the dtype that eager uses, so only the order of sums differs. A value that
# was once rounded to 16 bits differs as those do.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


def run_ge(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    (end,) = module.graph.find_nodes(op="output")
    signature = Signature(
        "fuzz",
        tuple(Input(f"x{i}", InputKind.USER) for i in range(len(inputs))),
        tuple(Output() for _ in end.args[0]),
    )
    run = lower_ge(module, inputs, signature)
    with running_on(ReferenceEngine()):
        return run(*inputs)


def problem(grown: Grown) -> str:
    """What is wrong with a graph's results; empty if they are right."""
    want = grown.module(*grown.inputs)
    try:
        got = run_ge(grown.module, grown.inputs)
    except Exception as error:  # noqa: BLE001 - any failure is a finding, to be cut down
        return f"{type(error).__name__}: {error}"
    dtypes = {x.dtype for x in grown.inputs} | {
        node.kwargs.get("dtype") for node in grown.module.graph.nodes
    }
    coarsest = max(TOLERANCES.get(dtype, 0.0) for dtype in dtypes)
    for index, (expected, found) in enumerate(zip(want, got, strict=True)):
        tolerance = max(coarsest, TOLERANCES[torch.float32]) * expected.is_floating_point()
        try:
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            return f"output {index}: {error}"
    return ""


def shrunk(grown: Grown) -> Grown:
    """A graph with the fewest ops that still fails: single ops first, then ever longer ones."""
    values: dict[fx.Node, object] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    Recorder(grown.module).run(*grown.inputs)
    calls = [n for n in grown.module.graph.nodes if n.op == "call_function"]
    for length in range(1, len(calls)):
        for end in range(length, len(calls) + 1):
            part = _cut(calls[end - length : end], values)
            if part is not None and problem(part):
                return part
    return grown


def _cut(calls: list[fx.Node], values: dict[fx.Node, object]) -> Grown | None:
    """A graph of some consecutive ops, on the values that they had."""
    outside = dict.fromkeys(x for n in calls for x in n.all_input_nodes if x not in calls)
    if not all(isinstance(values[node], Tensor) for node in outside):
        return None
    graph = fx.Graph()
    copies = {node: graph.placeholder(f"x{i}") for i, node in enumerate(outside)}
    inputs = [values[node] for node in outside]
    for node in calls:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    used = {operand for node in calls for operand in node.all_input_nodes}
    ends = [n for n in calls if n not in used and isinstance(values[n], Tensor)]
    if not ends:
        return None
    graph.output(tuple(copies[n] for n in ends))
    module = fx.GraphModule(torch.nn.Module(), graph)
    return Grown(module, tuple(inputs), tuple(str(n.target) for n in calls))


def script(grown: Grown, what: str) -> str:
    """A file that runs a graph in eager PyTorch and prints its results."""
    torch.set_printoptions(threshold=10**6, precision=9)
    lines = [f"# {line}" for line in what.splitlines()]
    lines += [
        "import torch",
        "from torch import tensor, device",
        "",
        "",
        "class Graph(torch.nn.Module):",
    ]
    lines += [f"    {line}" for line in grown.module.code.splitlines()]
    lines += ["", "", "inputs = ["]
    for x in grown.inputs:
        data = x.float().tolist() if x.is_floating_point() else x.tolist()
        empty = f"torch.empty_strided({list(x.shape)}, {list(x.stride())}, dtype={x.dtype})"
        lines.append(f"    {empty}.copy_(torch.tensor({data})),")
    return "\n".join([*lines, "]", "print(Graph()(*inputs))", ""])


def failure(seed: int, folder: Path) -> str:
    """What is wrong with the graph of a seed, and the file that shows it; empty if it is right."""
    grown = grow(seed)
    if not problem(grown):
        return ""
    small = shrunk(grown)
    path = folder / f"ge_fuzz_{seed}.py"
    path.write_text(script(small, f"seed {seed}\n{problem(small)}"))
    return f"seed {seed}: {', '.join(small.ops)}: {problem(small)}\nwritten to {path}"


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_graphs_equal_eager(batch: int, tmp_path: Path) -> None:
    for seed in range(batch, CASES, BATCHES):
        found = failure(seed, tmp_path)
        if found:
            pytest.fail(found)


def test_the_graphs_use_every_op() -> None:
    seen = {name for seed in range(300) for name in grow(seed).ops}
    assert seen == set(OPS)


def test_a_failure_is_cut_down_to_the_op_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = next(g for g in map(grow, range(100)) if "silu" in g.ops[2:8])

    def wrong_for_silu(candidate: Grown) -> str:
        targets = [str(n.target) for n in candidate.module.graph.nodes]
        return "wrong" if "aten.silu.default" in targets else ""

    monkeypatch.setitem(globals(), "problem", wrong_for_silu)
    small = shrunk(grown)
    assert small.ops == ("aten.silu.default",)
    assert "torch.ops.aten.silu.default" in script(small, "wrong")


def main(first: str, last: str, folder: str) -> int:
    """Run the seeds of a range; the exit status is 1 if one fails."""
    seeds = range(int(first), int(last))
    failures = [found for seed in seeds if (found := failure(seed, Path(folder)))]
    print(*failures, f"{len(seeds)} graphs, {len(failures)} mismatches", sep="\n")  # noqa: T201
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
