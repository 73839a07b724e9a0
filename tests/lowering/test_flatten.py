"""Flat graphs: the same values, plain ATen, and every node knows where it comes from."""

from __future__ import annotations

import operator

import torch
from torch import fx

from rolemesh.compiler.ir.program import Origin, origin
from rolemesh.lowering.flatten import as_fake, flatten


def halves(x: torch.Tensor, *, factor: float) -> torch.Tensor:
    """A plain function, as binding puts into a graph."""
    first, second = x.chunk(2)
    return torch.cat([second * factor, first])


def bound() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("tokens")
    swapped = graph.create_node("call_function", halves, (x,), {"factor": 3.0}, "swapped")
    swapped.meta["origin"] = Origin("layers.1", "model.py:5", "because")
    total = graph.create_node("call_function", torch.ops.aten.sum.default, (swapped,), {}, "total")
    total.meta["origin"] = Origin("layers.2", "model.py:9")
    graph.output((swapped, total, None))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_the_flat_graph_computes_the_same_in_aten() -> None:
    module = bound()
    x = torch.randn(6, 5)
    flat = flatten(module, as_fake([x]))
    for want, got in zip(module(x), flat(x), strict=True):
        assert (want is None and got is None) or torch.equal(want, got)
    called = {node.target for node in flat.graph.nodes if node.op == "call_function"}
    assert all(target is operator.getitem or hasattr(target, "_schema") for target in called)


def test_nodes_keep_names_and_origins() -> None:
    flat = flatten(bound(), as_fake([torch.randn(6, 5)]))
    by_name = {node.name: node for node in flat.graph.nodes}
    assert by_name["tokens"].op == "placeholder"
    assert by_name["swapped"].target is torch.ops.aten.cat.default
    assert by_name["total"].target is torch.ops.aten.sum.default
    assert by_name["swapped__1"].target is torch.ops.aten.split.Tensor
    assert origin(by_name["swapped__1"]) == Origin("layers.1", "model.py:5", "because")
    assert origin(by_name["total"]).module == "layers.2"
    assert all("val" in node.meta for node in flat.graph.nodes if node.op == "call_function")


def test_names_are_the_bound_nodes_even_where_tracing_gave_them_to_others() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.create_node("call_function", torch.ops.aten.neg.default, (x,), {}, "neg_1")
    second = graph.create_node("call_function", torch.ops.aten.neg.default, (first,), {}, "neg")
    graph.output((second, first))
    flat = flatten(fx.GraphModule(torch.nn.Module(), graph), as_fake([torch.randn(3)]))
    assert [node.name for node in flat.graph.nodes if node.op == "call_function"] == [
        "neg_1",
        "neg",
    ]


def test_names_survive_a_second_trace_that_decomposes() -> None:
    decompositions = {
        torch.ops.aten.sum.default: lambda x: torch.ops.aten.sum.dim_IntList(x, [0, 1])
    }
    fakes = as_fake([torch.randn(6, 5)])
    once = flatten(bound(), fakes)
    twice = flatten(once, fakes, decompositions)
    by_name = {node.name: node for node in twice.graph.nodes}
    assert by_name["total"].target is torch.ops.aten.sum.dim_IntList
    assert origin(by_name["total"]).module == "layers.2"
    assert by_name["swapped"].target is torch.ops.aten.cat.default


def test_fake_examples_keep_their_mode() -> None:
    (fake,) = as_fake([torch.randn(3)])
    again, other = as_fake([fake, torch.randn(2)])
    assert again is fake
    assert other.fake_mode is fake.fake_mode
