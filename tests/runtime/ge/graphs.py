"""Builds serialized GE graphs op by op, as torchair would hand them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.runtime.ge.executor import Executor
from rolemesh.runtime.ge.ops.table import Attributes, OpTable
from rolemesh.runtime.ge.parse import PROTO_DTYPES, parse_graph

NUMBERS = {dtype: number for number, dtype in PROTO_DTYPES.items()}

TABLE = OpTable()
"""A few ops of every form, so that the executor is tested without the real tables."""


@TABLE.op("Neg")
def neg(a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return torch.neg(x)


@TABLE.op("Add", equal=("x1", "x2"))
def add(a: Attributes, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    return torch.add(x1, x2)


@TABLE.op("Scale")
def scale(a: Attributes, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    result = x * a.float("factor", 2.0)
    return result if bias is None else result + bias


@TABLE.op("Flat", view=True)
def flat(a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1)


@TABLE.op("Turn", view=True)
def turn(a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.t()


@TABLE.op("Join", dynamic=("x",), equal=("x",))
def join(a: Attributes, x: Sequence[torch.Tensor], dim: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(x), int(dim))


@TABLE.op("Halves")
def halves(a: Attributes, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    first, second = x.chunk(2)
    return first.clone(), second.clone()


@TABLE.op("TensorMove")
def tensor_move(a: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@TABLE.op("Assign", equal=("ref", "value"), writes={0: "ref"})
def assign(a: Attributes, ref: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return ref.copy_(value)


@TABLE.op("Increment", writes={0: "var"})
def increment(a: Attributes, var: torch.Tensor) -> torch.Tensor:
    return var.add_(1)


@TABLE.op("IncrementAll", dynamic=("var",), writes={0: "var"})
def increment_all(a: Attributes, var: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.add_(1) for tensor in var)


class Builder:
    """One GE graph; edges are texts such as `Add:0`.

    Attributes:
        model: The `ModelDef`.
        graph: Its `GraphDef`, which tests may damage.
    """

    def __init__(self) -> None:
        load_torchair()
        from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

        self.model: Any = ModelDef()
        self.graph: Any = self.model.graph.add()
        self.graph.name = "graph"
        self.inputs = 0

    def data(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, kind: str = "Data"
    ) -> str:
        op = self._added(kind, f"arg{self.inputs}")
        op.attr["index"].i = self.inputs
        self.inputs += 1
        for desc, name in ((op.input_desc.add(), "x"), (op.output_desc.add(), "y")):
            desc.name = name
            desc.dtype = NUMBERS[dtype]
            desc.shape.dim.extend(shape)
        return f"{op.name}:0"

    def const(self, value: torch.Tensor) -> str:
        op = self._added("Const")
        tensor = op.attr["value"].t
        tensor.data = bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist())
        tensor.desc.dtype = NUMBERS[value.dtype]
        tensor.desc.shape.dim.extend(value.shape)
        op.output_desc.add().CopyFrom(tensor.desc)
        return f"{op.name}:0"

    def placeholder(self, value: torch.Tensor, number: int) -> str:
        """A frozen parameter; `number` is its data type as attributes number them."""
        op = self._added("ConstPlaceHolder")
        op.attr["origin_shape"].list.i.extend(value.shape)
        op.attr["dtype"].dt = number
        op.attr["size"].i = value.nbytes
        op.attr["addr"].i = value.data_ptr()
        op.output_desc.add().name = "y"
        return f"{op.name}:0"

    def op(
        self,
        kind: str,
        inputs: Mapping[str, str],
        *,
        outputs: int = 1,
        fx: str = "",
        meta: str = "",
        dtype: torch.dtype = torch.float32,
        after: Sequence[str] = (),
        **attributes: object,
    ) -> str:
        """Add an op.

        Args:
            kind: Its type.
            inputs: For each input its edge; empty for an unfed one.
            outputs: Number of outputs.
            fx: Which fx node's value the outputs are.
            meta: What torchair notes about that value, without its data type.
            dtype: Data type in the descriptors of the outputs.
            after: Names of ops that must run before.
            **attributes: Its attributes.
        """
        op = self._added(kind)
        op.input.extend(f"{name}:-1" for name in after)
        for name, edge in inputs.items():
            op.input.append(edge)
            op.input_desc.add().name = name
        for index in range(outputs):
            desc = op.output_desc.add()
            desc.name, desc.dtype = f"y{index}", NUMBERS[dtype]
            if fx:
                desc.attr["_fx_tensor_name"].s = f"{fx}.OUTPUT.{index}".encode()
            if meta:
                desc.attr["_meta"].s = f"Tensor(dtype={dtype}, shape=torch.Size({meta})".encode()
        for key, value in attributes.items():
            _set(op.attr[key], value)
        return f"{op.name}:0"

    def results(
        self, *results: tuple[str, Sequence[int]], dtype: torch.dtype = torch.float32
    ) -> bytes:
        """End the graph with these edges, of these shapes; the serialized model."""
        op = self._added("NetOutput")
        for index, (edge, shape) in enumerate(results):
            op.input.append(edge)
            desc = op.input_desc.add()
            desc.name, desc.dtype = f"input{index}", NUMBERS[dtype]
            desc.shape.dim.extend(shape)
        return self.serialized()

    def typed(self, index: int, dtype: torch.dtype) -> bytes:
        """Give the result at `index` of the ended graph another data type; the serialized model."""
        self.graph.op[-1].input_desc[index].dtype = NUMBERS[dtype]
        return self.serialized()

    def serialized(self) -> bytes:
        return bytes(self.model.SerializeToString())

    def _added(self, kind: str, name: str = "") -> Any:
        count = sum(op.type == kind for op in self.graph.op)
        op = self.graph.op.add()
        op.type = kind
        op.name = name or (f"{kind}_{count}" if count else kind)
        return op


def _set(attribute: Any, value: object) -> None:
    if isinstance(value, bool):
        attribute.b = value
    elif isinstance(value, int):
        attribute.i = value
    elif isinstance(value, float):
        attribute.f = value
    elif isinstance(value, str):
        attribute.s = value.encode()
    else:
        raise TypeError(value)


def executor(model: bytes, **options: Any) -> Executor:
    """The graph, ready to run on the ops above."""
    return Executor(parse_graph(model), options.pop("ops", TABLE.ops), **options)


def refusal(call: Callable[[], object], code: str) -> RolemeshError:
    """The error that a call raises, of this code."""
    with pytest.raises(RolemeshError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


def with_ops(*entries: Callable[[OpTable], object]) -> dict[str, object]:
    """The ops above, and others that `entries` enter into a table."""
    table = OpTable()
    for entry in entries:
        entry(table)
    return {"ops": {**TABLE.ops, **table.ops}}
