"""A Program as JSON, and back.

Written are the graph, the signature, types, layouts, pins, the history and the symbols of sizes;
not the decisions of propagation, which passes make anew. A Program that is read back prints the
same text and runs the same.

Ops are written by name: `aten.mm.default`, `mesh.all_gather`, `getitem`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.nodes import add_call
from rolemesh.compiler.ir.placement import Placement
from rolemesh.compiler.ir.program import (
    Input,
    InputKind,
    Origin,
    Output,
    Program,
    origin,
    tensor_types,
)
from rolemesh.compiler.ir.serial_values import (
    Json,
    decode_argument,
    decode_assumption,
    decode_placement,
    decode_type,
    encode_argument,
    encode_placement,
    encode_type,
)
from rolemesh.compiler.ir.tensor import TensorType

__all__ = [
    "decode_program",
    "decode_signature",
    "encode_head",
    "encode_layouts",
    "encode_node",
    "op_text",
]

_MESH_OPS: Mapping[str, dialect.MeshOp] = {
    str(op): op
    for op in (*vars(dialect).values(), *dialect.STARTS.values())
    if isinstance(op, dialect.MeshOp)
}
_GETITEM = "getitem"
_ORIGIN = tuple(Origin.__dataclass_fields__)


def op_text(node: fx.Node) -> str:
    """The name of a node's op: `input` for an input."""
    if node.op == "placeholder":
        return "input"
    return _GETITEM if node.target is operator.getitem else str(node.target)


def encode_head(program: Program) -> dict[str, Json]:
    """Everything about a Program but its nodes."""
    head: dict[str, Json] = {
        "name": program.name,
        "phase": program.phase,
        "mesh": None,
        "history": list(program.history),
        "inputs": [
            {"node": node.name, "name": entry.name, "kind": entry.kind.value}
            | ({"mutated": True} if entry.mutated else {})
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
        ],
        "outputs": [
            {"value": encode_argument(value)}
            | ({} if output.mutates is None else {"mutates": output.mutates})
            | ({} if output.gradient_of is None else {"gradient_of": output.gradient_of})
            for value, output in zip(program.results, program.outputs, strict=True)
        ],
    }
    if program.mesh is not None:
        head["mesh"] = dict(zip(program.mesh.names, program.mesh.sizes, strict=True))
    if program.pinned:
        head["pinned"] = {str(i): _layout(layout) for i, layout in program.pinned.items()}
    if program.scope is not None:
        head["symbols"] = _symbols(program.scope)
        head["assumptions"] = [str(relation) for relation in program.scope.assumptions]
    return head


def encode_layouts(program: Program, node: fx.Node) -> dict[str, Json]:
    """The layouts of one node's results; empty before seeding."""
    layouts = program.layouts.get(node)
    return {} if layouts is None else {"layouts": [_layout(layout) for layout in layouts]}


def encode_node(node: fx.Node) -> dict[str, Json]:
    """One node: its op, arguments, types and origin; what is empty is left out."""
    found: dict[str, Json] = {"name": node.name, "op": op_text(node)}
    if node.args:
        found["args"] = encode_argument(node.args)
    if node.kwargs:
        found["kwargs"] = {name: encode_argument(value) for name, value in node.kwargs.items()}
    types = tensor_types(node)
    found["types"] = [encode_type(value) for value in types]
    if types and not isinstance(node.meta["type"], TensorType):
        found["several"] = True
    where = origin(node)
    for name in _ORIGIN:
        text = getattr(where, name)
        if text:
            found[name] = text
    return found


def _layout(layout: Layout) -> Json:
    return [encode_placement(placement) for placement in layout.placements]


def _symbols(scope: Scope) -> Json:
    return [
        {
            "name": str(symbol),
            "hint": hint,
            "lower": int(scope.ranges[symbol].lower),
            "upper": int(scope.ranges[symbol].upper),
            "source": list(scope.sources[symbol]) if symbol in scope.sources else None,
        }
        for symbol, hint in scope.hints.items()
    ]


def decode_signature(head: Mapping[str, Json], nodes: Sequence[Mapping[str, Json]]) -> Program:
    """A Program that was written, without its ops: its inputs, symbols and outputs.

    Args:
        head: What `encode_head` gave.
        nodes: As for `decode_program`; those that are no inputs are not looked at.

    Raises:
        ValueError: If the data is no Program.
    """
    inputs = [entry for entry in nodes if entry["op"] == "input"]
    outputs = cast(Any, head["outputs"])
    whole = {**head, "outputs": [{**entry, "value": None} for entry in outputs]}
    return decode_program(cast(Any, whole), inputs)


def decode_program(head: Mapping[str, Json], nodes: Sequence[Mapping[str, Json]]) -> Program:
    """The Program that was written.

    Args:
        head: What `encode_head` gave.
        nodes: What `encode_node` and `encode_layouts` gave together, in the graph's order.

    Raises:
        ValueError: If the data is no Program, or names an op that does not exist here.
    """
    try:
        return _Decoder(head).program(nodes)
    except (KeyError, TypeError, AssertionError, AttributeError, RolemeshError) as error:
        raise ValueError(f"the data is no program: {type(error).__name__}: {error}") from error


class _Decoder:
    def __init__(self, head: Mapping[str, Any]) -> None:
        self.head = head
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        self.targets: dict[str, Callable[..., object]] = {}
        self.types: dict[tuple[object, ...], TensorType] = {}
        self.placements: dict[str, Placement] = {}
        self.scope: Scope | None = None
        if "symbols" in head:
            self.scope = Scope()
            for entry in self.head["symbols"]:
                hint, lower, upper = (entry[name] for name in ("hint", "lower", "upper"))
                if not all(isinstance(n, int) for n in (hint, lower, upper)) or lower > upper:
                    raise ValueError(f"symbol {entry['name']} has no range of integers")
                size = self.scope.symbol(entry["name"], hint, lower, upper)
                assert isinstance(size, Dim)
                if entry["source"] is not None:
                    self.scope.sources[size.formula] = tuple(entry["source"])
            for text in self.head["assumptions"]:
                self.scope.assumptions.setdefault(decode_assumption(text, self.scope))

    def program(self, nodes: Sequence[Mapping[str, Any]]) -> Program:
        head = self.head
        for entry in nodes:
            self.node(entry)
        values = [decode_argument(out["value"], self.nodes, self.scope) for out in head["outputs"]]
        self.graph.output(tuple(values))  # type: ignore[arg-type] # FX lists fewer types
        return Program(
            head["name"],
            self.graph,
            tuple(
                Input(entry["name"], InputKind(entry["kind"]), entry.get("mutated", False))
                for entry in head["inputs"]
            ),
            tuple(
                Output(entry.get("mutates"), entry.get("gradient_of")) for entry in head["outputs"]
            ),
            phase=head["phase"],
            mesh=None if head["mesh"] is None else Mesh(head["mesh"]),
            layouts=self.layouts,
            pinned={int(i): self.layout(entry) for i, entry in head.get("pinned", {}).items()},
            history=tuple(head["history"]),
            scope=self.scope,
        )

    def node(self, entry: Mapping[str, Any]) -> None:
        name, op = entry["name"], entry["op"]
        if op == "input":
            node = self.graph.create_node("placeholder", name, name=name)
        else:
            target = self.target(op)
            args: Any = decode_argument(entry.get("args", []), self.nodes, self.scope)
            kwargs: Any = {
                key: decode_argument(value, self.nodes, self.scope)
                for key, value in entry.get("kwargs", {}).items()
            }
            if not all(map(str.isidentifier, kwargs)):  # they become part of code
                raise ValueError(f"{name} has an argument that cannot be named")
            if isinstance(target, dialect.MeshOp):
                kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}
            node = add_call(self.graph, target, tuple(args), kwargs, name)
        if node.name != name:
            raise ValueError(f"two nodes have the name {name}")
        types = tuple(map(self.type, entry["types"]))
        if types:
            node.meta["type"] = types if entry.get("several") else types[0]
        texts = {key: entry[key] for key in _ORIGIN if key in entry}
        if texts:
            node.meta["origin"] = Origin(**texts)
        if "layouts" in entry:
            self.layouts[node] = tuple(self.layout(layout) for layout in entry["layouts"])
        self.nodes[name] = node

    def target(self, name: str) -> Callable[..., object]:
        found = self.targets.get(name)
        if found is None:
            found = self.targets[name] = _target(name)
        return found

    def type(self, data: Mapping[str, Any]) -> TensorType:
        key = data["dtype"], *data["shape"]
        found = self.types.get(key)
        if found is None:
            found = self.types[key] = decode_type(data, self.scope)
        return found

    def layout(self, data: Sequence[Json]) -> Layout:
        return Layout(tuple(map(self.placement, data)))

    def placement(self, data: Json) -> Placement:
        key = str(data)
        found = self.placements.get(key)
        if found is None:
            found = self.placements[key] = decode_placement(data, self.scope)
        return found


def _target(name: str) -> Callable[..., object]:
    """The op of a name.

    Raises:
        ValueError: If there is none.
    """
    if name == _GETITEM:
        return operator.getitem
    if name in _MESH_OPS:
        return _MESH_OPS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    try:
        packets = getattr(torch.ops, namespace)
        found = getattr(getattr(packets, packet), overload)
    except AttributeError as error:
        raise ValueError(f"there is no op {name!r}; import the library that defines it") from error
    if not isinstance(found, OpOverload):
        raise ValueError(f"{name!r} is no op")
    return found
