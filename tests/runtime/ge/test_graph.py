"""A graph is parsed as it is, and one that is not valid is refused with the op named."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.ge.graphs import Builder, executor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.graph import Edge, Graph, Node
from rolemesh.runtime.ge.ops.table import GE_DTYPES
from rolemesh.runtime.ge.parse import PROTO_DTYPES, parse_graph


def sample() -> Builder:
    """A graph with every form of input: plain, a list, unfed, a control edge, several outputs."""
    build = Builder()
    x = build.data([3, 4])
    host = build.data([], torch.int64, kind="RefData")
    dim = build.const(torch.tensor(1))
    negative = build.op("Neg", {"x": x}, fx="neg-aten.neg.default", meta="[3, 4])")
    joined = build.op("Join", {"x0": negative, "x1": x, "dim": dim}, after=["Neg"])
    scaled = build.op("Scale", {"x": joined, "bias": ""}, factor=0.5, name="a", on=True, n=-7)
    build.op("Halves", {"x": scaled}, outputs=2, fx="half-aten.split.Tensor")
    build.results(("Halves:1", [-1, 8]), (host, []), dtype=torch.float32)
    build.graph.op[-1].input_desc[1].dtype = 8
    return build


def op(build: Builder, name: str) -> Any:
    return next(op for op in build.graph.op if op.name == name)


def refusal(build: Builder) -> RolemeshError:
    with pytest.raises(RolemeshError) as caught:
        parse_graph(build.serialized())
    assert caught.value.code == "RM027"
    return caught.value


def test_what_a_graph_says_is_kept() -> None:
    graph = parse_graph(sample().serialized())
    assert graph.name == "graph"
    assert [node.name for node in graph.data] == ["arg0", "arg1"]
    assert graph.data[1].outputs[0].shape == ()
    join, scale = graph.nodes["Join"], graph.nodes["Scale"]
    assert join.inputs == (Edge("Neg", 0), Edge("arg0", 0), Edge("Const", 0))
    assert [desc.name for desc in join.input_descs] == ["x0", "x1", "dim"]
    assert join.controls == ("Neg",)
    assert scale.inputs == (Edge("Join", 0), None)
    assert scale.attributes.float("factor") == 0.5
    assert scale.attributes.str("name") == "a"
    assert scale.attributes.bool("on") is True
    assert scale.attributes.int("n") == -7
    assert scale.attributes.where == "Scale 'Scale'"
    value = graph.nodes["Const"].value
    assert value is not None
    assert torch.equal(value, torch.tensor(1))
    assert graph.nodes["Neg"].outputs[0].numel == 12
    assert graph.nodes["Neg"].outputs[0].described
    assert not scale.outputs[0].described
    assert graph.net_output.inputs == (Edge("Halves", 1), Edge("arg1", 0))
    assert graph.net_output.input_descs[0].shape == (-1, 8)


def test_a_node_is_described_by_the_fx_node_that_it_serves() -> None:
    graph = parse_graph(sample().serialized())
    assert graph.describe(graph.nodes["Neg"]) == "Neg 'Neg', of fx node neg (aten.neg.default)"
    join = "Join 'Join', for fx node half (aten.split.Tensor)"
    assert graph.describe(graph.nodes["Join"]) == join
    end = "NetOutput 'NetOutput', after fx node half (aten.split.Tensor)"
    assert graph.describe(graph.net_output) == end
    build = Builder()
    graph = parse_graph(build.results((build.data([2]), [2])))
    assert graph.describe(graph.net_output) == "NetOutput 'NetOutput'"


def test_data_types_are_those_of_the_proto() -> None:
    Builder()  # loads torchair
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    names = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.bfloat16: "BF16"}
    for number, dtype in PROTO_DTYPES.items():
        name = names.get(dtype, str(dtype).removeprefix("torch.").upper())
        assert DataType.Name(number) == f"DT_{name}"
    assert set(PROTO_DTYPES.values()) == set(GE_DTYPES.values())


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.arange(6, dtype=torch.int64).reshape(2, 3),
        torch.tensor([True, False, True]),
        torch.empty(0, 5, dtype=torch.float16),
        torch.tensor([1 + 2j], dtype=torch.complex64),
    ],
    ids=lambda value: str(value.dtype),
)
def test_constants_keep_type_shape_and_value(value: torch.Tensor) -> None:
    build = Builder()
    edge = build.const(value)
    graph = parse_graph(build.results((edge, value.shape), dtype=value.dtype))
    (result,) = executor(build.serialized()).run([])
    assert result.dtype == value.dtype
    assert torch.equal(result, value)
    assert graph.nodes["Const"].value is not result


def test_attributes_of_all_kinds() -> None:
    build = sample()
    attributes = op(build, "Scale").attr
    attributes["ints"].list.i.extend([3, -1])
    attributes["floats"].list.f.extend([0.5])
    attributes["flags"].list.b.extend([True, False])
    attributes["texts"].list.s.extend([b"a", b"\xff"])
    attributes["none"].list.val_type = 2
    attributes["type"].dt = 9
    attributes["rows"].list_list_int.list_list_i.add().list_i.extend([1, 2])
    attributes["parts"].list_list_float.list_list_f.add().list_f.extend([0.25])
    attributes["_private"].i = 1
    attributes["touched"].SetInParent()
    values = parse_graph(build.serialized()).nodes["Scale"].attributes
    assert values.ints("ints") == [3, -1]
    assert values.ints("none") == []
    assert values.dtype("type") is torch.int64
    assert values._values["floats"] == [0.5]
    assert values._values["flags"] == [True, False]
    assert values._values["texts"] == ["a", "\ufffd"]
    assert values._values["rows"] == [[1, 2]]
    assert values._values["parts"] == [[0.25]]
    assert "_private" not in values
    assert "touched" not in values


@pytest.mark.parametrize(
    ("meta", "numel"),
    [
        ("Tensor(dtype=torch.float32, shape=torch.Size([3, 5])", 15),
        ("Tensor(dtype=torch.float32, shape=torch.Size([])", 1),
        ("Tensor(dtype=torch.float32, shape=torch.Size([s0, 5])", None),
        ("Tensor(dtype=torch.float32, shape=torch.Size([2*s0])", None),
        ("<class 'torch.SymInt'>(s0 + 1)", 1),
        ("<class 'list'>([s0, 4])", None),
        ("something else", None),
    ],
)
def test_sizes_in_notes_on_tensors(meta: str, numel: int | None) -> None:
    build = sample()
    op(build, "Neg").output_desc[0].attr["_meta"].s = meta.encode()
    assert parse_graph(build.serialized()).nodes["Neg"].outputs[0].numel == numel


def test_ops_listed_too_late_move_up_to_their_first_user() -> None:
    build = Builder()
    x = build.data([2])
    build.op("Add", {"x1": x, "x2": "Const:0"})
    build.op("Neg", {"x": x}, after=["Add"])
    build.const(torch.ones(2))
    build.results(("Neg:0", [2]))
    assert list(parse_graph(build.serialized()).nodes) == [
        "arg0",
        "Const",
        "Add",
        "Neg",
        "NetOutput",
    ]


def test_a_chain_of_many_ops_listed_backwards() -> None:
    nodes = [Node(f"n{i}", "Neg", (), (), (f"n{i + 1}",)) for i in range(5000)]
    nodes += [Node("n5000", "Neg"), Node("out", "NetOutput")]
    assert list(Graph.of("chain", nodes).nodes)[:2] == ["n5000", "n4999"]


# --------------------------------------------------------------------------------------------------
# Bytes that are no graph.


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (b"", "there is no GE graph in a model"),
        (b"\x08\x08\x12\x04onnx", "there is no GE graph in a model"),
        (
            b"\x08\x08\x3a\x0a\x0a\x08\x22\x04Relu\x12\x00",
            "a graph has 0 NetOutput ops instead of one",
        ),
        (b"not a protobuf at all", "a GE graph cannot be read"),
        (b"\x3a\x00", "a graph has 0 NetOutput ops"),
    ],
    ids=["empty", "foreign", "foreign graph", "text", "empty graph"],
)
def test_bytes_that_are_no_graph(model: bytes, what: str) -> None:
    Builder()  # loads torchair
    with pytest.raises(RolemeshError) as caught:
        parse_graph(model)
    assert caught.value.code == "RM027"
    assert caught.value.what.startswith(what)


def test_every_truncation_is_refused() -> None:
    model = sample().serialized()
    for length in range(len(model)):
        with pytest.raises(RolemeshError, match="RM027"):
            parse_graph(model[:length])


@cache
def sample_bytes() -> bytes:
    return sample().serialized()


def refused_with(model: bytes) -> str:
    try:
        executor(model)
    except RolemeshError as error:
        return error.code
    return ""


@settings(max_examples=400)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 4))
def test_corrupted_bytes_give_a_graph_or_an_error(seed: int, count: int) -> None:
    draw = random.Random(seed)
    model = bytearray(sample_bytes())
    for _ in range(count):
        model[draw.randrange(len(model))] = draw.randrange(256)
    assert refused_with(bytes(model)) in ("", "RM027", "RM028")


# --------------------------------------------------------------------------------------------------
# Graphs that are not valid.


def damage(name: str) -> Callable[[Callable[[Any], None]], Callable[[], Builder]]:
    """Let a function damage one op of the sample."""

    def apply(change: Callable[[Any], None]) -> Callable[[], Builder]:
        def damaged() -> Builder:
            build = sample()
            change(op(build, name))
            return build

        return damaged

    return apply


def _assign(**fields: object) -> Callable[[Any], None]:
    def change(target: Any) -> None:
        for name, value in fields.items():
            setattr(target, name, value)

    return change


def _input(index: int, edge: str) -> Callable[[Any], None]:
    def change(target: Any) -> None:
        target.input[index] = edge

    return change


def _two_outputs(target: Any) -> None:
    target.output_desc.add().dtype = 1


@pytest.mark.parametrize(
    ("name", "change", "what", "where"),
    [
        ("Neg", _assign(name=""), "an op has no name or no type", "Neg ''"),
        ("Neg", _assign(type=""), "an op has no name or no type", "an op without type 'Neg'"),
        ("Neg", _assign(name="Join"), "two ops are called 'Join'", "Neg and Join"),
        ("Neg", _input(0, "arg0"), "'arg0' is no edge", "Neg 'Neg'"),
        ("Neg", _input(0, "arg0:x"), "'arg0:x' is no edge", "Neg 'Neg'"),
        ("Neg", _input(0, "arg0:-2"), "'arg0:-2' is no edge", "Neg 'Neg'"),
        ("Neg", _input(0, ":0"), "':0' is no edge", "Neg 'Neg'"),
        ("Neg", _input(0, "arg0:99999999999"), "'arg0:99999999999' is no edge", "Neg 'Neg'"),
        (
            "Neg",
            _input(0, "gone:0"),
            "an edge comes from 'gone', which does not exist",
            "Neg 'Neg'",
        ),
        ("Join", _input(0, "gone:-1"), "an edge comes from 'gone', which does not", "Join 'Join'"),
        ("Neg", _input(0, "arg0:1"), "an edge comes from output 1 of 'arg0'", "Neg 'Neg'"),
        (
            "Neg",
            _input(0, "NetOutput:0"),
            "an edge comes from output 0 of 'NetOutput'",
            "Neg 'Neg'",
        ),
        (
            "Neg",
            _input(0, "Halves:0"),
            "ops form a cycle",
            "'Neg' needs 'Halves' needs 'Scale' needs 'Join' needs 'Neg'",
        ),
        ("Neg", _input(0, "Neg:0"), "ops form a cycle", "'Neg' needs 'Neg'"),
        (
            "Neg",
            lambda target: target.input.append("arg0:0"),
            "an op has 2 inputs and 1 descriptors of inputs",
            "Neg 'Neg'",
        ),
        (
            "Join",
            lambda target: target.input_desc.pop(),
            "an op has 3 inputs and 2 descriptors of inputs",
            "Join 'Join'",
        ),
        (
            "Join",
            lambda target: _assign(name="x0")(target.input_desc[1]),
            "two inputs of an op have one name: x0, x0, dim",
            "Join 'Join'",
        ),
        (
            "Neg",
            lambda target: target.output_desc[0].shape.dim.extend([3, -3]),
            "[3, -3] is no shape",
            "output 'y0' of Neg 'Neg'",
        ),
        (
            "arg0",
            lambda target: target.output_desc[0].shape.dim.extend([-2]),
            "[3, 4, -2] is no shape",
            "output 'y' of Data 'arg0'",
        ),
        (
            "arg0",
            lambda target: target.input.append("Neg:0"),
            "an op that only has a value",
            "Data",
        ),
        ("Const", lambda target: target.input.append("Neg:-1"), "an op that only has", "Const"),
        ("arg0", lambda target: target.attr.clear(), "an input has no index", "Data 'arg0'"),
        (
            "arg0",
            lambda target: _assign(s=b"one")(target.attr["index"]),
            "an input's index is no number",
            "Data 'arg0'",
        ),
        (
            "arg0",
            lambda target: _assign(i=1)(target.attr["index"]),
            "two inputs have index 1",
            "'arg0' and 'arg1'",
        ),
        (
            "arg0",
            lambda target: _assign(i=2)(target.attr["index"]),
            "inputs have the indices [1, 2]",
            "'arg1', 'arg0'",
        ),
        (
            "arg0",
            lambda target: _assign(i=-1)(target.attr["index"]),
            "inputs have the indices [-1, 1]",
            "'arg0', 'arg1'",
        ),
        ("arg0", _two_outputs, "an input is not described", "Data 'arg0'"),
        (
            "arg1",
            lambda target: _assign(dtype=13)(target.output_desc[0]),
            "an input is not described",
            "RefData 'arg1'",
        ),
        ("Const", lambda target: target.attr.clear(), "a constant has no value", "Const 'Const'"),
        (
            "Const",
            lambda target: _assign(i=3)(target.attr["value"]),
            "a constant has no value",
            "Const 'Const'",
        ),
        (
            "Const",
            lambda target: _assign(data=b"1234567")(target.attr["value"].t),
            "a constant has 7 bytes instead of 8",
            "Const 'Const'",
        ),
        (
            "Const",
            lambda target: target.attr["value"].t.desc.shape.dim.append(1 << 62),
            f"a constant has 8 bytes instead of {8 << 62}",
            "Const 'Const'",
        ),
        (
            "Const",
            lambda target: target.attr["value"].t.desc.shape.dim.append(-1),
            "a constant's data type or shape is not known",
            "Const 'Const'",
        ),
        (
            "Const",
            lambda target: _assign(dtype=28)(target.attr["value"].t.desc),
            "a constant's data type or shape is not known",
            "Const 'Const'",
        ),
        (
            "Const",
            lambda target: _assign(dtype=7)(target.output_desc[0]),
            "a constant's output is not described as its value is",
            "Const 'Const'",
        ),
        ("Const", _two_outputs, "a constant's output is not described", "Const 'Const'"),
        ("NetOutput", _assign(type="Neg"), "a graph has 0 NetOutput ops instead of one", ""),
        ("Neg", _assign(type="NetOutput"), "a graph has 2 NetOutput ops instead of one", "'Neg', "),
        ("NetOutput", _input(0, ""), "result 0 is not fed, or its", "NetOutput 'NetOutput'"),
        (
            "NetOutput",
            lambda target: _assign(dtype=0)(target.input_desc[1]),
            "result 1 is not fed, or its data type is not known",
            "NetOutput 'NetOutput'",
        ),
    ],
)
def test_damaged_graphs_are_refused(
    name: str, change: Callable[[Any], None], what: str, where: str
) -> None:
    error = refusal(damage(name)(change)())
    assert error.what.startswith(what)
    assert error.where.startswith(where)


def test_the_text_of_an_error() -> None:
    assert str(refusal(damage("Neg")(_input(0, "arg0:1"))())) == (
        "[RM027] an edge comes from output 1 of 'arg0'\n"
        "  where: Neg 'Neg'\n"
        "  why: Data 'arg0' has 1 outputs\n"
        "  fix: convert the program again; a graph that torchair made for rolemesh is valid"
    )
