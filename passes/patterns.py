"""What recognisers of patterns read graphs with.

They read flat graphs of a rank, whose nodes have `meta["val"]`, and Programs, whose nodes have
`meta["type"]`. Sizes that are symbols are never compared in a way that would fix them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.canonical_forms import arguments

__all__ = [
    "Size",
    "argument",
    "cast_source",
    "dtype_of",
    "factors",
    "halves",
    "is_call",
    "known_above",
    "number",
    "same",
    "same_shape",
    "shape_of",
    "sliced",
    "users_of",
]

aten = torch.ops.aten

Size = int | torch.SymInt
"""A size of a dim."""


def users_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that need a node. A result of several that was taken and not used is none."""
    return [user for user in node.users if user.users or user.target is not operator.getitem]


def is_call(value: object, *targets: object) -> bool:
    """Whether a value is a node that calls one of these."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def argument(node: fx.Node, name: str) -> object:
    """An argument of an op by its name in the schema; its default if it is not given."""
    assert isinstance(node.target, OpOverload)
    return arguments(node.target, node.args, node.kwargs)[name]


def shape_of(node: fx.Node) -> Sequence[Size]:
    """The sizes of a node's tensor."""
    return _tensor(node).shape


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    return _tensor(node).dtype


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are equal whatever symbols stand for."""
    return bool(statically_known_true(left == right))


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are equal whatever symbols stand for."""
    return len(left) == len(right) and all(map(same, left, right))


def known_above(size: Size, limit: int) -> bool:
    """Whether a size exceeds a limit; one that depends on a symbol does not."""
    return bool(statically_known_true(size > limit))


def number(value: object) -> float | None:
    """A plain number; None for anything else, a constant tensor of a graph among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def factors(value: object) -> list[tuple[fx.Node, fx.Node]]:
    """The two operands of a product, in both orders; nothing for another value."""
    if not is_call(value, aten.mul.Tensor):
        return []
    assert isinstance(value, fx.Node)
    left, right = value.args
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        return [(left, right), (right, left)]
    return []


def cast_source(value: object) -> fx.Node | None:
    """What a cast casts; None for any other node."""
    if not is_call(value, aten._to_copy.default):
        return None
    assert isinstance(value, fx.Node)
    source = value.args[0]
    assert isinstance(source, fx.Node)
    return None if _device(source) != _device(value) else source


def _device(node: fx.Node) -> torch.device | None:
    """Where a node's tensor is; a Program says nothing of it, and moves nothing."""
    value = _tensor(node)
    return value.device if isinstance(value, Tensor) else None


def sliced(value: object) -> tuple[fx.Node, int, Size, Size, int] | None:
    """A node as a slice of another.

    Returns:
        The source, the dim from the front, the first position, the extent and the step. A part of
        a split is a slice as well. None for any other node, and for bounds that are nodes.
    """
    if is_call(value, aten.slice.Tensor):
        assert isinstance(value, fx.Node)
        source, dim, start, step = (argument(value, n) for n in ("self", "dim", "start", "step"))
        if not isinstance(start, int | None) or not isinstance(step, int):
            return None
        assert isinstance(source, fx.Node)
        assert isinstance(dim, int)
        extents = shape_of(source)
        dim = dim % len(extents)
        first: Size = start or 0
        first = first + extents[dim] if start is not None and start < 0 else first
        return source, dim, first, shape_of(value)[dim], step
    if is_call(value, operator.getitem):
        assert isinstance(value, fx.Node)
        return _split_part(value)
    return None


def halves(first: object, second: object, step: int = 1) -> tuple[fx.Node, int] | None:
    """The tensor and the dim that two values are the halves of; None if they are not.

    Args:
        first: A value.
        second: Another one.
        step: 1 for the first and the second half, 2 for even and odd elements.
    """
    left, right = sliced(first), sliced(second)
    if left is None or right is None:
        return None
    x, dim, start, extent, stride = left
    if (right[0], right[1], right[4]) != (x, dim, stride) or stride != step:
        return None
    ends = same(extent * 2, shape_of(x)[dim]) and same(right[3], extent)
    begins = same(start, 0) and same(right[2], extent if step == 1 else 1)
    return (x, dim) if ends and begins else None


def _split_part(value: fx.Node) -> tuple[fx.Node, int, Size, Size, int] | None:
    split, index = value.args
    if not is_call(split, aten.split_with_sizes.default, aten.split.Tensor):
        return None
    assert isinstance(split, fx.Node)
    assert isinstance(index, int)
    source, dim = split.args[0], argument(split, "dim")
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    dim = dim % len(shape_of(source))
    extents = [part.shape[dim] for part in _values(split)]
    return source, dim, sum(extents[:index]), extents[index], 1


def _values(node: fx.Node) -> Sequence[Tensor | TensorType]:
    """What is known of a node's results."""
    value = node.meta.get("val", node.meta.get("type"))
    if isinstance(value, Tensor | TensorType):
        return (value,)
    assert isinstance(value, tuple | list)
    return value


def _tensor(node: fx.Node) -> Tensor | TensorType:
    (value,) = _values(node)
    return value
