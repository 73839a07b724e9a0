"""Which ops torchair can convert, and the error that says which it cannot.

torchair declares converters for nearly all ATen ops, most of which do nothing but raise. Such a
converter has no way to return: that is how it is told from a real one.
"""

from __future__ import annotations

import dis
import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from types import CodeType, MappingProxyType

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import origin
from rolemesh.lowering.ge.loader import load_torchair
from rolemesh.lowering.npu.define import define_npu_ops

__all__ = ["conversion_error", "has_converter", "refuse_unconvertible"]

aten = torch.ops.aten

_FIX = "write the model without it, or register a converter with torchair; the targets eager and \
inductor run it as it is"


def has_converter(target: object) -> bool:
    """Whether torchair can convert calls of `target`, at least with some arguments."""
    if target is operator.getitem:
        return True
    load_torchair()  # its import puts converters on the ops
    converter = getattr(target, "_ge_converter", None)
    if converter is None and not _is_native(target):
        converter = _other_converter(target)
    return converter is not None and _can_return(inspect.unwrap(converter).__code__)


def _is_native(target: object) -> bool:
    """Whether it is an op of torch, which has a converter in torchair from the start or none."""
    return isinstance(target, OpOverload) and target.namespace in ("aten", "prims", "prim")


def _other_converter(target: object) -> Callable[..., object] | None:
    """Of a custom op, which torchair makes if GE has an op of that name, or of a plain function."""
    define_npu_ops()  # torchair registers converters of these on the way, of those that it finds
    convert = load_torchair().module._ge_concrete_graph.fx2ge_converter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about those that it does not find
        try:
            return convert.get_or_auto_gen_converter(target)
        except Exception:  # noqa: BLE001 - that is how it says that there is none
            return None


@cache
def _can_return(code: CodeType) -> bool:
    return any(
        instruction.opname in ("RETURN_VALUE", "RETURN_CONST")
        for instruction in dis.get_instructions(code)
    )


def refuse_unconvertible(graph: fx.Graph) -> None:
    """Check that torchair can convert a graph, before anything is converted or runs.

    Args:
        graph: A flat graph, after decomposition.

    Raises:
        RolemeshError: RM026, with every op that it cannot convert.
    """
    refused: dict[str, dict[str, list[fx.Node]]] = {}
    known: dict[object, bool] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target not in known:
            known[node.target] = has_converter(node.target)
        reason = _PARTLY[node.target](node) if node.target in _PARTLY else ""
        if not reason and not known[node.target]:
            reason = _DATA_DEPENDENT if _depends_on_data(node.target) else _NO_CONVERTER
        if reason:
            refused.setdefault(reason, {}).setdefault(_name(node.target), []).append(node)
    if refused:
        raise _refusal(refused)


def conversion_error(node: fx.Node, error: BaseException) -> RolemeshError:
    """The error for a converter that refused the arguments of a call.

    Args:
        node: The call.
        error: What the converter raised.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return RolemeshError(
        "RM026",
        what=f"GE graphs cannot express this call of {_name(node.target)}",
        where=_place(node),
        why=f"torchair's converter refuses its arguments: {reason}",
        fix=_FIX,
    )


_NO_CONVERTER = "torchair has no converter, and rolemesh no decomposition into ops that have one"
_DATA_DEPENDENT = (
    "the size of its result, or what runs next, depends on values, and the sizes of a GE graph on "
    "those of its inputs only"
)


def _depends_on_data(target: object) -> bool:
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return isinstance(target, OpOverload) and not tags.isdisjoint(target.tags)


def _refusal(refused: Mapping[str, Mapping[str, list[fx.Node]]]) -> RolemeshError:
    names = [name for calls in refused.values() for name in calls]
    places = [
        f"{name}: {_times(len(nodes))}{_place(nodes[0])}"
        for calls in refused.values()
        for name, nodes in calls.items()
    ]
    reasons = [f"{', '.join(calls)}: {reason}" for reason, calls in refused.items()]
    count = f"{len(names)} ops" if len(names) > 1 else "an op"
    fix = _FIX.replace("without it,", "without them,") if len(names) > 1 else _FIX
    if _DATA_DEPENDENT in refused:
        fix = f"use a form with a fixed size, such as torch.where or a mask; or {fix}"
    return RolemeshError(
        "RM026",
        what=f"GE graphs cannot express {count} of this program",
        where="\n".join(places),
        why="\n".join(reasons),
        fix=fix,
    )


def _times(count: int) -> str:
    return f"{count} times, first " if count > 1 else ""


def _place(node: fx.Node) -> str:
    where = origin(node)
    parts = [f"%{node.name}"]
    if where.module:
        parts.append(f"in {where.module}")
    if where.source:
        parts.append(f"at {where.source}")
    return " ".join(parts)


def _name(target: object) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    return str(getattr(target, "__name__", target))


def _index(node: fx.Node) -> str:
    """Torchair reads the truth values of a mask as row numbers 0 and 1."""
    places = node.args[1]
    assert isinstance(places, tuple | list)
    masks = (torch.bool, torch.uint8)
    given = [place.meta["val"] for place in places if isinstance(place, fx.Node)]
    return _DATA_DEPENDENT if any(place.dtype in masks for place in given) else ""


def _max_pool(node: fx.Node) -> str:
    """Torchair gives the maxima for their places."""
    places = (user for user in node.users if user.target is operator.getitem and user.args[1] == 1)
    used = any(user.users for user in places)
    return "GE gives no places of the maxima in the form of torch" if used else ""


def _as_strided(node: fx.Node) -> str:
    """In a GE graph a value is all there is of its memory, in the order of its dims."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    size = value.numel() * value.element_size()
    if value.is_contiguous() and value.untyped_storage().nbytes() == size:
        return ""
    return "it reads memory by strides, and GE keeps values in another order than torch here"


_PARTLY: Mapping[object, Callable[[fx.Node], str]] = MappingProxyType(
    {
        aten.index.Tensor: _index,
        aten.max_pool2d_with_indices.default: _max_pool,
        aten.as_strided.default: _as_strided,
        aten.as_strided_scatter.default: _as_strided,
    }
)
"""Ops whose converters give wrong results for some calls -> why a call is one of those, or ""."""
