"""Programs: what they give access to, and that passes copy them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.passes.programs import Builder, node_named
from torch import fx

from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.program import (
    Input,
    InputKind,
    Origin,
    Output,
    Program,
    operand_nodes,
    origin,
    tensor_type,
    tensor_types,
)
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.tensor import TensorType, dtype_name

aten = torch.ops.aten


def example() -> Program:
    b = Builder(tp=2)
    b.module = "model.layers.0"
    x, cache = b.input("x", (4, 6), P("tp")), b.input("cache", (4, 3), P("tp"), mutated=True)
    first, second = b.op(aten.split.Tensor, x, 3, 1)
    return b.program(
        b.op(aten.add.Tensor, cache, first),
        b.op(aten.cat.default, [second, x], 1),
        second,
        mutates={0: "cache"},
        pinned={1: P("tp")},
    )


def test_nodes_in_order() -> None:
    program = example()
    assert [node.name for node in program.placeholders] == ["x", "cache"]
    assert [node.name for node in program.ops] == [
        "split_tensor",
        "getitem",
        "getitem_1",
        "add_tensor",
        "cat_default",
    ]
    assert program.results == tuple(
        node_named(program, name) for name in ("add_tensor", "cat_default", "getitem_1")
    )


def test_types() -> None:
    program = example()
    split = node_named(program, "split_tensor")
    assert tensor_types(split) == (TensorType((4, 3), torch.float32),) * 2
    assert tensor_type(node_named(program, "cat_default")).shape == (4, 9)
    assert tensor_types(program.graph.output_node()) == ()
    with pytest.raises(AssertionError):
        tensor_type(split)


def test_operands_in_argument_order() -> None:
    program = example()
    x, second = node_named(program, "x"), node_named(program, "getitem_1")
    assert operand_nodes(node_named(program, "cat_default")) == [second, x]
    assert operand_nodes(node_named(program, "split_tensor")) == [x]
    graph = fx.Graph()
    y = graph.placeholder("y")
    y.meta["type"] = TensorType((2,), torch.float32)
    twice = graph.call_function(aten.add.Tensor, (y, y), {"alpha": 2})
    assert operand_nodes(twice) == [y, y]


def test_layouts_of_outputs() -> None:
    program = example()
    cut = Layout((Shard(0, 1, 4),))
    assert program.layout(node_named(program, "x")) == cut
    assert program.output_layout(0) == cut  # as the input it updates
    assert program.output_layout(1) == cut  # pinned
    assert program.output_layout(2) == Layout.replicated(program.the_mesh)


def test_after_copies_and_keeps_a_history() -> None:
    program = example()
    after = program.after("first", phase="decode").after("second")
    assert after.history == ("first", "second")
    assert after.phase == "decode"
    assert (program.history, program.phase) == ((), "")
    assert after.graph is program.graph
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.name = "other"  # type: ignore[misc]


def test_a_program_without_a_mesh() -> None:
    program = dataclasses.replace(example(), mesh=None)
    with pytest.raises(ValueError, match="program test is not sharded yet"):
        _ = program.the_mesh


def test_origins() -> None:
    program = example()
    node = node_named(program, "add_tensor")
    assert origin(node) == Origin(module="model.layers.0", source="model.py:1")
    assert origin(node_named(program, "x")) == Origin("", "", "")


@pytest.mark.parametrize(
    ("entry", "state"),
    [
        (Input("w", InputKind.PARAMETER), True),
        (Input("b", InputKind.BUFFER), True),
        (Input("x", InputKind.USER), False),
        (Input("c", InputKind.CONSTANT), False),
        (Input("kv", InputKind.USER, mutated=True), True),
    ],
)
def test_what_is_stored_between_calls(entry: Input, *, state: bool) -> None:
    assert entry.is_state == state


def test_an_output_is_a_result_unless_it_updates_an_input() -> None:
    assert Output().mutates is None
    assert example().outputs == (Output(1), Output(), Output())


def test_tensor_types_are_text_and_bytes() -> None:
    value = TensorType((2, 3), torch.bfloat16)
    assert (str(value), value.ndim, value.nbytes) == ("bf16[2, 3]", 2, 12)
    assert str(TensorType((), torch.bool)) == "bool[]"
    assert TensorType((0, 4), torch.int64).nbytes == 0
    assert dtype_name(torch.complex64) == "complex64"


def test_the_text_names_everything() -> None:
    text = str(example().after("capture"))
    assert text.splitlines()[0] == "program test   mesh(tp=2)   after: capture"
    for part in ("x", "cache", "updated", "f32[4@tp, 6]", "model.layers.0", "return", "cache = "):
        assert part in text
