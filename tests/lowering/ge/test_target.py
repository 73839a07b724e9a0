"""Lowering to GE: values, memory written in place, dynamic dims, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.lowering.ge.lowered import dynamic_examples, module_of, signature_of
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.engine import LoadedGraph, running_on
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import Converted, lower_ge
from rolemesh.runtime.ge.engine import ReferenceEngine
from rolemesh.runtime.ge.executor import Executor

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
BATCH, CAPACITY, WIDTH = 2, 16, 5


class Engine(ReferenceEngine):
    """Keeps what it loaded."""

    loaded: Executor
    graph: LoadedGraph

    def load(self, graph: LoadedGraph) -> Executor:
        self.graph = graph
        self.loaded = super().load(graph)
        return self.loaded


def attend(cache: Tensor, where: Tensor, keys: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """New keys go into a cache; the queries made of them attend to all of it."""
    cache = torch.ops.aten.index_copy.default(cache, 1, where, keys)
    scores = torch.softmax((keys @ weight) @ cache.transpose(1, 2), -1)
    return cache, scores @ cache


def arguments(tokens: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(tokens)
    cache = torch.randn(BATCH, CAPACITY, WIDTH).to(dtype)
    keys = torch.randn(BATCH, tokens, WIDTH).to(dtype)
    return [cache, torch.arange(3, 3 + tokens), keys, torch.randn(WIDTH, WIDTH).to(dtype)]


def lowered(examples: Sequence[Tensor], options: GeOptions | None = None) -> Converted:
    module = module_of(attend, 4, 2)
    return lower_ge(module, examples, signature_of(4, 2, {0: 0}, [3]), options)


def equal(run: Converted, given: Sequence[Tensor], engine: Engine) -> None:
    want = attend(*given)
    mine = [x.clone() for x in given]
    with running_on(engine):
        got = run(*mine)
    tolerance = TOLERANCES[given[0].dtype]
    for expected, found in zip(want, got, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert got[0] is mine[0], "the cache is updated in place"
    assert torch.equal(mine[0], want[0])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("tokens", [1, 7])
def test_static_graphs(tokens: int, dtype: torch.dtype) -> None:
    run, engine = lowered(arguments(tokens, dtype)), Engine()
    equal(run, arguments(tokens, dtype), engine)
    equal(run, arguments(tokens, dtype), engine)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_dynamic_graph_serves_every_token_count(dtype: torch.dtype) -> None:
    examples = dynamic_examples(arguments(7, dtype), {1: [0], 2: [1]})
    run, engine = lowered(examples), Engine()
    for tokens in (7, 4, 1, 11):
        equal(run, arguments(tokens, dtype), engine)
    assert engine.graph.input_shapes[2] == (BATCH, -1, WIDTH)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("dynamic", [False, True])
def test_nothing_as_large_as_the_cache_is_copied(tokens: int, dynamic: bool) -> None:
    given = arguments(tokens)
    examples = dynamic_examples(given, {1: [0], 2: [1]}) if dynamic and tokens > 1 else given
    run, engine = lowered(examples), Engine()
    equal(run, given, engine)
    assert [copy for copy in engine.loaded.copies if copy.bytes >= given[0].nbytes] == []


def test_a_graph_for_other_shapes_refuses_the_arguments() -> None:
    run = lowered(arguments(7))
    with running_on(Engine()), pytest.raises(RolemeshError) as caught:
        run(*arguments(6))
    assert caught.value.code == "RM029"


def test_what_cannot_be_converted_is_refused_before_anything_runs() -> None:
    def found(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.aten.special_airy_ai.default(x),)

    module = module_of(found, 1, 1)
    with pytest.raises(RolemeshError) as caught:
        lower_ge(module, [torch.randn(3)], signature_of(1, 1))
    error = caught.value
    assert error.code == "RM026"
    assert "aten.special_airy_ai" in str(error)
    assert "layers.1" in str(error)
    assert "model.py:12" in str(error)


def test_bad_options_are_refused() -> None:
    for given, said in (
        ({"device": "gpu"}, "it must be one of auto, cpu, npu"),
        ({"fuse": "yes"}, "it must be True or False"),
        ({"cache_required": 0}, "it must be True or False"),
        ({"dump": 3}, "it must be the path of a folder"),
        ({"dim_gears": {"x": {0: [4]}}}, "it must be for each dim at least two sizes above 0"),
    ):
        with pytest.raises(RolemeshError) as caught:
            GeOptions(**given)  # type: ignore[arg-type]
        assert caught.value.code == "RM018"
        assert caught.value.why == said
