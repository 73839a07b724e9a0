"""The key of a Dynamo graph: the same in every process, and another for every difference."""

from __future__ import annotations

import pytest
import torch
from tests.compiler.cache.graphs import keys_of
from tests.models import forget_compiled
from torch import fx, nn

from rolemesh.compiler.cache.graph_key import graph_key
from rolemesh.compiler.capture.sources import SourceName
from rolemesh.compiler.ir.program import InputKind

X = torch.ones(3, 5)


class Model(nn.Module):
    """A linear layer with a constant and a scale."""

    def __init__(self, width: int = 5, scale: float = 2.0, constant: float = 7.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4, bias=False)
        self.scale = scale
        self.constant = constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale + torch.tensor([self.constant] * 4)


class Renamed(Model):
    """The same with another name of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.other = self.linear
        del self.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x) * self.scale + torch.tensor([self.constant] * 4)


def key(function: object, *args: object, dynamic: bool | None = False) -> str:
    (found,) = keys_of(function, *args, dynamic=dynamic)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_the_same_graph_has_the_same_key() -> None:
    assert key(Model(), X) == key(Model(), X.clone())


def test_every_difference_has_another_key() -> None:
    def second(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def third(x: torch.Tensor) -> torch.Tensor:
        return x + 1  # on another line

    found = [
        key(Model(), X),
        key(Model(scale=3.0), X),
        key(Model(constant=8.0), X),
        key(Renamed(), X),
        key(Model(), torch.ones(2, 5)),
        key(Model(), torch.ones(5, 3).t()),
        key(Model(6), torch.ones(3, 6)),
        key(Model().double(), X.double()),
        key(Model().requires_grad_(False), X),
        key(Model(), X, dynamic=True),
        key(Model(), torch.ones(4, 5), dynamic=True),  # costs follow the example
        key(second, X),
        key(third, X),
        key(second, nn.Parameter(X)),
    ]
    assert len(set(found)) == len(found)


def test_memory_that_inputs_share_counts() -> None:
    def both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    whole = torch.ones(2, 3, 5)
    apart = key(both, X, X.clone())
    halves = key(both, whole[0], whole[1])
    same = key(both, whole[0], whole[:1].view(3, 5))
    assert len({apart, halves, same}) == 3


def test_constants_count_by_their_values() -> None:
    def with_constant(value: torch.Tensor) -> str:
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.add, (x, graph.get_attr("constant"))),))
        module = nn.Module()
        module.register_buffer("constant", value)
        names = [SourceName("x", InputKind.USER)]
        return graph_key(fx.GraphModule(module, graph), [X], names)

    ones = torch.ones(5)
    others = [ones * 2, ones.double(), torch.ones(1), torch.ones(5, 2)[:, 0]]
    assert with_constant(ones) == with_constant(torch.ones(5))
    assert with_constant(ones) not in map(with_constant, others)


@torch._dynamo.allow_in_graph
def _foreign(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_code_of_no_known_version_has_no_key() -> None:
    assert keys_of(lambda x: _foreign(x) + 1, X) == [None]


def test_ops_of_other_libraries_have_no_key() -> None:
    library = torch.library.Library("cache_key_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
    try:
        assert keys_of(lambda x: torch.ops.cache_key_test.twice(x) + 1, X) == [None]
    finally:
        library._destroy()


def test_tensor_subclasses_have_no_key() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    assert keys_of(lambda x: x + 1, TwoTensor(X, X)) == [None]


def test_a_region_counts_with_its_body() -> None:
    def made(factor: float) -> object:
        @torch.compiler.nested_compile_region
        def region(x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x) * factor

        return lambda x: region(region(x))

    assert key(made(2.0), X) == key(made(2.0), X)
    assert key(made(2.0), X) != key(made(3.0), X)


def test_sizes_go_by_order_not_by_name() -> None:
    def first(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.sum() + b.sum()

    forget_compiled()
    one = key(first, torch.ones(3), torch.ones(4), dynamic=True)
    assert one == key(first, torch.ones(3), torch.ones(4), dynamic=True)
    assert one != key(first, torch.ones(4), torch.ones(3), dynamic=True)


@pytest.mark.parametrize("enabled", [True, False])
def test_inputs_that_are_numbers_count(enabled: bool) -> None:
    def scaled(x: torch.Tensor, by: int) -> torch.Tensor:
        return x * by if enabled else x + by

    assert key(scaled, X, 3) != key(scaled, X, 4)
