"""Small things to lower: a bound graph that updates a cache, and a model whose ranks talk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.program import Input, InputKind, Output
from rolemesh.compiler.ir.spec import P
from rolemesh.lowering.ge.engine import LoadedGraph
from rolemesh.lowering.signature import Signature
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.ge.executor import Executor

__all__ = [
    "RANKS",
    "SIGNATURE",
    "Recorder",
    "dynamic_fakes",
    "sharded_mlp",
    "step",
    "step_graph",
    "step_inputs",
]

_aten = torch.ops.aten

SIGNATURE = Signature(
    "small.decode.rank0",
    (
        Input("x", InputKind.USER),
        Input("up.weight", InputKind.PARAMETER),
        Input("past.keys", InputKind.USER, mutated=True),
        Input("positions", InputKind.USER),
    ),
    (Output(mutates=2), Output()),
)
"""Signature of `step_graph`."""


def step_graph(scale: float = 0.5) -> fx.GraphModule:
    """New rows of a cache from tokens, and the whole cache scaled; see `step`."""
    graph = fx.Graph()
    x, weight, keys, positions = (graph.placeholder(name) for name in ("x", "w", "keys", "at"))
    rows = graph.call_function(_aten.mm.default, (x, weight))
    new = graph.call_function(_aten.index_copy.default, (keys, 0, positions, rows))
    scaled = graph.call_function(_aten.mul.Tensor, (new, scale))
    graph.output((new, graph.call_function(_aten.relu.default, (scaled,))))
    return fx.GraphModule(nn.Module(), graph)


def step_inputs(dtype: torch.dtype = torch.float32, tokens: int = 3) -> list[Tensor]:
    """Inputs of `step_graph`: values that differ, and positions in no order."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 8), (8, 5), (7, 5))
    floats = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [*floats, torch.randperm(7, generator=generator)[:tokens]]


def step(inputs: Sequence[Tensor], scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """What `step_graph` computes."""
    x, weight, keys, positions = inputs
    new = keys.index_copy(0, positions, x @ weight)
    return new, (new * scale).relu()


def dynamic_fakes(inputs: Sequence[Tensor]) -> list[FakeTensor]:
    """Fake inputs of `step_graph` whose number of tokens is one symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for name, tensor, dynamic in zip("xwkp", inputs, (True, False, False, True), strict=True):
        kinds = [DimDynamic.STATIC] * tensor.ndim
        kinds[0] = DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes.append(mode.from_tensor(tensor, symbolic_context=context, source=LocalSource(name)))
    return fakes


class Recorder(ReferenceEngine):
    """The reference engine, which remembers the graphs that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs: list[LoadedGraph] = []

    def load(self, graph: LoadedGraph) -> Executor:
        self.graphs.append(graph)
        return super().load(graph)


class Mlp(nn.Module):
    """Two linears, and a running sum that the call updates."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
        self.register_buffer("seen", torch.zeros(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        """`[5, 6]` to `[5, 6]`."""
        y = self.down(torch.relu(self.up(x)))
        self.seen.add_(y)
        return y + x


RANKS = 3
"""Ranks that split the 10 hidden units of `sharded_mlp` unevenly."""


def sharded_mlp(ranks: int = RANKS) -> tuple[Sharded, Mlp]:
    """The model split over ranks, whose results they add up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mlp().requires_grad_(False)
    annotations = {"up.weight": P("tp"), "down.weight": P(None, "tp")}
    traced = trace(model, torch.zeros(5, 6))
    return shard(traced, {"tp": ranks}, annotations=annotations), model
