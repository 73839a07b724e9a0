"""Recognises norms and rotations in graphs of ATen, where a model has no op for them.

    x / sqrt(mean(x^2) + eps) * weight             an RMS norm, in fp32 between casts
    x * cos + cat(-x2, x1) * sin                   a rotation
    cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)  a rotation

x1 and x2 are the halves of the last dim of x, in the last form also its even and odd elements. The
weight of a norm is multiplied before or after the cast back. In the last form cos and sin have half
of the last dim. The composite ops are recognised as well.

Both are found from their last node, in flat graphs and in Programs (`rolemesh.passes.patterns`).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.passes.patterns import (
    argument,
    cast_source,
    dtype_of,
    factors,
    halves,
    is_call,
    number,
    same_shape,
    shape_of,
)

__all__ = ["ENDS_OF_NORMS", "ENDS_OF_ROTATIONS", "Norm", "Rotation", "find_norm", "find_rotation"]

aten = torch.ops.aten

ENDS_OF_NORMS = frozenset({aten.mul.Tensor, aten._to_copy.default})
"""ATen ops that a norm may end in."""
ENDS_OF_ROTATIONS = frozenset({aten.add.Tensor, aten.cat.default})
"""ATen ops that a rotation may end in."""


class Norm(NamedTuple):
    """`end` is `x` normalised by `epsilon`, times `gamma`, all of one dtype.

    `rounded` says that it was rounded to that dtype before the product, too; `inner` are the nodes
    on the way.
    """

    end: fx.Node
    x: fx.Node
    gamma: fx.Node
    epsilon: float
    rounded: bool
    inner: tuple[fx.Node, ...]


class Rotation(NamedTuple):
    """A rotation of `x`; cos and sin have its last dim divided by `share`.

    `step` is 1 if pairs are of its halves, and 2 if they are neighbours.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    share: int
    step: int
    inner: tuple[fx.Node, ...]


def find_norm(end: fx.Node) -> Norm | None:
    """The norm that a node is the last of, if it is."""
    if _name(end) == "rolemesh::rms_norm":
        x, gamma, epsilon, rounded = (argument(end, n) for n in ("x", "weight", "eps", "rounded"))
        assert isinstance(x, fx.Node)
        assert isinstance(gamma, fx.Node)
        assert isinstance(epsilon, float)
        alike = dtype_of(x) == dtype_of(gamma)
        return Norm(end, x, gamma, epsilon, bool(rounded), ()) if alike else None
    product, cast_after = end, cast_source(end)
    if cast_after is not None:
        product = cast_after
    normed, gamma = next((pair for pair in factors(product) if _is_normed(pair[0])), (None, None))
    if normed is None or gamma is None:
        return None
    cast_before = cast_source(normed)
    if cast_before is not None and (cast_after is not None or dtype_of(normed) != dtype_of(end)):
        return None
    scaled = cast_before or normed
    found = next((found for pair in factors(scaled) if (found := _mean_square(*pair))), None)
    if found is None:
        return None
    wide, epsilon, steps = found
    x = wide
    if dtype_of(wide) != dtype_of(end):
        source = cast_source(wide)
        if source is None:
            return None
        x = source
    shape = shape_of(x)
    fits = (
        dtype_of(x) == dtype_of(gamma) == dtype_of(end)
        and dtype_of(wide) == torch.float32
        and same_shape(shape_of(gamma), shape[-1:])
    )
    inner = {product, normed, scaled, *steps} - {end}
    rounded = cast_before is not None
    return Norm(end, x, gamma, epsilon, rounded, tuple(inner)) if fits else None


def _is_normed(value: fx.Node) -> bool:
    """Whether a value is a product with a reciprocal root, cast or not."""
    source = cast_source(value) or value
    return any(is_call(root, aten.rsqrt.default) for root, _ in factors(source))


def _mean_square(root: fx.Node, x: fx.Node) -> tuple[fx.Node, float, list[fx.Node]] | None:
    """If `root` is `rsqrt(mean(x^2) + epsilon)`: x, epsilon, and the nodes on the way."""
    if not is_call(root, aten.rsqrt.default):
        return None
    shifted = root.args[0]
    if not is_call(shifted, aten.add.Tensor, aten.add.Scalar):
        return None
    assert isinstance(shifted, fx.Node)
    mean, epsilon = shifted.args[0], number(shifted.args[1])
    if epsilon is None or argument(shifted, "alpha") != 1 or not is_call(mean, aten.mean.dim):
        return None
    assert isinstance(mean, fx.Node)
    square, dims = mean.args[0], mean.args[1]
    keeps = argument(mean, "keepdim") is True and argument(mean, "dtype") is None
    last = len(shape_of(x)) - 1
    if not keeps or not isinstance(dims, list | tuple) or list(dims) not in ([-1], [last]):
        return None
    assert isinstance(square, fx.Node)
    powers = is_call(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)
    multiplies = is_call(square, aten.mul.Tensor) and square.args == (x, x)
    return (x, epsilon, [root, shifted, mean, square]) if powers or multiplies else None


def find_rotation(end: fx.Node) -> Rotation | None:
    """The rotation that a node is the last of, if it is."""
    if _name(end) == "rolemesh::rotary":
        x, cos, sin = (argument(end, name) for name in ("x", "cos", "sin"))
        assert isinstance(x, fx.Node)
        assert isinstance(cos, fx.Node)
        assert isinstance(sin, fx.Node)
        share = 1 if same_shape(shape_of(cos)[-1:], shape_of(x)[-1:]) else 2
        return Rotation(x, cos, sin, share, 2 if argument(end, "interleaved") else 1, ())
    if is_call(end, aten.add.Tensor):
        return _with_turned(end)
    return _of_pairs(end, step=1) or _of_pairs(end, step=2)


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def _with_turned(end: fx.Node) -> Rotation | None:
    """`x * cos + cat(-x2, x1) * sin`, terms and factors in any order."""
    if argument(end, "alpha") != 1:
        return None
    for plain, turned in itertools.permutations(end.args):
        for rotated, sin in factors(turned):
            found = _turned(rotated)
            for x, cos in factors(plain):
                if found is not None and x is found[0]:
                    inner = (plain, turned, rotated, found[1])
                    return Rotation(x, cos, sin, 1, 1, inner)  # type: ignore[arg-type]
    return None


def _turned(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Of `cat(-x2, x1)`, x and the negated half."""
    parts = _joined(value)
    if parts is None or not is_call(parts[0], aten.neg.default):
        return None
    negated, first = parts
    x = _split_in_two(first, negated.args[0], 1)
    return None if x is None else (x, negated)


def _of_pairs(end: fx.Node, step: int) -> Rotation | None:
    """`cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`, terms of sums and factors in any order."""
    parts = _joined(end)
    if parts is None:
        return None
    less, more = parts
    if not is_call(less, aten.sub.Tensor) or not is_call(more, aten.add.Tensor):
        return None
    if argument(less, "alpha") != 1 or argument(more, "alpha") != 1:
        return None
    minuend, subtrahend = less.args
    for (first, cos), (second, sin) in itertools.product(factors(minuend), factors(subtrahend)):
        x = _split_in_two(first, second, step)
        if x is None:
            continue
        for left, right in itertools.permutations(more.args):
            if (second, cos) in factors(left) and (first, sin) in factors(right):
                inner = (*parts, minuend, subtrahend, left, right)
                return Rotation(x, cos, sin, 2, step, inner)  # type: ignore[arg-type]
    return None


def _joined(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that are joined along the last dim."""
    if not is_call(value, aten.cat.default):
        return None
    parts, dim = value.args[0], argument(value, "dim")
    assert isinstance(parts, list | tuple)
    assert isinstance(dim, int)
    last = len(shape_of(value)) - 1
    if len(parts) != 2 or dim % (last + 1) != last:
        return None
    first, second = parts
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return first, second


def _split_in_two(first: object, second: object, step: int) -> fx.Node | None:
    """The tensor whose last dim is split into these two."""
    found = halves(first, second, step)
    return found[0] if found is not None and found[1] == len(shape_of(found[0])) - 1 else None
