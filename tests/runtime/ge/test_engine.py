"""The engine loads what torchair announces, runs it, and refuses what it does not know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.runtime.ge.graphs import Builder
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.engine import LoadedGraph, running_on
from rolemesh.lowering.ge.loader import coded_errors, load_torchair
from rolemesh.runtime.ge.communicator import Communicator
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.ge.executor import Executor
from rolemesh.runtime.ge.graph import Node
from rolemesh.runtime.ge.ops import all as every_op
from rolemesh.runtime.ge.ops.all import OPS, merged
from rolemesh.runtime.ge.ops.table import Attributes, OpTable
from rolemesh.runtime.ge.rendezvous import Rendezvous


def loaded(
    model: bytes, placements: tuple[int, ...] = (0,), output_dtypes: tuple[int, ...] = (0,)
) -> LoadedGraph:
    return LoadedGraph("graph", model, {}, placements, output_dtypes, on_device=False)


def negation(kind: str = "Neg") -> bytes:
    build = Builder()
    build.op(kind, {"x": build.data([2])})
    return build.results((f"{kind}:0", [2]))


def test_a_graph_is_loaded_and_run() -> None:
    seen: list[str] = []

    def observe(node: Node, results: tuple[torch.Tensor, ...]) -> None:
        seen.append(node.name)

    engine = ReferenceEngine(observe=observe)
    (result,) = engine.load(loaded(negation())).run([torch.tensor([1.0, -2.0])], [])
    assert result.tolist() == [-1.0, 2.0]
    assert seen == ["arg0", "Neg"]


def refusal(graph: LoadedGraph, code: str) -> RolemeshError:
    with pytest.raises(RolemeshError) as caught:
        ReferenceEngine().load(graph)
    assert caught.value.code == code
    return caught.value


def test_another_interface_than_announced() -> None:
    error = refusal(loaded(negation(), placements=(0, 1)), "RM027")
    assert error.what == "a graph has 1 inputs, 2 were announced"
    error = refusal(loaded(negation(), output_dtypes=(27,)), "RM027")
    assert error.what == "a graph's results are float32; announced were bfloat16"
    error = refusal(loaded(negation(), output_dtypes=()), "RM027")
    assert error.what == "a graph's results are float32; announced were none"


def test_unknown_ops_and_malformed_graphs() -> None:
    assert refusal(loaded(negation("Frobnicate")), "RM028").what.endswith(": Frobnicate")
    assert refusal(loaded(b""), "RM027").what == "there is no GE graph in a model"


def test_options_reach_the_executor() -> None:
    build = Builder()
    x, y = build.data([2]), build.data([2], torch.bfloat16)
    build.op("Add", {"x1": x, "x2": y})
    graph = loaded(build.results(("Add:0", [2])), (0, 0))
    inputs = [torch.ones(2), torch.ones(2, dtype=torch.bfloat16)]
    with pytest.raises(RolemeshError, match="RM027"):
        ReferenceEngine().load(graph).run(inputs)
    assert ReferenceEngine(check=False).load(graph).run(inputs)[0].tolist() == [2.0, 2.0]


def collective(rank: int) -> bytes:
    """Scales by the rank + 1 and gathers."""
    build = Builder()
    x = build.data([2])
    factor = build.const(torch.tensor(rank + 1.0))
    build.op("Mul", {"x1": x, "x2": factor})
    build.op("HcomAllGather", {"x": "Mul:0"}, rank_size=2, group="tag=;rank_list=0,1")
    return build.results(("HcomAllGather:0", [4]))


def test_ranks_of_one_process_run_their_graphs_again_and_again() -> None:
    models = [collective(rank) for rank in range(2)]
    rendezvous = Rendezvous(2)
    graphs: dict[int, Executor] = {}

    def run(rank: int, to: Communicator) -> list[float]:
        if rank not in graphs:
            graphs[rank] = ReferenceEngine(to, seed=rank).load(loaded(models[rank]))
        return graphs[rank].run([torch.tensor([1.0, 10.0])])[0].tolist()

    for _ in range(3):
        assert rendezvous.run(run) == [[1.0, 10.0, 2.0, 20.0]] * 2


# --------------------------------------------------------------------------------------------------
# Through torchair.


def step(x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Reads a cache, writes it, and returns its old value, a view and a size."""
    old = cache.clone()
    total = torch.relu(x) + cache
    torch.ops.aten.copy_(cache, torch.sigmoid(total))
    return old, total.reshape(-1), total * x.shape[0]


def traced(
    function: Callable[..., object], tensors: list[torch.Tensor], dynamic: bool
) -> tuple[fx.GraphModule, list[FakeTensor]]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dims = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC, DimDynamic.STATIC]
    fakes = []
    for index, tensor in enumerate(tensors):
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        source = torch._dynamo.source.ConstantSource(f"x{index}")
        fakes.append(mode.from_tensor(tensor, symbolic_context=context, source=source))
    with mode:
        return make_fx(function)(*fakes), fakes


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_graph_of_torchair(dynamic: bool, seed: int | None) -> None:
    torchair = load_torchair().module
    graph, fakes = traced(step, [torch.empty(3, 4), torch.empty(3, 4)], dynamic)
    config = torchair.CompilerConfig()
    with torch.no_grad(), tracing(TracingContext(fakes[0].fake_mode)):
        compiled = torchair.get_compiler(config)(graph, fakes)
    with running_on(ReferenceEngine(seed=seed)):
        for rows in (3, 5) if dynamic else (3,):
            x, cache = torch.randn(rows, 4), torch.randn(rows, 4)
            expected_cache = cache.clone()
            expected = step(x, expected_cache)
            results = compiled(x, cache)
            for result, other in zip(results, expected, strict=True):
                torch.testing.assert_close(result, other)
            torch.testing.assert_close(cache, expected_cache)


def test_errors_come_through_torchair() -> None:
    torchair = load_torchair().module
    examples = [torch.empty(3, 4), torch.empty(3, 4)]
    graph, fakes = traced(lambda x, y: (x + y,), examples, dynamic=False)
    with torch.no_grad(), tracing(TracingContext(fakes[0].fake_mode)):
        compiled = torchair.get_compiler(torchair.CompilerConfig())(graph, fakes)
    with running_on(ReferenceEngine()):
        compiled(torch.ones(3, 4), torch.ones(3, 4))
        with pytest.raises(RolemeshError) as caught, coded_errors():
            compiled(torch.ones(3, 4), torch.ones(4, 4))
    assert caught.value.code == "RM029"
    assert caught.value.what == "input 1 is float32 [4, 4]"


# --------------------------------------------------------------------------------------------------
# The table of all ops.


def test_an_op_type_is_in_one_family_only() -> None:
    def enter(table: OpTable) -> None:
        @table.op("Neg", "Abs")
        def same(a: Attributes, x: torch.Tensor) -> torch.Tensor:
            return x

    first, second = OpTable(), OpTable()
    enter(first)
    assert set(merged([first, second])) == {"Neg", "Abs"}
    enter(second)
    with pytest.raises(ValueError, match="op types are in two tables: Abs, Neg"):
        merged([first, second])


def test_every_family_is_in_the_table_of_all_ops() -> None:
    folder = Path(str(every_op.__file__)).parent
    families = {
        path.stem for path in folder.glob("*.py") if "\nOPS = OpTable()" in path.read_text()
    }
    assert {family.__name__.rpartition(".")[2] for family in every_op._FAMILIES} == families
    assert {"MatMulV2", "HcomAllGather"} <= set(OPS)
