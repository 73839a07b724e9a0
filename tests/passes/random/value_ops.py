"""Families of ops that compute values: pointwise ones, reductions, scans, norms, sorts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.passes.random.case import Ref
from tests.passes.random.draw import Draw, dim_of
from tests.passes.random.infer import UnsuitedError

__all__ = [
    "binary",
    "cast",
    "compare",
    "integer",
    "norm",
    "order",
    "reduce",
    "same_shape",
    "truth",
    "unary",
    "where",
]

aten = torch.ops.aten


def unary(d: Draw) -> Ref:
    x = d.pick()
    name = d.rng.choice(
        ["neg", "abs", "relu", "clone", "sign", "silu", "tanh", "sigmoid", "mul", "add", "rsub",
         "sub", "div", "pow", "clamp", "gelu", "alias"]
    )  # fmt: skip
    if name in ("silu", "tanh", "sigmoid", "gelu"):
        return d.call(getattr(aten, name).default, x, inexact=True)
    scalar = {"mul": aten.mul.Tensor, "add": aten.add.Tensor, "sub": aten.sub.Tensor}
    if name in scalar:
        return d.call(scalar[name], x, d.rng.choice([-2, 2, 3.0]))
    if name == "div":
        return d.call(aten.div.Tensor, x, 2)
    if name == "rsub":
        return d.call(aten.rsub.Scalar, x, 3)
    if name == "pow":
        return d.call(aten.pow.Tensor_Scalar, x, 2)
    if name == "clamp":
        return d.call(aten.clamp.default, x, -2, 2)
    if name == "sign":
        return d.call(aten.sign.default, d.pick(exact=True))
    return d.call(getattr(aten, name).default, x)


def binary(d: Draw) -> Ref:
    x = d.pick()
    y = d.like(d.type(x).dtype, d.broadcastable(d.type(x).shape))
    name = d.rng.choice(["add", "add", "sub", "mul", "mul", "maximum", "minimum", "div", "alpha"])
    if d.flag() and name != "div":
        x, y = y, x
    if name == "alpha":
        return d.call(aten.add.Tensor, x, y, alpha=2)
    if name == "div":
        ones = d.call(aten.add.Tensor, d.call(aten.abs.default, y), 1)
        return d.call(aten.div.Tensor, x, ones, inexact=True)
    if name in ("maximum", "minimum"):
        return d.call(getattr(aten, name).default, x, y)
    return d.call(getattr(aten, name).Tensor, x, y)


def same_shape(d: Draw) -> Ref:
    """An op of two values that both exist, as residuals and gates are."""
    x = d.pick()
    y = d.pick(lambda v: v.shape == d.type(x).shape and v.dtype == d.type(x).dtype)
    return d.call(d.rng.choice([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]), x, y)


def compare(d: Draw) -> Ref:
    x = d.pick(exact=True)
    y = d.leaf(d.broadcastable(d.type(x).shape), d.type(x).dtype)
    op = d.rng.choice([aten.gt, aten.le, aten.eq, aten.ne])
    return d.call(op.Tensor, x, y) if d.flag() else d.call(op.Scalar, x, 1)


def where(d: Draw) -> Ref:
    x = d.pick()
    shape = d.type(x).shape
    conditions = [r for r in d.exact if d.type(r).dtype == torch.bool and d.type(r).shape == shape]
    condition = (
        d.rng.choice(conditions) if conditions else d.leaf(d.broadcastable(shape), torch.bool)
    )
    if d.flag():
        return d.call(aten.masked_fill.Scalar, x, condition, -3)
    y = d.like(d.type(x).dtype, d.broadcastable(shape))
    return d.call(aten.where.self, condition, x, y)


def cast(d: Draw) -> Ref:
    x = d.pick(floats=False, exact=True)
    return d.call(
        aten._to_copy.default,
        x,
        dtype=d.rng.choice([torch.float64, torch.float64, torch.float32, torch.int64]),
    )


def _mean(d: Draw, x: Ref, dim: int, keep: bool) -> Ref:
    if d.flag():
        return d.call(aten.mean.default, x, inexact=True)
    return d.call(aten.mean.dim, x, [dim], keep, inexact=True)


def _total(d: Draw, x: Ref, dim: int, keep: bool) -> Ref:
    return d.call(d.rng.choice([aten.sum.default, aten.max.default, aten.min.default]), x)


def _outer_dims(d: Draw, x: Ref, dim: int, keep: bool) -> Ref:
    ndim = d.type(x).ndim
    return d.call(aten.sum.dim_IntList, x, [0, ndim - 1][:ndim], keep)


def _variance(d: Draw, x: Ref, dim: int, keep: bool) -> Ref:
    if d.type(x).shape[dim] < 2:
        raise UnsuitedError
    return d.call(aten.var_mean.correction, x, [dim], correction=1, keepdim=keep, inexact=True)


def _exact_max(d: Draw, x: Ref, dim: int, keep: bool) -> Ref:
    return d.call(aten.max.dim, d.pick(lambda u: u.ndim >= 1, exact=True), 0, keep)


REDUCTIONS: dict[str, Callable[[Draw, Ref, int, bool], Ref]] = {
    "sum": lambda d, x, dim, keep: d.call(aten.sum.dim_IntList, x, [dim], keep),
    "dims": _outer_dims,
    "all": _total,
    "mean": _mean,
    "amax": lambda d, x, dim, keep: d.call(aten.amax.default, x, [dim], keep),
    "amin": lambda d, x, dim, keep: d.call(aten.amin.default, x, [dim], keep),
    "softmax": lambda d, x, dim, keep: d.call(aten._softmax.default, x, dim, False, inexact=True),
    "log_softmax": lambda d, x, dim, keep: d.call(
        aten._log_softmax.default, x, dim, False, inexact=True
    ),
    "cumsum": lambda d, x, dim, keep: d.call(aten.cumsum.default, x, dim),
    "max": _exact_max,
    "var_mean": _variance,
    "logsumexp": lambda d, x, dim, keep: d.call(
        aten.logsumexp.default, x, [dim], keep, inexact=True
    ),
    "prod": lambda d, x, dim, keep: d.call(aten.prod.dim_int, x, dim, keep),
    "norm": lambda d, x, dim, keep: d.call(
        aten.linalg_vector_norm.default, x, 2, [dim], keep, inexact=True
    ),
}


def reduce(d: Draw) -> Ref:
    x = d.pick(dim_of)
    dim, keep = d.dim(d.type(x)), d.flag()
    kind = d.rng.choice(["sum", *REDUCTIONS])  # sums twice as often
    return REDUCTIONS[kind](d, x, dim, keep)


def truth(d: Draw) -> Ref:
    x = d.pick(lambda v: v.dtype == torch.bool and v.ndim >= 1, floats=False)
    dim = d.dim(d.type(x))
    kind = d.rng.choice(["any", "all", "sum", "not", "cast"])
    if kind == "sum":
        return d.call(aten.sum.dim_IntList, x, [dim])
    if kind == "not":
        return d.call(aten.logical_not.default, x)
    if kind == "cast":
        return d.call(aten._to_copy.default, x, dtype=torch.float64)
    return d.call(getattr(aten, kind).dim, x, dim, d.flag())


def integer(d: Draw) -> Ref:
    x = d.pick(lambda v: v.dtype == torch.int64 and v.ndim >= 1, floats=False)
    kind = d.rng.choice(["add", "mul", "sum", "amax", "cumsum", "cast", "one_hot"])
    if kind in ("add", "mul"):
        return d.call(getattr(aten, kind).Tensor, x, 2)
    dim = d.dim(d.type(x))
    if kind == "sum":
        return d.call(aten.sum.dim_IntList, x, [dim])
    if kind == "amax":
        return d.call(aten.amax.default, x, [dim])
    if kind == "cumsum":
        return d.call(aten.cumsum.default, x, dim)
    if kind == "one_hot":
        return d.call(aten.one_hot.default, d.call(aten.remainder.Scalar, x, 3), 3)
    return d.call(aten._to_copy.default, x, dtype=torch.float64)


def norm(d: Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1 and v.dtype == torch.float64)
    width = d.type(x).shape[-1]
    weight, offset = d.leaf((width,)), d.leaf((width,))
    return d.call(aten.native_layer_norm.default, x, [width], weight, offset, 1e-3, inexact=True)


def order(d: Draw) -> Ref:
    x = d.pick(dim_of, exact=True)
    v = d.type(x)
    dim = d.dim(v)
    kind = d.rng.choice(["topk", "sort", "argmax", "argsort"])
    if kind == "topk":
        return d.call(aten.topk.default, x, d.count(v.shape[dim]), dim)
    if kind == "sort":
        return d.call(aten.sort.stable, x, stable=True, dim=dim)
    if kind == "argsort":
        return d.call(aten.argsort.stable, x, stable=True, dim=dim)
    return d.call(aten.argmax.default, x, dim, d.flag())
