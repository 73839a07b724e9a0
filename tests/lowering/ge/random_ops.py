"""The ops of random graphs: how each one draws its operands and plain arguments.

Ops that jump (comparisons, sorting, rounding) only take exact values: inputs and what only moves or
selects them. A rounding difference never becomes another index.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

__all__ = ["OPS", "SIZES", "Call", "Draw", "NotNowError", "Value"]

SIZES = (1, 2, 3, 4, 5, 7)
_aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One op with its arguments: values of the graph, or plain ones."""

    target: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object] = field(default_factory=dict)
    exact: bool = False


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph, its node, and whether no rounding has touched it."""

    node: fx.Node
    tensor: Tensor
    exact: bool


class NotNowError(Exception):
    """No value of the graph fits the op."""


class Draw:
    """Draws values of the graph and plain arguments."""

    def __init__(self, rng: random.Random, values: Sequence[Value]) -> None:
        self.rng = rng
        self.values = values

    def one(self, fits: Callable[[Value], bool]) -> Value:
        found = [value for value in self.values if fits(value)]
        if not found:
            raise NotNowError
        return self.rng.choice(found)

    def floating(self, least: int = 0, most: int = 6) -> Value:
        return self.one(lambda v: v.tensor.is_floating_point() and least <= v.tensor.ndim <= most)

    def anything(self, least: int = 0) -> Value:
        return self.one(lambda v: v.tensor.ndim >= least)

    def exact(self, least: int = 0) -> Value:
        return self.one(
            lambda v: v.exact and v.tensor.dtype is not torch.bool and v.tensor.ndim >= least
        )

    def integer(self, least: int = 0) -> Value:
        kinds = (torch.int64, torch.int32)
        return self.one(lambda v: v.tensor.dtype in kinds and v.tensor.ndim >= least)

    def mask(self) -> Value:
        return self.one(lambda v: v.tensor.dtype is torch.bool)

    def beside(self, other: Value, same_dtype: bool = False) -> Value:
        """A value that broadcasts with another."""

        def fits(value: Value) -> bool:
            pairs = zip(reversed(value.tensor.shape), reversed(other.tensor.shape), strict=False)
            small = value.tensor.ndim <= 5 and value.tensor.dtype is not torch.bool
            dtype = not same_dtype or value.tensor.dtype == other.tensor.dtype
            return small and dtype and all(a == b or 1 in (a, b) for a, b in pairs)

        return self.one(fits)

    def dim(self, value: Value) -> int:
        return self.rng.randrange(-value.tensor.ndim, value.tensor.ndim)

    def indices(self, extent: int, *shape: int, distinct: bool = False) -> Tensor:
        if distinct:
            return torch.tensor(self.rng.sample(range(extent), math.prod(shape))).reshape(shape)
        numbers = [self.rng.randrange(extent) for _ in range(math.prod(shape))]
        return torch.tensor(numbers, dtype=torch.int64).reshape(shape)

    def number(self) -> float:
        return self.rng.choice((0.5, 2.0, -1.25, 3, -2))


Maker = Callable[[Draw], Call]


def _unary(target: Callable[..., object], *more: object) -> Maker:
    return lambda d: Call(target, (d.floating(), *more))


def _positive(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        value = d.one(lambda v: v.tensor.is_floating_point() and bool((v.tensor > 0.05).all()))
        return Call(target, (value,))

    return make


def _binary(target: Callable[..., object], same_dtype: bool = False) -> Maker:
    def make(d: Draw) -> Call:
        left = d.floating()
        return Call(target, (left, d.beside(left, same_dtype)))

    return make


def _integers(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        left = d.integer()
        return Call(target, (left, d.rng.choice((2, 3, 5))), exact=True)

    return make


def _compared(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        left = d.exact()
        right = d.beside(left, same_dtype=True)
        if not right.exact:
            raise NotNowError
        return Call(target, (left, right), exact=True)

    return make


def _compared_to_number(target: Callable[..., object]) -> Maker:
    return lambda d: Call(target, (d.exact(), d.rng.choice((0, 1, 0.5))), exact=True)


def _reduced(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        value = d.floating(1)
        return Call(target, (value, [d.dim(value)], d.rng.random() < 0.5))

    return make


def _moved(
    target: Callable[..., object], arguments: Callable[[Draw, Value], tuple[object, ...]]
) -> Maker:
    """An op that only moves elements."""

    def make(d: Draw) -> Call:
        value = d.anything(1)
        return Call(target, (value, *arguments(d, value)), exact=value.exact)

    return make


def _shape_of_same_size(d: Draw, value: Value) -> list[int]:
    left, shape = value.tensor.numel(), []
    while left > 1:
        size = d.rng.choice([n for n in range(2, left + 1) if left % n == 0])
        shape.append(size)
        left //= size
    if d.rng.random() < 0.3:
        shape.insert(d.rng.randrange(len(shape) + 1), 1)
    return shape


def _slice(d: Draw, value: Value) -> tuple[object, ...]:
    dim = d.dim(value)
    extent = value.tensor.shape[dim]
    start = d.rng.randrange(-extent, extent)
    return dim, start, d.rng.choice((sys.maxsize, extent, extent - 1)), d.rng.choice((1, 1, 2))


def _permutation(d: Draw, value: Value) -> tuple[object, ...]:
    dims = list(range(value.tensor.ndim))
    d.rng.shuffle(dims)
    return (dims,)


def _expand(d: Draw) -> Call:
    value = d.one(lambda v: 1 <= v.tensor.ndim <= 4 and 1 in v.tensor.shape)
    shape = [d.rng.choice(SIZES) if n == 1 else n for n in value.tensor.shape]
    return Call(_aten.expand.default, (value, [d.rng.choice((2, 3)), *shape]), exact=value.exact)


def _cat(d: Draw) -> Call:
    first = d.anything(1)
    dim = d.dim(first)

    def fits(value: Value) -> bool:
        a, b = list(value.tensor.shape), list(first.tensor.shape)
        if len(a) != len(b) or value.tensor.dtype != first.tensor.dtype:
            return False
        a[dim] = b[dim] = 0
        return a == b

    parts = [first, d.one(fits), *([d.one(fits)] if d.rng.random() < 0.5 else [])]
    return Call(_aten.cat.default, (parts, dim), exact=all(p.exact for p in parts))


def _stack(d: Draw) -> Call:
    first = d.anything()
    other = d.one(
        lambda v: v.tensor.shape == first.tensor.shape and v.tensor.dtype == first.tensor.dtype
    )
    dim = d.rng.randrange(first.tensor.ndim + 1)
    return Call(_aten.stack.default, ([first, other], dim), exact=first.exact and other.exact)


def _where(d: Draw) -> Call:
    mask = d.mask()
    left = d.beside(mask)
    right = d.beside(left)
    torch.broadcast_shapes(mask.tensor.shape, left.tensor.shape, right.tensor.shape)
    return Call(_aten.where.self, (mask, left, right), exact=left.exact and right.exact)


def _masked_fill(d: Draw) -> Call:
    value = d.floating()
    mask = d.one(lambda v: v.tensor.dtype is torch.bool and v.tensor.shape == value.tensor.shape)
    return Call(_aten.masked_fill.Scalar, (value, mask, d.number()), exact=value.exact)


def _indexed(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        value = d.anything(1)
        dim = d.dim(value)
        index = d.indices(value.tensor.shape[dim], d.rng.choice(SIZES))
        return Call(target, (value, dim, index), exact=value.exact)

    return make


def _gather(d: Draw) -> Call:
    value = d.anything(1)
    dim = d.dim(value)
    shape = list(value.tensor.shape)
    shape[dim] = d.rng.choice(SIZES)
    index = d.indices(value.tensor.shape[dim], *shape)
    return Call(_aten.gather.default, (value, dim, index), exact=value.exact)


def _index(d: Draw) -> Call:
    value = d.anything(2)
    count = d.rng.choice(SIZES)
    first = d.indices(value.tensor.shape[0], count)
    second = d.indices(value.tensor.shape[1], count)
    chosen = d.rng.choice(([first], [None, second], [first, second]))
    return Call(_aten.index.Tensor, (value, chosen), exact=value.exact)


def _rows_written(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        value = d.floating(1)
        dim = d.dim(value) % value.tensor.ndim
        extent = value.tensor.shape[dim]
        count = d.rng.randrange(1, extent + 1)
        index = d.indices(extent, count, distinct=True)
        shape = [*value.tensor.shape[:dim], count, *value.tensor.shape[dim + 1 :]]
        rows = torch.randn(shape).to(value.tensor.dtype)
        if target is _aten.index_put.default:
            return Call(target, (value, [*[None] * dim, index], rows, d.rng.random() < 0.3))
        return Call(target, (value, dim, index, rows), exact=value.exact)

    return make


def _scatter(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        value = d.floating(1)
        dim = d.dim(value) % value.tensor.ndim
        extent = value.tensor.shape[dim]
        shape = [*value.tensor.shape[:dim], extent, *value.tensor.shape[dim + 1 :]]
        order = torch.tensor(d.rng.sample(range(extent), extent))
        index = order.reshape([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape)
        source = torch.randn(shape).to(value.tensor.dtype)
        return Call(target, (value, dim, index.contiguous(), source))

    return make


def _topk(d: Draw) -> Call:
    value = d.one(lambda v: v.exact and v.tensor.is_floating_point() and v.tensor.ndim >= 1)
    dim = d.dim(value)
    extent = value.tensor.shape[dim]
    if any(
        len(set(row)) < extent for row in value.tensor.movedim(dim, -1).reshape(-1, extent).tolist()
    ):
        raise NotNowError  # equal values: which index comes first is not defined
    k = d.rng.randrange(1, extent + 1)
    return Call(_aten.topk.default, (value, k, dim, d.rng.random() < 0.7, True), exact=True)


def _sort(d: Draw) -> Call:
    value = d.exact(1)
    return Call(
        _aten.sort.stable,
        (value,),
        {"stable": True, "dim": d.dim(value), "descending": d.rng.random() < 0.5},
        exact=True,
    )


def _matmul(d: Draw) -> Call:
    left = d.one(lambda v: v.tensor.is_floating_point() and v.tensor.ndim in (2, 3))
    k, n = left.tensor.shape[-1], d.rng.choice(SIZES)
    right = torch.randn(*left.tensor.shape[:-2], k, n).to(left.tensor.dtype)
    if left.tensor.ndim == 3:
        if d.rng.random() < 0.3:
            bias = torch.randn(*left.tensor.shape[:-1], n).to(left.tensor.dtype)
            return Call(_aten.baddbmm.default, (bias, left, right))
        return Call(_aten.bmm.default, (left, right))
    if d.rng.random() < 0.5:
        bias = torch.randn(n).to(left.tensor.dtype)
        return Call(_aten.addmm.default, (bias, left, right))
    return Call(_aten.mm.default, (left, right))


def _softmax(target: Callable[..., object]) -> Maker:
    def make(d: Draw) -> Call:
        value = d.floating(1)
        return Call(target, (value, d.dim(value), False))

    return make


def _layer_norm(d: Draw) -> Call:
    value = d.floating(2)
    n = value.tensor.shape[-1]
    weight, bias = (torch.randn(n).to(value.tensor.dtype) for _ in range(2))
    return Call(_aten.native_layer_norm.default, (value, [n], weight, bias, 1e-5))


def _attention(d: Draw) -> Call:
    # torch's kernel reads past a query whose last dim is not contiguous.
    value = d.one(
        lambda v: (
            v.tensor.dtype is torch.float32 and v.tensor.ndim == 4 and v.tensor.is_contiguous()
        )
    )
    keys, values = torch.randn(value.tensor.shape), torch.randn(value.tensor.shape)
    target = _aten._scaled_dot_product_flash_attention_for_cpu.default
    return Call(target, (value, keys, values, 0.0, d.rng.random() < 0.5))


def _cumsum(d: Draw) -> Call:
    value = d.floating(1)
    return Call(_aten.cumsum.default, (value, d.dim(value)))


def _cast(d: Draw) -> Call:
    value = d.exact()
    dtype = d.rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool))
    return Call(_aten._to_copy.default, (value,), {"dtype": dtype}, exact=True)


def _pad(d: Draw) -> Call:
    value = d.floating(1)
    return Call(_aten.constant_pad_nd.default, (value, [d.rng.randrange(3), 1], d.number()))


def _arange(d: Draw) -> Call:
    value = d.integer()
    return Call(
        _aten.add.Tensor,
        (value, torch.arange(value.tensor.shape[-1]) if value.tensor.ndim else 2),
        exact=True,
    )


UNARY = (
    *("neg", "abs", "sin", "cos", "tanh", "sigmoid", "relu", "silu", "gelu", "softplus"),
    *("erf", "exp2", "isnan", "sign", "square"),
)
POSITIVE = ("sqrt", "rsqrt", "log", "reciprocal")
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")

OPS: dict[str, Maker] = {
    **{name: _unary(getattr(_aten, name).default) for name in UNARY},
    **{name: _positive(getattr(_aten, name).default) for name in POSITIVE},
    "exp": _unary(_aten.exp.default),
    "pow": _unary(_aten.pow.Tensor_Scalar, 2),
    "gelu_tanh": lambda d: Call(_aten.gelu.default, (d.floating(),), {"approximate": "tanh"}),
    "clamp": _unary(_aten.clamp.default, -0.75, 1.5),
    "add_number": lambda d: Call(_aten.add.Scalar, (d.floating(), d.number())),
    "mul_number": lambda d: Call(_aten.mul.Scalar, (d.floating(), d.number())),
    "div_number": lambda d: Call(_aten.div.Scalar, (d.floating(), d.number())),
    **{name: _binary(getattr(_aten, name).Tensor) for name in ("add", "sub", "mul")},
    "maximum": _binary(_aten.maximum.default),
    "minimum": _binary(_aten.minimum.default),
    "floor_divide": _integers(_aten.floor_divide.default),
    "remainder": _integers(_aten.remainder.Scalar),
    "integer_mul": _integers(_aten.mul.Scalar),
    "integer_add": _arange,
    **{name: _compared(getattr(_aten, name).Tensor) for name in COMPARED},
    **{f"{name}_number": _compared_to_number(getattr(_aten, name).Scalar) for name in COMPARED},
    "logical_not": lambda d: Call(_aten.logical_not.default, (d.mask(),), exact=True),
    "bitwise_not": lambda d: Call(_aten.bitwise_not.default, (d.mask(),), exact=True),
    "where": _where,
    "masked_fill": _masked_fill,
    "sum": _reduced(_aten.sum.dim_IntList),
    "mean": _reduced(_aten.mean.dim),
    "amax": _reduced(_aten.amax.default),
    "amin": _reduced(_aten.amin.default),
    "logsumexp": _reduced(_aten.logsumexp.default),
    "argmax": lambda d: Call(_aten.argmax.default, ((v := d.exact(1)), d.dim(v)), exact=True),
    "cumsum": _cumsum,
    "softmax": _softmax(_aten._softmax.default),
    "log_softmax": _softmax(_aten._log_softmax.default),
    "layer_norm": _layer_norm,
    "matmul": _matmul,
    "attention": _attention,
    "reshape": _moved(_aten.reshape.default, lambda d, v: (_shape_of_same_size(d, v),)),
    "permute": _moved(_aten.permute.default, _permutation),
    "unsqueeze": _moved(
        _aten.unsqueeze.default, lambda d, v: (d.rng.randrange(v.tensor.ndim + 1),)
    ),
    "squeeze": _moved(_aten.squeeze.dim, lambda d, v: (d.dim(v),)),
    "slice": _moved(_aten.slice.Tensor, _slice),
    "select": _moved(
        _aten.select.int, lambda d, v: ((dim := d.dim(v)), d.rng.randrange(v.tensor.shape[dim]))
    ),
    "flip": _moved(_aten.flip.default, lambda d, v: ([d.dim(v)],)),
    "roll": _moved(_aten.roll.default, lambda d, v: ([d.rng.randrange(-3, 4)], [d.dim(v)])),
    "repeat": _moved(_aten.repeat.default, lambda d, v: ([2, *[1] * (v.tensor.ndim - 1)],)),
    "expand": _expand,
    "cat": _cat,
    "stack": _stack,
    "tril": lambda d: Call(
        _aten.tril.default, ((v := d.floating(2)), d.rng.randrange(-2, 3)), exact=v.exact
    ),
    "triu": lambda d: Call(
        _aten.triu.default, ((v := d.floating(2)), d.rng.randrange(-2, 3)), exact=v.exact
    ),
    "pad": _pad,
    "index_select": _indexed(_aten.index_select.default),
    "gather": _gather,
    "index": _index,
    "index_copy": _rows_written(_aten.index_copy.default),
    "index_add": _rows_written(_aten.index_add.default),
    "index_put": _rows_written(_aten.index_put.default),
    "scatter": _scatter(_aten.scatter.src),
    "scatter_add": _scatter(_aten.scatter_add.default),
    "topk": _topk,
    "sort": _sort,
    "cast": _cast,
}
"""Everything a graph may be grown of, by name."""
