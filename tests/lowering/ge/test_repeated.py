"""Layers that are lowered a few times and copied: the graph of lowering all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.lowering.ge.lowered import dynamic_examples, signature_of
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.flatten import as_fake, fake_mode_of
from rolemesh.lowering.ge import stamp
from rolemesh.lowering.ge.engine import running_on
from rolemesh.lowering.ge.graph_text import graph_text
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import Converted, lower_ge, prepare
from rolemesh.lowering.signature import Signature
from rolemesh.runtime.ge.engine import ReferenceEngine

BATCH, CAPACITY, WIDTH = 2, 11, 5
FEW, WHOLE = GeOptions(repeats=5), GeOptions(repeats=1000)

Model = Callable[..., Sequence[Tensor]]


def layer(x: Tensor, where: Tensor, weights: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
    """A decoder layer: keys go into a cache, whose rows up to now are attended to."""
    gain, up, down, cache = weights
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * gain
    keys = normed @ up.t()
    cache = torch.index_copy(cache, 1, where, keys)
    seen = torch.arange(CAPACITY) <= where[:, None]
    scores = torch.where(seen, keys @ cache.mT * scale, -1e9)
    x = x + torch.softmax(scores, -1) @ cache
    gate = torch.nn.functional.silu(x @ up.t())
    return x + (gate * (x @ down.t())) @ down, cache


def model(layers: int, scale: Callable[[int], float] = lambda index: 0.25) -> Model:
    """Layers on top of each other, as a function of two inputs and the layers' weights and caches.

    Returns the result, and the new values of the caches.
    """

    def run(x: Tensor, where: Tensor, *given: Tensor) -> Sequence[Tensor]:
        caches = []
        for index in range(layers):
            x, cache = layer(x, where, given[4 * index : 4 * index + 4], scale(index))
            caches.append(cache)
        return (torch.tanh(x), *caches)

    return run


def arguments(layers: int, tokens: int) -> list[Tensor]:
    """Its arguments; the layers do not have the same weights."""
    generator = torch.Generator().manual_seed(tokens)

    def some(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator) / 2

    given = [some(BATCH, tokens, WIDTH), torch.arange(2, 2 + tokens)]
    for _ in range(layers):
        given += [some(WIDTH), some(WIDTH, WIDTH), some(WIDTH, WIDTH)]
        given += [some(BATCH, CAPACITY, WIDTH)]
    return given


def signature(layers: int) -> Signature:
    caches = {index + 1: 4 * index + 5 for index in range(layers)}
    weights = [2 + 4 * index + k for index in range(layers) for k in range(3)]
    return signature_of(2 + 4 * layers, 1 + layers, caches, weights)


def traced(run: Model, examples: Sequence[Tensor]) -> fx.GraphModule:
    """The graph of a model, as binding leaves one: nothing but calls of functions."""
    fakes = as_fake(examples)
    mode = fake_mode_of(fakes)
    assert mode is not None
    with mode:
        return make_fx(run)(*fakes)


def lowered(
    run: Model, examples: Sequence[Tensor], layers: int, options: GeOptions | None = None
) -> Converted:
    return lower_ge(traced(run, examples), examples, signature(layers), options)


def text(converted: Converted) -> Sequence[str]:
    """The text of a graph without its first line, the number that torchair gave it."""
    graph = converted.compiled.runner.graph  # type: ignore[attr-defined]
    return graph_text(graph.model.graph[0]).splitlines()[1:]


def computes(converted: Converted, run: Model, given: Sequence[Tensor]) -> None:
    """A call gives what the model does, with caches updated in place."""
    want, mine = run(*given), [tensor.clone() for tensor in given]
    with running_on(ReferenceEngine()):
        got = converted(*mine)
    caches = mine[5::4]
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for found, cache in zip(got[1:], caches, strict=True):
        assert found is cache


@pytest.fixture
def stamped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many repeats each call of a stamp added."""
    added: list[int] = []
    convert = stamp.Stamp.convert

    def counted(self: stamp.Stamp, given: dict[str, object]) -> list[object]:
        added.append(self.repeats)
        return convert(self, given)

    monkeypatch.setattr(stamp.Stamp, "convert", counted)
    return added


def test_the_graph_is_the_one_that_all_layers_give(stamped: list[int]) -> None:
    given = arguments(7, 3)
    few, whole = (lowered(model(7), given, 7, options) for options in (FEW, WHOLE))
    assert stamped == [2], "the first layer is not among those that are alike"
    assert text(few) == text(whole)
    assert few.kept == whole.kept == (0,)
    computes(few, model(7), given)


def test_sizes_may_be_symbols(stamped: list[int]) -> None:
    few = lowered(model(6), dynamic_examples(arguments(6, 3), {0: [1], 1: [0]}), 6, FEW)
    assert stamped == [1]
    computes(few, model(6), arguments(6, 5))


def test_what_is_converted_does_not_grow_with_the_depth() -> None:
    def converted(layers: int) -> int:
        examples = as_fake(arguments(layers, 3))
        module = traced(model(layers), examples)
        torchair = load_torchair()
        graph, _ = prepare(module, examples, signature(layers), FEW, torchair)
        return sum(node.op == "call_function" for node in graph.graph.nodes)

    assert converted(6) == converted(8)


@pytest.mark.parametrize(
    ("scale", "added"),
    [
        (lambda index: 0.25 if index < 6 else 0.5, [1]),
        (lambda index: 0.5 if index in (2, 5) else 0.25, []),
    ],
    ids=["last", "many"],
)
def test_layers_that_are_not_alike(
    scale: Callable[[int], float], added: list[int], stamped: list[int]
) -> None:
    run, given = model(7, scale), arguments(7, 1)
    few = lowered(run, given, 7, FEW)
    assert stamped == added
    computes(few, run, given)


def test_two_kinds_of_layers_take_turns(stamped: list[int]) -> None:
    run, given = model(12, lambda index: (0.25, 0.5)[index % 2]), arguments(12, 1)
    few = lowered(run, given, 12, FEW)
    assert stamped == [1], "two layers are one repeat"
    computes(few, run, given)


def test_a_value_of_an_early_layer_is_read_at_the_end() -> None:
    def run(x: Tensor, where: Tensor, *given: Tensor) -> Sequence[Tensor]:
        states, caches = [x], []
        for weights in zip(*[iter(given)] * 4, strict=True):
            x, cache = layer(x, where, weights, 0.25)
            states.append(x)
            caches.append(cache)
        return (x * states[2], *caches)

    given = arguments(8, 1)
    computes(lowered(run, given, 8, FEW), run, given)


def test_a_model_that_returns_what_its_layers_compute_is_lowered_whole(stamped: list[int]) -> None:
    def run(x: Tensor, where: Tensor, *given: Tensor) -> Sequence[Tensor]:
        states = [x]
        for weights in zip(*[iter(given)] * 4, strict=True):
            states.append(layer(states[-1], where, weights, 0.25)[0])
        return states[1:]

    given = arguments(6, 1)
    converted = lower_ge(traced(run, given), given, signature_of(len(given), 6), FEW)
    assert stamped == []
    with running_on(ReferenceEngine()):
        for found, expected in zip(converted(*given), run(*given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_alike_in_torch_only_is_lowered_whole(
    monkeypatch: pytest.MonkeyPatch, stamped: list[int]
) -> None:
    given = arguments(6, 1)
    monkeypatch.setattr(stamp, "_plain", lambda op: op.name)
    whole = lowered(model(6), given, 6, FEW)
    assert stamped == [1], "it was tried"
    computes(whole, model(6), given)


def test_the_fewest_layers_are_a_number() -> None:
    with pytest.raises(RolemeshError) as caught:
        GeOptions(repeats=1)
    assert caught.value.code == "RM018"
    assert caught.value.why == "it must be a whole number from 2 on"
