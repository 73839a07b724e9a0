"""Code of graphs with repeats: the same results, and no value is held longer than it is read."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from rolemesh.lowering.code import GraphCode, graph_code
from rolemesh.lowering.repeats import Ops, find_repeats, without_leaks

aten = torch.ops.aten

Body = Callable[["Layers", int], None]
"""Adds one layer to a graph."""

LONG = 40
"""Ops that fill a layer, so that it is worth a function."""


class Layers:
    """A graph under construction: hidden states, and what layers keep for later ones."""

    def __init__(self, layers: int) -> None:
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.weights = [self.graph.placeholder(f"w{layer}") for layer in range(layers)]
        self.angles = self.op(aten.cos.default, self.x)
        self.kept: list[fx.Node] = []
        self.results: list[fx.Node] = []

    def op(self, target: Callable[..., object], *args: object) -> fx.Node:
        return self.graph.call_function(target, args)  # type: ignore[arg-type]

    def through(self, count: int = LONG, number: float = 0.5) -> None:
        """Some ops in a row."""
        for _ in range(count):
            self.x = self.op(aten.add.Tensor, self.x, number)

    def code(self) -> tuple[fx.GraphModule, GraphCode]:
        self.graph.output((self.x, *self.results))
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return module, graph_code(module, "test")


def plain(layers: Layers, layer: int) -> None:
    """Hidden states, a weight of its own, and a value that all layers read."""
    layers.x = layers.op(aten.mul.Tensor, layers.x, layers.weights[layer])
    layers.through()
    layers.x = layers.op(aten.add.Tensor, layers.x, layers.angles)


def ahead(layers: Layers, layer: int) -> None:
    """What starts in a layer is read in the next one and in the one after it."""
    started = layers.op(aten.sin.default, layers.weights[layer])
    layers.through()
    for before in layers.kept[-2:]:
        layers.x = layers.op(aten.add.Tensor, layers.x, before)
    layers.kept.append(started)


def gives(layers: Layers, layer: int) -> None:
    """A result of the graph from every layer."""
    layers.through()
    layers.results.append(layers.op(aten.mul.Tensor, layers.x, layers.weights[layer]))
    layers.x = layers.op(aten.sigmoid.default, layers.results[-1])


def gives_once(layers: Layers, layer: int) -> None:
    """A result of the graph from one layer in the middle."""
    layers.x = layers.op(aten.tanh.default, layers.x)
    if layer == 5:
        layers.results.append(layers.x)
    layers.through()


def two_kinds(layers: Layers, layer: int) -> None:
    """Short layers, and then long ones."""
    layers.through(LONG if layer < 3 else LONG + 7)
    layers.x = layers.op(aten.mul.Tensor, layers.x, layers.weights[layer])


def different(layers: Layers, layer: int) -> None:
    """Layers of which no two are alike."""
    layers.through(number=float(layer))


BODIES: dict[Body, list[int]] = {
    plain: [7],
    ahead: [2, 3],
    gives: [8],
    gives_once: [5, 2],
    two_kinds: [3, 5],
    different: [],
}
"""Repeats that are found among eight layers."""


def made(body: Body, count: int = 8) -> Layers:
    layers = Layers(count)
    layers.through(3)
    for layer in range(count):
        body(layers, layer)
    layers.x = layers.op(aten.relu.default, layers.x)
    return layers


@pytest.mark.parametrize("body", BODIES)
def test_repeats_are_found(body: Body) -> None:
    layers = made(body)
    layers.graph.output((layers.x, *layers.results))
    found = find_repeats(Ops.of(layers.graph), without_leaks)
    assert [repeats.count for repeats in found] == BODIES[body]


@pytest.mark.parametrize("body", BODIES)
def test_code_runs_the_graph(body: Body) -> None:
    check(*made(body).code())


class Alive(TorchDispatchMode):
    """Notes at each op which of the results of earlier ops are there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.found: list[list[int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.found.append([i for i, tensor in enumerate(self.made) if tensor() is not None])
        result = func(*args, **(kwargs or {}))
        self.made.append(weakref.ref(result))
        return result


def read_later(graph: fx.Graph) -> list[list[int]]:
    """For each op, the earlier ones that it or a later one reads."""
    ops = [node for node in graph.nodes if node.op == "call_function"]
    place = {node: index for index, node in enumerate(ops)}
    last = [max((place.get(user, len(ops)) for user in node.users), default=-1) for node in ops]
    return [[i for i in range(index) if last[i] >= index] for index in range(len(ops))]


def check(module: fx.GraphModule, code: GraphCode) -> None:
    count = len(module.graph.find_nodes(op="placeholder"))
    inputs = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    want = fx.Interpreter(module).run(*inputs)
    with torch.no_grad(), Alive() as alive:
        got = code.forward(*inputs)
    for a, b in zip(want, got, strict=True):
        assert b is not None
        assert torch.equal(a, b)
    assert alive.found == read_later(module.graph)


@pytest.mark.parametrize("seed", range(40))
def test_code_of_random_repeats(seed: int) -> None:
    check(*random_layers(random.Random(seed)).code())


def random_layers(choose: random.Random) -> Layers:
    """Kinds of layers that read what they, earlier layers, or inputs give, with uneven ends."""
    layers = Layers(20)
    before = [layers.x, layers.angles]
    for _ in range(choose.randrange(3)):
        before.append(layers.op(aten.neg.default, choose.choice(before)))
    for _ in range(choose.randrange(1, 4)):
        recipe = [
            (choose.choice((aten.add.Tensor, aten.sub.Tensor)), choose.random(), choose.random())
            for _ in range(choose.randrange(34, 60))
        ]
        far = choose.choice((0, 0, 1, 2, 3))
        history: list[list[fx.Node]] = []
        for layer in range(choose.randrange(2, 7)):
            values = [layers.x]
            for target, one, other in recipe:
                place = int(one * 6)
                if place == 0:
                    operand = layers.weights[layer]
                elif place == 1:
                    operand = before[int(other * len(before))]
                elif place == 2 and 0 < far <= len(history):
                    operand = history[-far][int(other * len(history[-far]))]
                else:
                    operand = values[-1 - int(other * min(4, len(values)))]
                values.append(layers.op(target, values[-1], operand))
            layers.x = values[-1]
            history.append(values)
            if choose.random() < 0.2:
                layers.results.append(choose.choice(values))
        before.append(choose.choice(values))
    return layers


def test_a_failing_op_of_a_repeat_is_found() -> None:
    layers = made(plain, 12)
    module, code = layers.code()
    inputs: Sequence[Tensor] = [torch.ones(2, 3) for _ in range(13)]
    (failing,) = layers.weights[5].users
    inputs[6].resize_(4, 7)
    with pytest.raises(RuntimeError) as caught:
        code.forward(*inputs)
    assert code.failed_node(caught.value) is failing
    with pytest.raises(TypeError) as wrong:
        code.forward()
    assert code.failed_node(wrong.value) is None
    assert code.text.count("\n") < len(module.graph.nodes) / 4


class Sizes(NamedTuple):
    """An argument that is a tuple of a type of its own."""

    rows: object
    columns: object


def sized(x: Tensor, sizes: Sizes, parts: dict[str, object], rows: slice) -> Tensor:
    assert isinstance(sizes, Sizes)
    return x[rows].expand(sizes.rows, sizes.columns) * parts["scale"]  # type: ignore[arg-type]


def test_values_within_arguments_of_any_kind() -> None:
    graph = fx.Graph()
    x, rows, scale = (graph.placeholder(name) for name in ("x", "rows", "scale"))
    arguments = (x, Sizes(rows, 3), {"scale": scale}, slice(None, 1))
    first = graph.call_function(sized, arguments)  # type: ignore[arg-type]
    second = graph.call_function(sized, (first, Sizes(5, 3), {"scale": 2}, slice(0, scale)))  # type: ignore[arg-type]
    graph.output((second,))
    code = graph_code(fx.GraphModule(torch.nn.Module(), graph), "test")
    found = code.forward(torch.ones(1, 3), 4, 1)
    assert [list(result.shape) for result in found if result is not None] == [[5, 3]]
    torch.testing.assert_close(found[0], torch.full((5, 3), 2.0))
