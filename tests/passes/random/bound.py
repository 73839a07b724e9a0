"""Running the bound graphs of all ranks in this process: real rank graphs, exchanges done here.

Every rank's graph runs until it starts a collective; when all ranks wait at the same one, the
tensors of each group are exchanged and all go on. This is what gloo would do, without processes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from tests.passes.random.check import Locals, Sharded
from torch import fx

from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.lowering.bind import bind
from rolemesh.lowering.chunks import reduce_values

__all__ = ["on_bound_graphs"]

ops = torch.ops._c10d_functional
_GROUP = "group of "
Start = tuple[torch._ops.OpOverload, tuple[Any, ...]]


def on_bound_graphs(sharded: Sharded, inputs: Locals) -> list[list[torch.Tensor | None]]:
    """Run one graph per rank, with the values of symbols as integer inputs."""
    program = sharded.program
    mesh = program.the_mesh
    groups = {name: _GROUP + name for name in mesh.names}
    sizes = [sharded.values[symbol] for symbol in program.hints]
    runs = []
    for rank in range(mesh.size):
        module = bind(program, rank, groups)
        arguments = [locals_[rank] for locals_ in inputs]
        runs.append(_run(module, [*arguments, *sizes]))
    results = _together(runs, mesh)
    return [list(ranks) for ranks in zip(*results, strict=True)]


def _run(module: fx.GraphModule, inputs: Sequence[Any]) -> Generator[Start, torch.Tensor, Any]:
    """Runs a graph; yields each collective that it starts, and is sent its result."""
    values: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]
            assert node.op == "call_function"
            if node.target is ops.wait_tensor.default:
                values[node] = args[0]
            elif str(node.target).startswith("_c10d_functional."):
                values[node] = yield node.target, args
            else:
                values[node] = node.target(*args, **kwargs)
    raise AssertionError("a graph has an output")


def _together(runs: Sequence[Generator[Start, torch.Tensor, Any]], mesh: Mesh) -> list[Any]:
    answers: list[Any] = [None] * len(runs)
    while True:
        starts: list[Start] = []
        results: list[Any] = []
        for run, answer in zip(runs, answers, strict=True):
            try:
                starts.append(run.send(answer))
            except StopIteration as stop:
                results.append(stop.value)
        if not starts:
            return results
        targets = {target for target, _ in starts}
        if results or len(targets) > 1:
            raise RuntimeError(f"ranks start {targets}, {len(results)} are done")
        answers = [_exchanged(starts, rank, mesh) for rank in range(mesh.size)]


def _exchanged(starts: Sequence[Start], rank: int, mesh: Mesh) -> torch.Tensor:
    """What one rank gets from the collective that all start."""
    target, args = starts[rank]
    axis = mesh.index(args[-1].removeprefix(_GROUP))
    mine = mesh.coordinate(rank)
    peers = [
        other
        for other in range(mesh.size)
        if all(i == axis or c == mine[i] for i, c in enumerate(mesh.coordinate(other)))
    ]
    wires = [starts[other][1][0] for other in peers]
    if len({wire.shape for wire in wires}) > 1:
        raise RuntimeError(f"{target} of {[list(wire.shape) for wire in wires]}")
    place = peers.index(rank)
    if target is ops.all_gather_into_tensor.default:
        return torch.cat(wires)
    if target is ops.reduce_scatter_tensor.default:
        return reduce_values(wires, args[1]).chunk(len(peers))[place].clone()
    if target is ops.all_reduce.default:
        return reduce_values(wires, args[1]).clone()
    if target is ops.all_to_all_single.default:
        return torch.cat([wire[place : place + 1] for wire in wires])
    assert target is ops.broadcast.default
    return wires[args[1]].clone()
