"""Rules of ops that rearrange dims or elements: reshapes, expands, transposes, rolls, padding.

All of them are linear. Local forms reshape and expand to the local sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch

from rolemesh.compiler.ir.dims import Dim, gcd
from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.arguments import argument, dim_argument, dims_argument, int_argument
from rolemesh.passes.rules.registry import (
    LocalCall,
    LocalForm,
    LocalFunction,
    RuleFunction,
    replicated_rule,
)

__all__ = ["LOCAL", "RULES", "UNARY", "Dims", "drop_dims", "identity"]

UNARY = ((True,),)
Dims = list[tuple[int, ...]]


def identity(call: OpCall) -> Rule:
    """The result has the operand's dims."""
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    return builder.build([dims], [dims], linear=UNARY)


# ---------------------------------------------------------------------------------------- reshape


def view(call: OpCall) -> Rule:
    """Both shapes as digits of one mixed-radix index: the common refinement of the two.

    From the major side, each step takes the greatest common divisor of what is left of the two
    current dims as a factor. Where that is 1 the dims do not refine: the smallest block of dims
    with equal products is refined from its minor side, and the rest replicates. A dim of extent 1
    is a factor too and joins the dim at hand of the other shape, so that a sharded batch of one
    survives `[1, 16] -> [16]`.
    """
    source, target = call.operands[0].shape, call.results[0].shape
    if 0 in source:
        return replicated_rule(call)
    builder = RuleBuilder()
    left: list[list[int]] = [[] for _ in source]
    right: list[list[int]] = [[] for _ in target]
    x = y = 0
    rest_x = source[0] if source else 0
    rest_y = target[0] if target else 0
    while x < len(source) or y < len(target):
        if (
            x < len(source)
            and y < len(target)
            and (rest_x == rest_y or (rest_x != 1 and rest_y != 1))
        ):
            size = gcd(rest_x, rest_y)
            if size == 1 and rest_x != 1:
                x, y = _unaligned(
                    builder, (source, target), (left, right), (x, y), (rest_x, rest_y)
                )
                rest_x = rest_y = 1
            else:
                (factor,) = builder.factor(size)
                left[x].append(factor)
                right[y].append(factor)
                rest_x, rest_y = rest_x // size, rest_y // size
            step_x, step_y = rest_x == 1, rest_y == 1
        else:
            step_x = x < len(source) and rest_x == 1
            step_y = not step_x
            dims, others = (left[x], right) if step_x else (right[y], left)
            # A size-1 dim that nothing can carry on has its value on one rank only.
            (factor,) = builder.factor(1, Kind.PASS if others or step_y else Kind.REPLICATE)
            dims.append(factor)
            if others:
                others[min(y if step_x else x, len(others) - 1)].append(factor)
        if step_x:
            x += 1
            rest_x = source[x] if x < len(source) else 0
        if step_y:
            y += 1
            rest_y = target[y] if y < len(target) else 0
    return builder.build([[tuple(f) for f in left]], [[tuple(f) for f in right]], linear=UNARY)


def _unaligned(
    builder: RuleBuilder,
    shapes: tuple[Sequence[int], Sequence[int]],
    dims: tuple[list[list[int]], list[list[int]]],
    at: tuple[int, int],
    rest: tuple[int, int],
) -> tuple[int, int]:
    """Factors of the smallest block of dims with equal products; gives the block's last dims.

    Where a size that is left is symbolic, the block is all dims that are left.
    """
    (source, target), (left, right), (x, y) = shapes, dims, at
    extents_x, extents_y = [rest[0]], [rest[1]]
    product_x, product_y = rest
    if any(isinstance(n, Dim) for n in (*rest, *source[x + 1 :], *target[y + 1 :])):
        # Which product is the larger one depends on the sizes.
        extents_x += source[x + 1 :]
        extents_y += target[y + 1 :]
    else:
        while product_x != product_y:
            if product_x < product_y:
                extents_x.append(source[x + len(extents_x)])
                product_x *= extents_x[-1]
            else:
                extents_y.append(target[y + len(extents_y)])
                product_y *= extents_y[-1]
    i, j = len(extents_x) - 1, len(extents_y) - 1
    minor_x: list[list[int]] = [[] for _ in extents_x]
    minor_y: list[list[int]] = [[] for _ in extents_y]
    while min(i, j) >= 0 and (
        (size := gcd(extents_x[i], extents_y[j])) != 1 or 1 in (extents_x[i], extents_y[j])
    ):
        if size != 1:
            (factor,) = builder.factor(size)
            minor_x[i].insert(0, factor)
            minor_y[j].insert(0, factor)
            extents_x[i] //= size
            extents_y[j] //= size
        i -= extents_x[i] == 1
        j -= extents_y[j] == 1
    for dims_at, extents, minor, start in (
        (left, extents_x, minor_x, x),
        (right, extents_y, minor_y, y),
    ):
        for k, extent in enumerate(extents):
            if extent != 1:
                dims_at[start + k].extend(builder.factor(extent, Kind.REPLICATE))
            dims_at[start + k].extend(minor[k])
    return x + len(extents_x) - 1, y + len(extents_y) - 1


def view_dtype(call: OpCall) -> Rule:
    """`aten.view.dtype`: bits read as another type; the last dim changes with the type's size."""
    source, target = call.operands[0].shape, call.results[0].shape
    builder = RuleBuilder()
    if source == target:
        # Arbitrary bits in the pads of a float would make arbitrary indices.
        floats = call.operands[0].dtype.is_floating_point
        to_integer = floats and not call.results[0].dtype.is_floating_point
        dims = builder.dims(source, Kind.REPLICATE if to_integer else Kind.PASS)
        return builder.build([dims], [dims])
    dims = builder.dims(source[:-1])
    return builder.build(
        [[*dims, builder.factor(source[-1], Kind.REPLICATE)]],
        [[*dims, builder.factor(target[-1], Kind.REPLICATE)]],
    )


def drop_dims(shape: Sequence[int], drop: Iterable[int], builder: RuleBuilder) -> tuple[Dims, Dims]:
    """Dims of a value with and without dims of extent 1, whose factors a neighbour carries on."""
    drop = set(drop)
    full = builder.dims(shape)
    kept: Dims = []
    pending: tuple[int, ...] = ()
    for dim, factors in enumerate(full):
        if dim in drop:
            pending += factors
        else:
            kept.append(pending + factors)
            pending = ()
    if kept:
        kept[-1] += pending
    else:
        for factor in pending:  # nothing can say that the value lies on one rank only
            builder.kinds[factor] = Kind.REPLICATE
    return full, kept


def squeeze(call: OpCall) -> Rule:
    """`squeeze(x)`, `squeeze(x, dim)`, `squeeze(x, dims)`."""
    builder = RuleBuilder()
    shape = call.operands[0].shape
    dims = dims_argument(call, 1, len(shape))
    if argument(call, 1, "dim") == []:  # unlike the reductions, no dim is squeezed
        dims = frozenset()
    full, kept = drop_dims(shape, [d for d in dims if d < len(shape) and shape[d] == 1], builder)
    return builder.build([full], [kept], linear=UNARY)


def unsqueeze(call: OpCall) -> Rule:
    """`unsqueeze(x, dim)`."""
    builder = RuleBuilder()
    shape = call.results[0].shape
    full, kept = drop_dims(shape, (dim_argument(call, 1, len(shape)),), builder)
    return builder.build([kept], [full], linear=UNARY)


def expand(call: OpCall) -> Rule:
    """`expand(x, sizes)`: every rank makes its own part of a broadcast dim."""
    builder = RuleBuilder()
    shape = call.operands[0].shape
    result = builder.dims(call.results[0].shape)
    extents = call.results[0].shape[len(result) - len(shape) :]
    dims = [
        factors if extent == size else ()
        for factors, extent, size in zip(
            result[len(result) - len(shape) :], extents, shape, strict=True
        )
    ]
    return builder.build([dims], [result], linear=UNARY)


def repeat(call: OpCall) -> Rule:
    """`repeat(x, repeats)`: a result dim is `[repeats, extent]`."""
    builder = RuleBuilder()
    shape = call.operands[0].shape
    repeats = cast(Sequence[int], argument(call, 1, "repeats"))
    if 0 in call.results[0].shape:
        return replicated_rule(call)
    dims = builder.dims(shape)
    missing = len(repeats) - len(shape)
    result = [
        builder.factor(count) if count > 1 or i < missing else () for i, count in enumerate(repeats)
    ]
    result[missing:] = [
        count + extent for count, extent in zip(result[missing:], dims, strict=True)
    ]
    return builder.build([dims], [result], linear=UNARY)


# ------------------------------------------------------------------------------- moving of dims


def permute(call: OpCall) -> Rule:
    """`permute(x, dims)`."""
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    order = cast(Sequence[int], argument(call, 1, "dims"))
    return builder.build([dims], [[dims[d] for d in order]], linear=UNARY)


def transpose(call: OpCall) -> Rule:
    """`transpose(x, dim0, dim1)`."""
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    result = list(dims)
    if dims:
        first = dim_argument(call, 1, len(dims), name="dim0")
        second = dim_argument(call, 2, len(dims), name="dim1")
        result[first], result[second] = result[second], result[first]
    return builder.build([dims], [result], linear=UNARY)


def t(call: OpCall) -> Rule:
    """`t(x)` of at most two dims."""
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    return builder.build([dims], [dims[::-1]], linear=UNARY)


def movedim(call: OpCall) -> Rule:
    """`movedim(x, source, destination)`."""
    builder = RuleBuilder()
    dims = builder.dims(call.operands[0].shape)
    source = _positions(argument(call, 1, "source"), len(dims))
    target = _positions(argument(call, 2, "destination"), len(dims))
    moved = dict(zip(target, source, strict=True))
    others = iter([d for d in range(len(dims)) if d not in source])
    order = [moved[d] if d in moved else next(others) for d in range(len(dims))]
    return builder.build([dims], [[dims[d] for d in order]], linear=UNARY)


def _positions(value: object, ndim: int) -> list[int]:
    dims = [value] if isinstance(value, int) else cast(Sequence[int], value)
    return [dim % ndim for dim in dims]


def flip(call: OpCall) -> Rule:
    """`flip(x, dims)`."""
    shape = call.operands[0].shape
    return _moved(shape, _positions(argument(call, 1, "dims"), len(shape)))


def roll(call: OpCall) -> Rule:
    """`roll(x, shifts, dims)`; without dims the flattened tensor rolls."""
    shape = call.operands[0].shape
    return _moved(shape, dims_argument(call, 2, len(shape), name="dims"))


def _moved(shape: Sequence[int], moved: Iterable[int]) -> Rule:
    builder = RuleBuilder()
    dims = builder.dims(shape)
    for dim in moved:
        builder.kinds[dim] = Kind.PERMUTE
    return builder.build([dims], [dims], linear=UNARY)


def diagonal(call: OpCall) -> Rule:
    """`diagonal(x, offset, dim1, dim2)`: the diagonal becomes the last dim."""
    builder = RuleBuilder()
    shape = call.operands[0].shape
    first = dim_argument(call, 2, len(shape), 0, "dim1")
    second = dim_argument(call, 3, len(shape), 1, "dim2")
    dims = builder.dims(shape)
    builder.kinds[first] = builder.kinds[second] = Kind.REPLICATE
    result = [factors for dim, factors in enumerate(dims) if dim not in (first, second)]
    result.append(builder.factor(call.results[0].shape[-1], Kind.REPLICATE))
    return builder.build([dims], [result], linear=UNARY)


def constant_pad_nd(call: OpCall) -> Rule:
    """`constant_pad_nd(x, pad, value)`: linear where the new elements are zero."""
    builder = RuleBuilder()
    dims: Dims = []
    result: Dims = []
    for size, padded in zip(call.operands[0].shape, call.results[0].shape, strict=True):
        same = size == padded and not _is_padded(call, len(dims))
        dims.append(builder.factor(size, Kind.PASS if same else Kind.REPLICATE))
        result.append(dims[-1] if same else builder.factor(padded, Kind.REPLICATE))
    linear = UNARY if not argument(call, 2, "value", 0) else ()
    return builder.build([dims], [result], linear=linear)


def _is_padded(call: OpCall, dim: int) -> bool:
    pad = cast(Sequence[int], argument(call, 1, "pad"))
    last = 2 * (len(call.operands[0].shape) - 1 - dim)
    return any(pad[last : last + 2])


def unfold(call: OpCall) -> Rule:
    """`unfold(x, dim, size, step)`: windows of a dim; those that do not overlap shard."""
    builder = RuleBuilder()
    shape, target = call.operands[0].shape, call.results[0].shape
    if not shape:
        return replicated_rule(call)
    dim = dim_argument(call, 1, len(shape), name="dimension")
    size, step = target[-1], int_argument(call, 3, "step", 1)
    dims = builder.dims(shape[:dim])
    after = builder.dims(shape[dim + 1 :])
    if step == size and target[dim] * size == shape[dim]:
        windows, within = builder.factor(target[dim]), builder.factor(size, Kind.REPLICATE)
        source = windows + within
    else:
        source, windows, within = (
            builder.factor(extent, Kind.REPLICATE) for extent in (shape[dim], target[dim], size)
        )
    result = [*dims, windows, *after, within]
    return builder.build([[*dims, source, *after]], [result], linear=UNARY)


def complex_parts(call: OpCall) -> Rule:
    """`view_as_complex`, `view_as_real`: one of the two has a last dim of two parts."""
    builder = RuleBuilder()
    ndim = min(call.operands[0].ndim, call.results[0].ndim)
    dims = builder.dims(call.operands[0].shape[:ndim])
    both = [*dims, builder.factor(2, Kind.REPLICATE)]
    to_real = call.results[0].ndim > ndim
    return builder.build([dims if to_real else both], [both if to_real else dims], linear=UNARY)


# ----------------------------------------------------------------------------------- local forms


def reshape_local(local: LocalCall) -> LocalForm:
    """A reshape to the local sizes.

    Never a view: a resharded value has other strides. And never `squeeze`, which would also drop
    a dim of which this rank holds one element.
    """
    return torch.ops.aten.reshape.default, (local.args[0], list(local.result_shape())), {}


def expand_local(local: LocalCall) -> LocalForm:
    """`expand` takes the local sizes."""
    return torch.ops.aten.expand.default, (local.args[0], list(local.result_shape())), {}


def repeat_local(local: LocalCall) -> LocalForm:
    """As many repeats as the local sizes ask for."""
    repeats = list(local.result_shape())
    shape = local.operand_shape(0)
    for index, size in enumerate(shape, len(repeats) - len(shape)):
        repeats[index] = repeats[index] // size if size else 0
    return local.call.target, (local.args[0], repeats), {}


RULES: dict[str, RuleFunction] = {
    "aten::view.default": view,
    "aten::view.dtype": view_dtype,
    "aten::_unsafe_view": view,
    "aten::_reshape_alias": view,
    "aten::reshape": view,
    "aten::flatten": view,
    "aten::unflatten": view,
    "aten::squeeze": squeeze,
    "aten::unsqueeze": unsqueeze,
    "aten::expand": expand,
    "aten::repeat": repeat,
    "aten::permute": permute,
    "aten::transpose": transpose,
    "aten::t": t,
    "aten::movedim": movedim,
    "aten::flip": flip,
    "aten::roll": roll,
    "aten::diagonal": diagonal,
    "aten::constant_pad_nd": constant_pad_nd,
    "aten::unfold": unfold,
    "aten::view_as_real": complex_parts,
    "aten::view_as_complex": complex_parts,
    "aten::clone": identity,
    "rolemesh::constrain": identity,
    "aten::alias": identity,
    "aten::detach": identity,
    "aten::lift_fresh_copy": identity,
    "aten::contiguous": identity,
}

LOCAL: dict[str, LocalFunction] = {
    "aten::view.default": reshape_local,
    "aten::_unsafe_view": reshape_local,
    "aten::_reshape_alias": reshape_local,
    "aten::reshape": reshape_local,
    "aten::flatten": reshape_local,
    "aten::unflatten": reshape_local,
    "aten::squeeze": reshape_local,
    "aten::expand": expand_local,
    "aten::repeat": repeat_local,
}
