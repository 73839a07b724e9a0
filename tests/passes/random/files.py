"""Cases in files: JSON that keeps everything, after a listing for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from tests.passes.random.case import Call, Case, Fill, Leaf, Ref, Result, listing
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

import rolemesh.compiler.annotate  # noqa: F401 - registers the op `constrain`
from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Owner, Replicate, Segment, Segmented, Shard
from rolemesh.compiler.ir.program import InputKind
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["load", "save"]

_TUPLES = {
    kind.__name__: kind for kind in (Owner, Replicate, Segment, Segmented, Shard, TensorType)
}
_FUNCTIONS = {kind.__name__: kind for kind in (FloorDiv, Mod, PythonMod)}
_RECORDS = {kind.__name__: kind for kind in (Call, Fill, Layout, Leaf, Ref, Result)}


def save(case: Case, path: Path, message: str) -> None:
    """Write a case.

    Args:
        case: The case.
        path: The file; its folder is made.
        message: What is wrong with it.
    """
    symbols = [] if case.scope is None else list(case.scope.hints.items())
    data = {
        "message": message.splitlines(),
        "listing": listing(case).splitlines(),
        "mesh": dict(zip(case.mesh.names, case.mesh.sizes, strict=True)),
        "symbols": {str(symbol): hint for symbol, hint in symbols},
        "runs": [{str(symbol): value for symbol, value in run.items()} for run in case.runs],
        "steps": [_encoded(step) for step in case.steps],
        "results": [_encoded(result) for result in case.results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def load(path: Path) -> Case:
    """The case in a file."""
    data = json.loads(path.read_text())
    scope = Scope() if data["symbols"] else None
    symbols: dict[str, sympy.Symbol] = {}
    if scope is not None:
        for name, hint in data["symbols"].items():
            size = scope.symbol(name, hint)
            assert isinstance(size, Dim)
            symbols[name] = size.formula
    return Case(
        Mesh(data["mesh"]),
        tuple([_decoded(step, scope) for step in data["steps"]]),
        tuple([_decoded(result, scope) for result in data["results"]]),
        scope,
        tuple([{symbols[name]: value for name, value in run.items()} for run in data["runs"]]),
    )


def _encoded(value: Any) -> Any:
    if isinstance(value, Dim):
        return {"is": "size", "of": sympy.srepr(value.formula)}
    if isinstance(value, torch.dtype):
        return {"is": "dtype", "of": str(value).removeprefix("torch.")}
    if isinstance(value, torch._ops.OpOverload):
        return {"is": "op", "of": str(value)}
    if isinstance(value, InputKind):
        return {"is": "kind", "of": value.value}
    name = type(value).__name__
    if name in _TUPLES:
        return {"is": name, "of": [_encoded(item) for item in value]}
    if name in _RECORDS:
        return {"is": name, "of": {key: _encoded(item) for key, item in vars_of(value).items()}}
    if isinstance(value, tuple):
        return {"is": "tuple", "of": [_encoded(item) for item in value]}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, dict):
        return {"is": "dict", "of": {key: _encoded(item) for key, item in value.items()}}
    return value


def vars_of(record: Any) -> Mapping[str, Any]:
    """The fields of a dataclass, with or without slots."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _decoded(value: Any, scope: Scope | None) -> Any:
    if isinstance(value, list):
        return [_decoded(item, scope) for item in value]
    if not isinstance(value, dict):
        return value
    kind, of = value["is"], value["of"]
    if kind == "size":
        assert scope is not None
        return scope.size(sympy.sympify(of, locals=_FUNCTIONS))
    if kind == "dtype":
        return getattr(torch, of)
    if kind == "op":
        namespace, name, overload = of.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    if kind == "kind":
        return InputKind(of)
    if kind in _RECORDS:
        return _RECORDS[kind](**{key: _decoded(item, scope) for key, item in of.items()})
    if kind == "dict":
        return {key: _decoded(item, scope) for key, item in of.items()}
    items = [_decoded(item, scope) for item in of]
    return tuple(items) if kind == "tuple" else _TUPLES[kind](*items)
