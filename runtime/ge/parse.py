"""A GE graph from the bytes that torchair hands over: a serialized `ModelDef` of `ge_ir.proto`.

Two numberings of data types exist: descriptors use the one here, attributes that of
`runtime.ge.ops.table`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from rolemesh.runtime.ge.graph import (
    DATA_TYPES,
    SOURCE_TYPES,
    Edge,
    Graph,
    Node,
    TensorDesc,
    malformed,
)
from rolemesh.runtime.ge.ops.table import Attributes

__all__ = ["PROTO_DTYPES", "parse_graph"]

PROTO_DTYPES: Mapping[int, torch.dtype] = MappingProxyType(
    {
        1: torch.float32,
        2: torch.float16,
        3: torch.int8,
        4: torch.uint8,
        5: torch.int16,
        6: torch.uint16,
        7: torch.int32,
        8: torch.int64,
        9: torch.uint32,
        10: torch.uint64,
        11: torch.bool,
        12: torch.float64,
        16: torch.complex64,
        17: torch.complex128,
        27: torch.bfloat16,
        34: torch.float8_e5m2,
        35: torch.float8_e4m3fn,
    }
)
"""Data types by their number in descriptors (`DataType` of torchair's `ge_ir.proto`)."""


def parse_graph(model: bytes) -> Graph:
    """The first graph of a serialized `ModelDef`.

    torchair must have been loaded.

    Raises:
        RolemeshError: RM027 if the bytes are no such model, or the graph is not valid.
    """
    proto = _decode(model)
    return Graph.of(proto.name, [_node(op) for op in proto.op])


def _decode(model: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    where = f"{len(model)} bytes that should be a serialized ModelDef"
    try:
        parsed = ModelDef.FromString(model)
    except DecodeError as error:
        raise malformed("a GE graph cannot be read", where, str(error)) from error
    if not parsed.graph:
        raise malformed("there is no GE graph in a model", where, "its list of graphs is empty")
    return parsed.graph[0]


def _node(op: Any) -> Node:
    where = f"{op.type or 'an op without type'} {op.name!r}"
    if not op.name or not op.type:
        raise malformed("an op has no name or no type", where, "both are needed to run it")
    inputs: list[Edge | None] = []
    controls: list[str] = []
    for text in op.input:
        producer, colon, number = text.rpartition(":")
        if not text:
            inputs.append(None)
        elif not colon or not producer or not re.fullmatch(r"-1|[0-9]{1,9}", number):
            raise malformed(
                f"{text!r} is no edge", where, "an edge is NAME:OUTPUT, NAME:-1 or empty"
            )
        elif number == "-1":
            controls.append(producer)
        else:
            inputs.append(Edge(producer, int(number)))
    if op.type in SOURCE_TYPES and op.input:
        raise malformed("an op that only has a value has inputs", where, f"{list(op.input)}")
    descs = tuple(_desc(desc, f"input {desc.name!r} of {where}") for desc in op.input_desc)
    if op.type in DATA_TYPES:
        descs = ()  # Data describes an input that no edge feeds
    if len(descs) != len(inputs):
        raise malformed(
            f"an op has {len(inputs)} inputs and {len(descs)} descriptors of inputs",
            where,
            "each input is known by the name in its descriptor",
        )
    names = [desc.name for desc in descs]
    if len(set(names)) != len(names):
        raise malformed(f"two inputs of an op have one name: {', '.join(names)}", where, "")
    return Node(
        op.name,
        op.type,
        tuple(inputs),
        descs,
        tuple(controls),
        tuple(_desc(desc, f"output {desc.name!r} of {where}") for desc in op.output_desc),
        Attributes(_attributes(op.attr), where),
        _value(op, where) if op.type == "Const" else None,
    )


def _desc(desc: Any, where: str) -> TensorDesc:
    meta = desc.attr["_meta"].s.decode(errors="replace") if "_meta" in desc.attr else ""
    named = "_fx_tensor_name" in desc.attr
    return TensorDesc(
        desc.name,
        PROTO_DTYPES.get(desc.dtype),
        _shape(desc.shape.dim, where),
        desc.attr["_fx_tensor_name"].s.decode(errors="replace") if named else "",
        bool(meta),
        _numel(meta),
    )


def _shape(dims: Iterable[int], where: str) -> tuple[int, ...] | None:
    shape = tuple(dims)
    if shape == (-2,):
        return None
    if any(dim < -1 for dim in shape):
        raise malformed(
            f"{list(shape)} is no shape",
            where,
            "a dim is at least 0, or -1 if dynamic; an unknown rank is [-2]",
        )
    return shape


_META = re.compile(
    r"Tensor\(dtype=torch\.\w+, shape=torch\.Size\(\[((?:[0-9]{1,18}, )*[0-9]{1,18})?\]\)"
)


def _numel(meta: str) -> int | None:
    """Elements of the value that torchair's note on a tensor describes, if they are constant."""
    if meta.startswith("<class 'torch.Sym"):
        return 1
    found = _META.match(meta)
    return math.prod(int(dim) for dim in (found[1] or "").split(", ") if dim) if found else None


def _attributes(attributes: Any) -> dict[str, object]:
    values = {name: _plain(value) for name, value in attributes.items() if not name.startswith("_")}
    return {name: value for name, value in values.items() if value is not None}


def _plain(value: Any) -> object:
    """An attribute's value as plain data; None for kinds that no op's semantics needs."""
    kind = value.WhichOneof("value")
    if kind == "s":
        return value.s.decode(errors="replace")
    if kind in ("i", "f", "b", "dt"):
        return getattr(value, kind)
    if kind == "list":
        if value.list.s:
            return [item.decode(errors="replace") for item in value.list.s]
        lists = (list(getattr(value.list, field)) for field in ("i", "f", "b", "dt"))
        return next((items for items in lists if items), [])
    if kind == "list_list_int":
        return [list(row.list_i) for row in value.list_list_int.list_list_i]
    if kind == "list_list_float":
        return [list(row.list_f) for row in value.list_list_float.list_list_f]
    return None


def _value(op: Any, where: str) -> torch.Tensor:
    """The value of a Const, in memory of its own."""
    if "value" not in op.attr or op.attr["value"].WhichOneof("value") != "t":
        raise malformed("a constant has no value", where, "its attribute value is no tensor")
    tensor = op.attr["value"].t
    desc = _desc(tensor.desc, f"the value of {where}")
    if desc.dtype is None or desc.shape is None or -1 in desc.shape:
        raise malformed(
            "a constant's data type or shape is not known",
            where,
            f"its data type is {tensor.desc.dtype}, its shape {list(tensor.desc.shape.dim)}",
        )
    expected = math.prod(desc.shape) * desc.dtype.itemsize
    if len(tensor.data) != expected:
        raise malformed(
            f"a constant has {len(tensor.data)} bytes instead of {expected}", where, f"it is {desc}"
        )
    if len(op.output_desc) != 1 or op.output_desc[0].dtype != tensor.desc.dtype:
        raise malformed(
            "a constant's output is not described as its value is",
            where,
            f"the value is {desc}; data types of its outputs are "
            f"{[output.dtype for output in op.output_desc]}",
        )
    data = bytearray(tensor.data)
    flat = torch.frombuffer(data, dtype=desc.dtype) if data else torch.empty(0, dtype=desc.dtype)
    return flat.reshape(desc.shape)
