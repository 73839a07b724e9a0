"""Repeated layers traced once give the Program that tracing each of them gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tests.models import forget_compiled
from torch import fx, nn

import rolemesh
from rolemesh.compiler.capture import alike, regions
from rolemesh.compiler.capture import graph as graph_module
from rolemesh.compiler.capture.bodies import Outlined
from rolemesh.compiler.capture.outline import outline
from rolemesh.compiler.ir.program import Program, origin
from rolemesh.compiler.models.cases import Case, load_case

LAYERS = 5
"""One more than a region takes; deepseek_v32's first layer differs from the others."""


@pytest.fixture
def outlined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bodies each capture had."""
    counts: list[int] = []

    def counting(module: fx.GraphModule, marks: regions.Marks | None) -> Outlined:
        found = outline(module, marks)
        counts.append(len({id(call.body) for call in found.calls}))
        return found

    monkeypatch.setattr(graph_module, "outline", counting)
    return counts


def ops(program: Program) -> list[object]:
    """Everything about the ops of a Program but their names and the order of the inputs."""
    labels: dict[fx.Node, str] = {
        node: entry.name for node, entry in zip(program.placeholders, program.inputs, strict=True)
    }
    found: list[object] = []
    for node in program.ops:
        labels[node] = str(len(found))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: f"<{labels[n]}>")
        where = origin(node)
        found.append(
            (
                node.target,
                str(node.meta["type"]),
                str(args),
                str(kwargs),
                where.module,
                where.source,
            )
        )
    results = [
        ("" if output.mutates is None else program.inputs[output.mutates].name, labels[value])
        for output, value in zip(program.outputs, program.results, strict=True)
        if isinstance(value, fx.Node)
    ]
    return [*found, sorted(results), sorted(entry.name for entry in program.inputs)]


def traces(case: Case, dynamic: bool = False) -> Iterator[Program]:
    """The Program of each phase, traced afresh."""
    forget_compiled()
    for args, kwargs in case.phases.values():
        if dynamic and args[0].shape[1] > 1:  # type: ignore[attr-defined]
            torch._dynamo.mark_dynamic(args[0], 1)
        with torch.no_grad():
            yield rolemesh.trace(case.model, *args, **kwargs).program


@pytest.mark.parametrize(
    ("model", "dynamic"), [("llama", True), ("deepseek_v32", False)], ids=["symbolic", "plain"]
)
def test_the_program_is_that_of_every_layer_traced(
    model: str, dynamic: bool, outlined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(f"hf:{model}", tokens=11, batch=3, layers=LAYERS)
    once = [ops(program) for program in traces(case, dynamic)]
    assert outlined == [1, 1]
    monkeypatch.setattr(alike, "_LEAST", LAYERS + 1)
    each = [ops(program) for program in traces(case, dynamic)]
    assert outlined == [1, 1, 0, 0]
    assert once == each


def test_layers_with_caches_of_two_kinds_have_two_bodies(outlined: list[int]) -> None:
    case = load_case("hf:gpt_oss", tokens=11, batch=1, layers=8)
    next(traces(case))
    assert outlined == [2]


@pytest.mark.parametrize("name", ["llama", "mistral"])  # the latter's cache counts in Python too
def test_a_model_is_restored_and_other_caches_are_taken(name: str, outlined: list[int]) -> None:
    case = load_case(f"hf:{name}", tokens=11, batch=3, layers=LAYERS)
    layers = [dict(vars(module)) for module in case.model.model.layers.modules()]  # type: ignore[union-attr]
    args, kwargs = case.phases["prefill"]
    with torch.no_grad():
        traced = rolemesh.trace(case.model, *args, **kwargs)
        after = [dict(vars(module)) for module in case.model.model.layers.modules()]  # type: ignore[union-attr]
        assert after == layers
        sharded = rolemesh.shard(traced, {"tp": 3}, role="decode", phase="decode")
        for _ in range(2):  # each time with a cache of its own
            one, other = case.fresh().phases["prefill"], case.fresh().phases["prefill"]
            got = rolemesh.lockstep(sharded, *one[0], **one[1])
            want = case.model(*other[0], **other[1])
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
            for mine, theirs in zip(
                one[1]["past_key_values"].layers,  # type: ignore[attr-defined]
                other[1]["past_key_values"].layers,  # type: ignore[attr-defined]
                strict=True,
            ):
                assert theirs.keys.any()
                torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-5)
                assert integers(mine) == integers(theirs)
    assert outlined == [1]


def integers(part: object) -> dict[str, int]:
    """What a part of a cache counts."""
    return {name: value for name, value in vars(part).items() if isinstance(value, int)}


class Layer(nn.Module):
    """A layer whose forward is a function of it and its input."""

    def __init__(self, index: int, forward: Callable[[Layer, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer_idx = index
        self.scale = 1.0
        self.seen = 0
        self.linear = nn.Linear(6, 6, bias=False)
        self.function = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


class Stack(nn.Module):
    """Layers one after another."""

    def __init__(
        self, forward: Callable[[Layer, torch.Tensor], torch.Tensor], layers: int = 6
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(index, forward) for index in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def plain(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(layer.linear(x)) * layer.scale


def by_index(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return layer.linear(x) if layer.layer_idx % 2 else layer.linear(x).sin()


def counting(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    layer.seen += 1
    return layer.linear(x) * layer.seen


def run(model: Stack) -> torch.Tensor:
    """What the traced model gives on two ranks."""
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    with torch.no_grad():
        sharded = rolemesh.shard(rolemesh.trace(model, x), {"tp": 2})
        found = rolemesh.lockstep(sharded, x)
    assert isinstance(found, torch.Tensor)
    return found


def expected(model: Stack) -> torch.Tensor:
    with torch.no_grad():
        found = copy.deepcopy(model)(torch.linspace(-1, 1, 30).reshape(5, 6))
    assert isinstance(found, torch.Tensor)
    return found


@pytest.mark.parametrize(
    ("forward", "bodies"),
    [(plain, [1]), (by_index, [0]), (counting, [0])],
    ids=["plain", "by_index", "counting"],
)
def test_a_layer_that_depends_on_more_than_its_tensors(
    forward: Callable[[Layer, torch.Tensor], torch.Tensor],
    bodies: Sequence[int],
    outlined: list[int],
) -> None:
    model = Stack(forward)
    want = expected(model)
    torch.testing.assert_close(run(model), want)
    assert outlined == bodies


def test_a_layer_with_another_constant_is_traced_by_itself(outlined: list[int]) -> None:
    model = Stack(plain)
    model.layers[3].scale = 2.0  # type: ignore[assignment]
    want = expected(model)
    torch.testing.assert_close(run(model), want)
    assert outlined == [1]


def test_the_log_says_why_layers_are_traced_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="rolemesh.compiler.capture"):
        run(Stack(plain))
        assert caplog.messages == []
        run(Stack(counting))
    assert caplog.messages[0].startswith("layers are traced one by one: ")


def test_layers_of_two_kinds_have_two_bodies(outlined: list[int]) -> None:
    model = Stack(plain, layers=8)
    for layer in model.layers[::2]:  # type: ignore[attr-defined]
        layer.scale = 2.0
    want = expected(model)
    torch.testing.assert_close(run(model), want)
    assert outlined == [2]


class Positional(Stack):
    """A model that hands its layers a cache by its place."""

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        for layer in self.layers:
            x = layer(x, cache)
        return x


class Part:
    """What a layer keeps."""

    def __init__(self) -> None:
        self.sum = torch.zeros(6)
        self.calls = 0


class Cache:
    """The parts of all layers."""

    def __init__(self) -> None:
        self.layers = [Part() for _ in range(6)]


class Keeping(Layer):
    """A layer that keeps a sum and counts its calls."""

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        part = cache.layers[self.layer_idx]
        part.calls += 1
        part.sum.add_(x.sum(0))
        return plain(self, x) + part.sum * part.calls


class Again(Positional):
    """A model that calls each of its layers twice."""

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        return super().forward(super().forward(x, cache), cache)


@pytest.mark.parametrize(("kind", "calls", "bodies"), [(Positional, 1, 1), (Again, 2, 0)])
def test_a_cache_by_its_place_that_counts(
    kind: type[Positional], calls: int, bodies: int, outlined: list[int]
) -> None:
    model = kind(plain)
    model.layers = nn.ModuleList(Keeping(index, plain) for index in range(6))
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    mine, theirs = Cache(), Cache()
    with torch.no_grad():
        want = model(x, theirs)
        sharded = rolemesh.shard(rolemesh.trace(model, x, Cache()), {"tp": 2})
        torch.testing.assert_close(rolemesh.lockstep(sharded, x, mine), want)
    for one, other in zip(mine.layers, theirs.layers, strict=True):
        assert one.calls == other.calls == calls
        torch.testing.assert_close(one.sum, other.sum)
    assert outlined == [bodies]


class Replacing(Layer):
    """A layer that keeps another tensor after each call."""

    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        part = cache.layers[self.layer_idx]
        part.sum = part.sum + x.sum(0)
        return plain(self, x) + part.sum


def test_a_cache_whose_tensors_are_replaced(outlined: list[int]) -> None:
    model = Positional(plain)
    model.layers = nn.ModuleList(Replacing(index, plain) for index in range(6))
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    with torch.no_grad():
        want = model(x, Cache())
        sharded = rolemesh.shard(rolemesh.trace(model, x, Cache()), {"tp": 2})
        torch.testing.assert_close(rolemesh.lockstep(sharded, x, Cache()), want)
    assert outlined == [0]


class Told(Stack):
    """A model that tells its layers something by an attribute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            layer.scale = 1.0 + index
            x = layer(x)
        return x


class Twice(Stack):
    """A model that calls each of its layers twice, the second time with other sizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return torch.cat([x, super().forward(x[:3])])


class Peeking(Stack):
    """A model that reads the weight of a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.layers[0].linear.weight.sum()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "bodies"), [(Told, 0), (Twice, 0), (Peeking, 0)], ids=["told", "twice", "peeking"]
)
def test_what_the_first_layer_does_not_tell_of_another_one(
    kind: type[Stack], bodies: int, outlined: list[int]
) -> None:
    model = kind(plain)
    want = expected(model)
    torch.testing.assert_close(run(model), want)
    assert outlined == [bodies]


def test_weights_are_read_at_each_call() -> None:
    model = Stack(plain).requires_grad_(False)
    x = torch.linspace(-1, 1, 30).reshape(5, 6)
    sharded = rolemesh.shard(rolemesh.trace(model, x), {"tp": 2})
    model.layers[4].linear.weight = nn.Parameter(torch.ones(6, 6), requires_grad=False)  # type: ignore[union-attr]
    torch.testing.assert_close(rolemesh.lockstep(sharded, x), expected(model))
    model.layers[4].linear.weight = nn.Parameter(torch.ones(7, 6), requires_grad=False)  # type: ignore[union-attr]
    with pytest.raises(rolemesh.RolemeshError) as caught:
        rolemesh.lockstep(sharded, x)
    assert str(caught.value) == (
        "[RM020] the model differs from the one that was traced\n"
        "  where: layers.4.linear.weight\n"
        "  why: it is torch.float32 [7, 6], and was torch.float32 [6, 6]; a Program has fixed "
        "shapes and dtypes\n"
        "  fix: trace the model again"
    )
