"""What a Program's nodes are made of, as JSON: sizes, placements, arguments.

| in a Program | as JSON |
|---|---|
| a node as an argument | `{"node": "mm_3"}` |
| a size | an integer; a symbolic one `{"dim": "2*T"}` as an argument, and `"2*T"` in shapes |
| a dtype, a device, ... | `{"dtype": "float32"}`, `{"device": "cpu"}`, ... |
| a float that JSON lacks | `{"float": "inf"}` |
| replicated | `"replicated"` |
| partial | `{"partial": "sum"}` |
| owned by a rank | `{"owner": 2}` |
| a shard | `{"shard": [dim, outer, size]}` |
| segmented | `{"segmented": [dim, [[length, outer, size, copies], ...]]}` |
| routed | `{"routed": ["key", dim, outer, size]}` |

Lists and tuples are both arrays. What is read back is equal, but for that difference.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import TypeAlias

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.placement import (
    REPLICATE,
    Owner,
    Partial,
    Placement,
    Replicate,
    Routed,
    Segment,
    Segmented,
    Shard,
)
from rolemesh.compiler.ir.tensor import TensorType

__all__ = [
    "Json",
    "decode_argument",
    "decode_assumption",
    "decode_placement",
    "decode_size",
    "decode_type",
    "encode_argument",
    "encode_placement",
    "encode_size",
    "encode_type",
]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_TORCH_NAMES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def encode_size(size: int) -> int | str:
    """A size: an integer, or a formula as text."""
    return str(size.formula) if isinstance(size, Dim) else int(size)


def decode_size(text: int | str, scope: Scope | None) -> int:
    """The inverse of `encode_size`.

    Raises:
        ValueError: If the text is no formula over the scope's symbols.
    """
    return text if isinstance(text, int) else _formula(_parsed(text), scope)


def decode_assumption(text: str, scope: Scope) -> sympy.Basic:
    """A relation between formulas, such as `T - 32 <= 0`, from its text.

    Raises:
        ValueError: If the text is no relation over the scope's symbols.
    """
    tree = _parsed(text)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, bool):
        return sympy.true if tree.value else sympy.false
    relation = _RELATIONS.get(type(tree.ops[0])) if isinstance(tree, ast.Compare) else None
    if relation is None or not isinstance(tree, ast.Compare):
        raise ValueError(f"{text!r} is no relation of sizes")
    left, right = (_formula(side, scope) for side in (tree.left, tree.comparators[0]))
    sides = [size.formula if isinstance(size, Dim) else size for size in (left, right)]
    return relation(*sides)


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise _no_formula(text) from error


def _no_formula(text: str) -> ValueError:
    return ValueError(f"{text!r} is no formula over the sizes of this program")


_RELATIONS: Mapping[type[ast.cmpop], Callable[..., sympy.Basic]] = {
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
}
_OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, Callable[..., sympy.Expr]] = {
    "FloorDiv": FloorDiv,
    "Mod": Mod,
    "PythonMod": PythonMod,
    "Max": sympy.Max,
    "Min": sympy.Min,
}


def _formula(tree: ast.expr, scope: Scope | None) -> int:
    """The size that an expression stands for; sizes know their arithmetic."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name) and scope is not None:
        for symbol in scope.hints:
            if str(symbol) == tree.id:
                return scope.size(symbol)
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return 0 - _formula(tree.operand, scope)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        sides = _formula(tree.left, scope), _formula(tree.right, scope)
        return _OPERATORS[type(tree.op)](*sides)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and scope is not None:
        function = _FUNCTIONS.get(tree.func.id)
        if function is not None:
            sizes = [_formula(arg, scope) for arg in tree.args]
            formulas = [n.formula if isinstance(n, Dim) else sympy.Integer(n) for n in sizes]
            return scope.size(function(*formulas))
    raise _no_formula(ast.unparse(tree))


def encode_placement(placement: Placement) -> Json:
    """One placement; see the module docstring."""
    match placement:
        case Replicate():
            return "replicated"
        case Partial(op):
            return {"partial": op}
        case Owner(rank):
            return {"owner": rank}
        case Shard():
            return {"shard": [encode_size(n) for n in placement]}
        case Segmented(dim, segments):
            return {"segmented": [dim, [[encode_size(n) for n in s] for s in segments]]}
        case Routed(key, dim, outer, size):
            return {"routed": [key, dim, encode_size(outer), encode_size(size)]}


def decode_placement(data: Json, scope: Scope | None) -> Placement:
    """The inverse of `encode_placement`.

    Raises:
        ValueError: If the data is no placement.
    """
    match data:
        case "replicated":
            return REPLICATE
        case {"partial": str(op), **rest} if not rest:
            return Partial(op)
        case {"owner": int(rank), **rest} if not rest:
            return Owner(rank)
        case {"shard": [dim, outer, size], **rest} if not rest:
            return Shard(*(_size(n, scope) for n in (dim, outer, size)))
        case {"segmented": [int(dim), [_, *_] as segments], **rest} if not rest:
            return Segmented(dim, tuple(_segment(s, scope) for s in segments))
        case {"routed": [str(key), dim, outer, size], **rest} if not rest:
            return Routed(key, *(_size(n, scope) for n in (dim, outer, size)))
    raise ValueError(f"{data!r} is no placement")


def _segment(data: Json, scope: Scope | None) -> Segment:
    match data:
        case [length, outer, size, copies]:
            return Segment(*(_size(n, scope) for n in (length, outer, size, copies)))
    raise ValueError(f"{data!r} is no segment")


def _list(data: Json) -> list[Json]:
    if not isinstance(data, list):
        raise ValueError(f"{data!r} is no array")
    return data


def _size(data: Json, scope: Scope | None) -> int:
    if not isinstance(data, int | str):
        raise ValueError(f"{data!r} is no size")
    return decode_size(data, scope)


def encode_type(value: TensorType) -> dict[str, Json]:
    """The type of one tensor: `{"dtype": "float32", "shape": [2, "T"]}`."""
    shape: list[Json] = [encode_size(n) for n in value.shape]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape}


def decode_type(data: Mapping[str, Json], scope: Scope | None) -> TensorType:
    """The inverse of `encode_type`."""
    shape = tuple(_size(n, scope) for n in _list(data["shape"]))
    dtype = _torch_object("dtype", data["dtype"])
    assert isinstance(dtype, torch.dtype)
    return TensorType(shape, dtype)


def encode_argument(value: object) -> Json:
    """An argument of a node.

    Raises:
        TypeError: For a value that no graph of ours has.
    """
    match value:
        case None | bool() | str():
            return value
        case Dim():
            return {"dim": str(value.formula)}
        case int():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case fx.Node():
            return {"node": value.name}
        case Shard() | Segmented():
            return encode_placement(value)
        case list() | tuple():
            return [encode_argument(item) for item in value]
        case torch.device():
            return {"device": str(value)}
        case complex():
            return {"complex": [encode_argument(value.real), encode_argument(value.imag)]}
    for kind, type_ in _TORCH_NAMES.items():
        if isinstance(value, type_):
            return {kind: str(value).removeprefix("torch.")}
    raise TypeError(f"{value!r} ({type(value).__name__}) is no argument that can be written")


def decode_argument(data: Json, nodes: Mapping[str, fx.Node], scope: Scope | None) -> object:
    """The inverse of `encode_argument`.

    Args:
        data: The data.
        nodes: The nodes so far, by name.
        scope: The symbols of the program's sizes.

    Raises:
        ValueError: If the data is no argument.
        KeyError: If it names a node that is not there.
    """
    if isinstance(data, list):
        return [decode_argument(item, nodes, scope) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueError(f"{data!r} is no argument")
    ((kind, value),) = data.items()
    if kind == "node":
        return nodes[str(value)]
    if kind == "dim":
        return decode_size(str(value), scope)
    if kind == "float":
        return float(str(value))
    if kind == "complex":
        real, imaginary = (decode_argument(part, nodes, scope) for part in _list(value))
        assert isinstance(real, float)
        assert isinstance(imaginary, float)
        return complex(real, imaginary)
    if kind == "device":
        return torch.device(str(value))
    if kind in _TORCH_NAMES:
        return _torch_object(kind, value)
    return decode_placement(data, scope)


def _torch_object(kind: str, name: Json) -> object:
    found = getattr(torch, str(name), None)
    if not isinstance(found, _TORCH_NAMES[kind]):
        raise ValueError(f"torch has no {kind} {name!r}")
    return found
