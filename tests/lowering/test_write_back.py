"""New values are written into their inputs, and nothing is read after it was overwritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from rolemesh.compiler.ir.program import Input, InputKind, Output
from rolemesh.lowering.eager import lower_eager
from rolemesh.lowering.inductor import lower_inductor
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.write_back import copy_back

aten = torch.ops.aten

Graph = Callable[[fx.Graph, list[fx.Node]], tuple[list[fx.Node], dict[int, int]]]
"""Adds nodes to a graph with inputs; returns results, and which are new values of which inputs."""


def call(graph: fx.Graph, op: Callable[..., object], *args: object) -> fx.Node:
    return graph.call_function(op, args)  # type: ignore[arg-type]


def rows(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    new = call(graph, aten.index_copy.default, x[0], 1, x[2], x[3])
    return [new, call(graph, aten.sum.default, new)], {0: 0}


def rows_twice(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    first = call(graph, aten.index_put.default, x[0], [None, x[2]], x[3])
    read = call(graph, aten.sum.default, first)
    last = call(graph, aten.slice_scatter.default, first, x[3], 1, 2, 5)
    return [read, last, call(graph, aten.mul.Tensor, last, read)], {1: 0}


def read_before(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    old = call(graph, aten.sum.default, call(graph, aten.select.int, x[0], 0, 1))
    new = call(graph, aten.index_copy.default, x[0], 1, x[2], x[3])
    return [new, call(graph, aten.add.Tensor, new, old)], {0: 0}


def read_after(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    part = call(graph, aten.slice.Tensor, x[0], 1, 0, 4)
    new = call(graph, aten.index_copy.default, x[0], 1, x[2], x[3])
    return [new, call(graph, aten.mul.Tensor, part, 2)], {0: 0}


def old_returned(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    part = call(graph, aten.select.int, x[0], 0, 1)
    return [part, call(graph, aten.index_copy.default, x[0], 1, x[2], x[3])], {1: 0}


def new_returned(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    new = call(graph, aten.index_copy.default, x[0], 1, x[2], x[3])
    return [new, new, call(graph, aten.select.int, new, 0, 1)], {0: 0}


def from_itself(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    part = call(graph, aten.slice.Tensor, x[0], 1, 0, 3)
    return [call(graph, aten.slice_scatter.default, x[0], part, 1, 1, 4)], {0: 0}


def turned(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    window = call(graph, aten.slice.Tensor, x[0], 1, 3, 7)
    return [call(graph, aten.cat.default, [window, x[3]], 1)], {0: 0}


def swapped(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    return [x[1], x[0]], {0: 0, 1: 1}


def shared(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    new = call(graph, aten.index_copy.default, x[0], 1, x[2], x[3])
    last = call(graph, aten.index_copy.default, new, 1, x[2], call(graph, aten.neg.default, x[3]))
    return [new, last, x[2]], {0: 1, 1: 0}


def filled(graph: fx.Graph, x: list[fx.Node]) -> tuple[list[fx.Node], dict[int, int]]:
    where = call(graph, aten.gt.Scalar, x[0], 0)
    return [call(graph, aten.where.self, where, x[0], x[1]), x[0]], {0: 0}


GRAPHS: Mapping[Graph, tuple[int, int]] = {
    rows: (0, 0),
    rows_twice: (0, 0),
    read_before: (0, 0),
    read_after: (1, 1),
    old_returned: (1, 1),
    new_returned: (1, 1),
    from_itself: (1, 1),
    turned: (1, 1),
    swapped: (2, 2),
    shared: (2, 2),
    filled: (1, 2),
}
"""Graphs; what they need at least, op by op: whole copies into inputs, and new tensors as large."""


def module_of(make: Graph) -> tuple[fx.GraphModule, Signature]:
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("cache", "other", "index", "new")]
    results, mutated = make(graph, inputs)
    graph.output(tuple(results))
    entries = tuple(
        Input(node.name, InputKind.USER, i in mutated.values()) for i, node in enumerate(inputs)
    )
    outputs = tuple(Output(mutated.get(i)) for i in range(len(results)))
    return fx.GraphModule(torch.nn.Module(), graph), Signature(make.__name__, entries, outputs)


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(-9, 9, (2, 2, 7, 5), generator=generator).float()
    return [values[0].clone(), values[1].clone(), torch.tensor([4, 0, 6]), values[1, :, :3] * 3]


class Copies(TorchDispatchMode):
    """Counts whole copies into caches, and new tensors that are as large."""

    def __init__(self) -> None:
        super().__init__()
        self.found = [0, 0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == (2, 7, 5):
            self.found[0] += func is aten.copy_.default
            self.found[1] += func in _MAKE
        return result


_MAKE = (
    aten.cat.default,
    aten.clone.default,
    aten.index_copy.default,
    aten.slice_scatter.default,
    aten.where.self,
)


@pytest.mark.parametrize("make", GRAPHS)
def test_eager_writes_rows_in_place_where_it_may(make: Graph) -> None:
    given = examples()
    module, signature = module_of(make)
    want = module(*[x.clone() for x in given])
    run = lower_eager(module, [], signature)
    with Copies() as copies:
        got = run(*given)
    check(want, got, given, signature)
    assert tuple(copies.found) == GRAPHS[make]


@pytest.mark.parametrize("make", [rows_twice, old_returned, new_returned, swapped, shared])
def test_inductor_computes_the_same(make: Graph) -> None:
    given = examples()
    module, signature = module_of(make)
    want = module(*[x.clone() for x in given])
    got = lower_inductor(module, given, signature)(*given)
    check(want, got, given, signature)


def check(
    want: Sequence[Tensor],
    got: Sequence[Tensor | None],
    given: Sequence[Tensor],
    signature: Signature,
) -> None:
    memory = {x.untyped_storage().data_ptr() for x in given}
    for index, (a, b) in enumerate(zip(want, got, strict=True)):
        assert b is not None
        assert torch.equal(a, b)
        if index in signature.mutated:
            assert b is given[signature.mutated[index]]
        else:
            assert b.untyped_storage().data_ptr() not in memory


def test_new_values_are_copied_into_their_inputs_and_not_returned() -> None:
    graph = fx.Graph()
    cache, other = graph.placeholder("cache"), graph.placeholder("other")
    new = graph.call_function(torch.ops.aten.add.Tensor, (cache, other))
    total = graph.call_function(torch.ops.aten.sum.default, (new,))
    graph.output((new, total, other))
    module = fx.GraphModule(torch.nn.Module(), graph)
    kept = copy_back(graph, {0: 0, 2: 1})
    module.recompile()
    assert kept == [1]
    x, y = torch.randn(3), torch.randn(3)
    want = x + y
    (got,) = module(x, y)
    assert torch.equal(x, want)
    assert torch.equal(got, want.sum())
    assert [str(n.target) for n in graph.nodes].count("aten.copy_.default") == 1
