"""A converted graph as text for people: one line an op, in the graph's order.

::

    graph pd_mixed.decode.rank0: 17 inputs, 168 ops
      inputs
        arg1_1     f32[126, 72]                   model.embed_tokens.weight
      ops
        RmsNorm    (f32[2, 1, 72], f32[2, 1, 1])  = RmsNorm(x=Identity, gamma=arg4_1, epsilon=1e-06)
        Reshape_6  f32[2, 72]                     = Reshape(x=RmsNorm.y, shape=[2, 72], axis=0)
      results
        Reshape_51

Constants are written where they are used. Of an op with several results, the use says which. The
type of an op that torchair's converters add is `?`: GE infers it. Attributes that hold names of
arguments (`_input_name_key`) are left out. The text depends on nothing but the graph; `files`
writes it next to the `.pbtxt`, which has everything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rolemesh.compiler.ir.tensor import dtype_name

__all__ = ["graph_text"]

_META = re.compile(r"Tensor\(dtype=torch\.(\w+), shape=torch\.Size\(\[(.*)\]\)")
_NAME_WIDTH, _TYPE_WIDTH = 24, 22


def graph_text(graph: Any, names: Sequence[str] = ()) -> str:
    """The text of a graph.

    Args:
        graph: GE's `GraphDef`.
        names: What the caller calls the inputs, by index.
    """
    return "\n".join(_Graph(graph, names).lines()) + "\n"


class _Graph:
    def __init__(self, graph: Any, names: Sequence[str]) -> None:
        self.graph = graph
        self.names = names
        self.ops = {op.name: op for op in graph.op}

    def lines(self) -> Iterator[str]:
        inputs = [op for op in self.graph.op if op.type in ("Data", "RefData")]
        ends = [op for op in self.graph.op if op.type == "NetOutput"]
        others = {op.name for op in (*inputs, *ends)}
        body = [op for op in self.graph.op if op.name not in others and op.type != "Const"]
        yield f"graph {self.graph.name}: {len(inputs)} inputs, {len(body)} ops"
        yield "  inputs"
        for op in inputs:
            index = op.attr["index"].i
            name = self.names[index] if index < len(self.names) else ""
            yield _row(op.name, self._type(op), name)
        yield "  ops"
        for op in body:
            yield _row(op.name, self._type(op), f"= {op.type}({', '.join(self._arguments(op))})")
        yield "  results"
        for op in ends:
            yield from (f"    {self._source(source)}" for source in op.input)

    def _type(self, op: Any) -> str:
        kinds = [_kind(desc) for desc in op.output_desc]
        return kinds[0] if len(kinds) == 1 else f"({', '.join(kinds)})"

    def _arguments(self, op: Any) -> Iterator[str]:
        named = len([source for source in op.input if source]) > 1
        descs = [desc.name for desc in op.input_desc]
        for index, source in enumerate(op.input):
            if source:
                name = descs[index] if index < len(descs) and not source.endswith(":-1") else ""
                yield f"{name}={self._source(source)}" if named and name else self._source(source)
        for key in sorted(op.attr):
            if not key.startswith("_"):
                yield f"{key}={_value(op.attr[key])}"

    def _source(self, source: str) -> str:
        """A use: `Op:0` is the first result of Op, `Op:-1` only waits for it."""
        name, _, number = source.rpartition(":")
        if number == "-1":
            return f"after {name}"
        op = self.ops.get(name)
        if op is None or len(op.output_desc) < 2:
            return name if op is None or op.type != "Const" else _constant(op)
        return f"{name}.{op.output_desc[int(number)].name or number}"


def _row(name: str, kind: str, rest: str) -> str:
    return f"    {name.ljust(_NAME_WIDTH)}  {kind.ljust(_TYPE_WIDTH)}  {rest}".rstrip()


def _kind(desc: Any) -> str:
    """The type of a result: torchair knows the shape from the traced graph; GE infers it later."""
    found = _META.search(desc.attr["_meta"].s.decode()) if "_meta" in desc.attr else None
    if found is None:
        return "?"
    dtype = getattr(torch, found[1])
    assert isinstance(dtype, torch.dtype)
    return f"{dtype_name(dtype)}[{found[2]}]"


def _constant(op: Any) -> str:
    """A constant where it is used: its value if torchair wrote it down, else its name."""
    value = op.attr["_readable_value"].s.decode() if "_readable_value" in op.attr else ""
    return value or op.name


def _value(attribute: Any) -> str:
    kind = attribute.WhichOneof("value")
    if kind is None:
        return "none"
    value = getattr(attribute, kind)
    if kind != "list":
        return _plain(value)
    lists = [items for field, items in value.ListFields() if field.name != "val_type"]
    return f"[{', '.join(_plain(item) for items in lists for item in items)}]"


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return json.dumps(value.decode(errors="backslashreplace"))
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split())
