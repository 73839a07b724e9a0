"""Ops that torchair cannot convert are told from those that it can, and named all at once."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from tests.lowering.ge.lowered import module_of, signature_of
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Origin
from rolemesh.lowering.flatten import as_fake, flatten
from rolemesh.lowering.ge.convertible import (
    conversion_error,
    has_converter,
    refuse_unconvertible,
)
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.add.Tensor, True),
        (aten.embedding.default, True),
        (torch.ops._c10d_functional.all_reduce.default, True),
        (operator.getitem, True),
        (operator.floordiv, True),
        (torch.sym_float, True),
        (aten.index_put.default, False),  # declared, and raises NotImplementedError
        (aten.sort.values, False),  # declared, and raises RuntimeError
        (aten.masked_select.default, False),
        (torch.ops.prims.lgamma.default, False),
        (torch.ops._c10d_functional.batch_p2p_ops.default, False),
        (operator.eq, False),
        (torch.sym_max, False),
        (print, False),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_has_converter(target: object, expected: bool) -> None:
    assert has_converter(target) is expected


def test_custom_op_without_a_ge_op() -> None:
    with torch.library._scoped_library("rolemesh_tests", "DEF") as library:
        library.define("unknown(Tensor x) -> Tensor")
        assert not has_converter(torch.ops.rolemesh_tests.unknown.default)


def test_custom_op_that_is_a_ge_op() -> None:
    """Torchair makes the converter of an op that GE has by the same name."""
    with torch.library._scoped_library("rolemesh_tests", "DEF") as library:
        library.define("square(Tensor x) -> Tensor")
        assert has_converter(torch.ops.rolemesh_tests.square.default)


def add(graph: fx.Graph, target: Callable[..., object], *args: object, at: str = "") -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    layer, _, line = at.partition(" ")
    node.meta["origin"] = Origin(layer, f"model.py:{line}") if at else Origin()
    return node


def test_every_op_is_named_with_its_first_place() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    add(graph, aten.relu.default, x, at="layers.0 1")
    add(graph, aten.nonzero.default, x, at="layers.0 7")
    add(graph, aten.linalg_qr.default, x, at="layers.0 8")
    add(graph, aten.nonzero.default, x, at="layers.1 7")
    add(graph, aten.geqrf.default, x)
    with pytest.raises(RolemeshError) as caught:
        refuse_unconvertible(graph)
    assert str(caught.value) == (
        "[RM026] GE graphs cannot express 3 ops of this program\n"
        "  where: aten.nonzero.default: 2 times, first %nonzero_default in layers.0 at model.py:7\n"
        "    aten.linalg_qr.default: %linalg_qr_default in layers.0 at model.py:8\n"
        "    aten.geqrf.default: %geqrf_default\n"
        "  why: aten.nonzero.default: the size of its result, or what runs next, depends on "
        "values, and the sizes of a GE graph on those of its inputs only\n"
        "    aten.linalg_qr.default, aten.geqrf.default: torchair has no converter, and rolemesh "
        "no decomposition into ops that have one\n"
        "  fix: use a form with a fixed size, such as torch.where or a mask; or write the model "
        "without them, or register a converter with torchair; the targets eager and inductor run "
        "it as it is"
    )


def test_a_graph_without_such_ops_passes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((add(graph, aten.relu.default, x),))
    refuse_unconvertible(graph)


def flat(function: Callable[..., Tensor], *inputs: Tensor) -> fx.Graph:
    fakes = as_fake(inputs)
    module = module_of(lambda *args: (function(*args),), len(inputs), 1)
    return flatten(module, fakes).graph


X = torch.randn(6, 4)
IMAGES = torch.randn(1, 2, 6, 6)


@pytest.mark.parametrize(
    ("function", "inputs", "reason"),
    [
        (lambda x: x[x > 0], (X,), "depends on values"),
        (lambda x: x.as_strided((2, 2), (1, 4)), (X.T,), "memory by strides"),
        (lambda x: x[1:].as_strided((2, 2), (1, 4)), (X,), "memory by strides"),
        (lambda x: x.T.as_strided_scatter(x[:2, :2], (2, 2), (1, 4)), (X,), "memory by strides"),
        (lambda x: aten.max_pool2d_with_indices(x, 2)[1], (IMAGES,), "places of the maxima"),
    ],
)
def test_calls_that_would_be_converted_wrongly(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], reason: str
) -> None:
    graph = flat_or_hand_made(function, inputs)
    with pytest.raises(RolemeshError, match="RM026") as caught:
        refuse_unconvertible(graph)
    assert reason in caught.value.why


def flat_or_hand_made(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> fx.Graph:
    """A mask has no fake result of a fixed size, so that its graph is made by hand."""
    if inputs[0] is not X or function(X).dim() != 1:
        return flat(function, *inputs)
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    mode = FakeTensorMode()
    x.meta["val"], mask.meta["val"] = mode.from_tensor(X), mode.from_tensor(X > 0)
    add(graph, aten.index.Tensor, x, [mask])
    return graph


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, i: x[i], (X, torch.tensor([2, 0]))),
        (lambda x: x.as_strided((2, 2), (1, 4)) * 1, (X,)),
        (lambda x: aten.max_pool2d_with_indices(x, 2)[0], (IMAGES,)),
    ],
)
def test_other_calls_of_those_ops_pass(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    refuse_unconvertible(flat(function, *inputs))


def test_conversion_error_names_the_call() -> None:
    graph = fx.Graph()
    node = add(graph, aten.avg_pool2d.default, graph.placeholder("x"), 2, at="stem 4")
    error = conversion_error(node, AssertionError("divisor_override = -2 is invalid\n\nmore"))
    assert str(error) == (
        "[RM026] GE graphs cannot express this call of aten.avg_pool2d.default\n"
        "  where: %avg_pool2d_default in stem at model.py:4\n"
        "  why: torchair's converter refuses its arguments: divisor_override = -2 is invalid\n"
        "  fix: write the model without it, or register a converter with torchair; the targets "
        "eager and inductor run it as it is"
    )
    assert conversion_error(node, ValueError()).why.endswith(": ValueError")


def test_arguments_that_a_converter_refuses() -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        return (aten.avg_pool2d.default(x, 2, 2, 0, False, True, -2),)

    with pytest.raises(RolemeshError, match="RM026") as caught:
        lower_ge(module_of(function, 1, 1), [IMAGES], signature_of(1, 1), GeOptions())
    assert "aten.avg_pool2d.default" in caught.value.what
    assert "in layers.1 at model.py:12" in caught.value.where
    assert "divisor_override" in caught.value.why
