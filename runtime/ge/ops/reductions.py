"""Ops that reduce dims, cumulative ops, norms of vectors, and losses.

Without axes nothing is reduced unless `noop_with_empty_axes`, which not every definition names, is
false; then all dims are. Sums of 16-bit numbers are accumulated in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from rolemesh.runtime.ge.ops.checks import (
    BOOL,
    COMPLEX,
    FLOATS,
    INDICES,
    INTEGERS,
    copied,
    demand,
    normal_axis,
    only,
    wide,
)
from rolemesh.runtime.ge.ops.table import Attributes, Function, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()

_Reduction = Callable[[Tensor, list[int], bool], Tensor]
_Kinds = frozenset[torch.dtype]

_UNDEFINED = 28
"""`torchair.ge.DataType.DT_UNDEFINED`."""


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    result = wide(x)
    for axis in sorted(axes, reverse=True):
        result = result.prod(axis, keepdim=keep, dtype=result.dtype)
    return result.to(x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.mean(axes, keepdim=keep)


def _square_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return wide(x).square().sum(axes, keepdim=keep).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return wide(x).logsumexp(axes, keepdim=keep).to(x.dtype)


def _amax(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amax(axes, keepdim=keep)


def _amin(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amin(axes, keepdim=keep)


def _all(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.all(axes, keepdim=keep)


def _any(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.any(axes, keepdim=keep)


REDUCTIONS: Mapping[str, tuple[_Reduction, _Kinds]] = {
    "ReduceAll": (_all, BOOL),
    "ReduceAny": (_any, BOOL),
    "ReduceLogSumExp": (_log_sum_exp, FLOATS),
    "ReduceMax": (_amax, FLOATS | INTEGERS),
    "ReduceMean": (_mean, FLOATS | COMPLEX),
    "ReduceMin": (_amin, FLOATS | INTEGERS),
    "ReduceProd": (_prod, FLOATS | INTEGERS),
    "ReduceSum": (_sum, FLOATS | INTEGERS | COMPLEX),
}
"""Ops of inputs x and axes, with the dtypes that they take; NAMED are their forms by attribute."""

NAMED: Mapping[str, tuple[_Reduction, _Kinds]] = {
    "ReduceAllD": REDUCTIONS["ReduceAll"],
    "ReduceAnyD": REDUCTIONS["ReduceAny"],
    "ReduceMaxD": REDUCTIONS["ReduceMax"],
    "ReduceMinD": REDUCTIONS["ReduceMin"],
    "ReduceProdD": REDUCTIONS["ReduceProd"],
    "ReduceSumD": REDUCTIONS["ReduceSum"],
}


def _reduced(
    a: Attributes, x: Tensor, axes: list[int], compute: _Reduction, noop: bool = True
) -> Tensor:
    """Reduce; `noop` is the definition's default for noop_with_empty_axes."""
    if not axes:
        if a.bool("noop_with_empty_axes", noop):
            return copied(x)
        axes = list(range(x.dim()))
    dims = sorted({normal_axis(a, axis, x.dim()) for axis in axes})
    return compute(x, dims, a.bool("keep_dims", False))


def _by_input(compute: _Reduction, kinds: _Kinds) -> Function:
    def function(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
        demand(a, kinds, x)
        return _reduced(a, x, integers(axes), compute)

    return function


def _by_attribute(compute: _Reduction, kinds: _Kinds) -> Function:
    def function(a: Attributes, x: Tensor) -> Tensor:
        demand(a, kinds, x)
        return _reduced(a, x, a.ints("axes"), compute)

    return function


for _type, (_compute, _of) in REDUCTIONS.items():
    OPS.op(_type)(_by_input(_compute, _of))
for _type, (_compute, _of) in NAMED.items():
    OPS.op(_type)(_by_attribute(_compute, _of))


@OPS.op("ReduceMeanD")
def reduce_mean_d(a: Attributes, x: Tensor) -> Tensor:
    """The one reduction that without axes reduces all dims unless told otherwise."""
    demand(a, FLOATS | COMPLEX, x)
    return _reduced(a, x, a.ints("axes"), _mean, noop=False)


@OPS.op("ReduceMeanWithCast")
def reduce_mean_with_cast(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    """The mean of x after a cast to dtype."""
    if a.int("dtype", _UNDEFINED) != _UNDEFINED:
        x = x.to(a.dtype("dtype"))
    demand(a, FLOATS | COMPLEX, x)
    return _reduced(a, x, integers(axes), _mean)


@OPS.op("SquareSumV1")
def square_sum_v1(a: Attributes, x: Tensor) -> Tensor:
    demand(a, FLOATS, x)
    return _reduced(a, x, a.ints("axis"), _square_sum)


@OPS.op("ReduceStdV2")
def reduce_std_v2(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean over dims, or all of them; without is_mean_out an empty mean."""
    demand(a, FLOATS, x)
    dims = a.ints("dim", ()) or list(range(x.dim()))
    keep, inner = a.bool("keepdim", False), wide(x)
    std = inner.std(dims, correction=a.int("correction", 1), keepdim=keep).to(x.dtype)
    if not a.bool("is_mean_out", True):
        return std, x.new_empty(0)
    return std, inner.mean(dims, keepdim=keep).to(x.dtype)


@OPS.op("ReduceStdWithMean", equal=("x", "mean"))
def reduce_std_with_mean(a: Attributes, x: Tensor, mean: Tensor) -> Tensor:
    """Standard deviation over dims, or all of them, from a mean of the shape of x.

    The correction is what is subtracted from the number of elements; epsilon belongs to invert.
    """
    only(a, invert=False, unbiased=True)
    demand(a, FLOATS, x)
    if mean.shape != x.shape:
        raise ValueError(f"{a.where}: mean {list(mean.shape)} for x {list(x.shape)}")
    dims = [normal_axis(a, dim, x.dim()) for dim in a.ints("dim", ())] or list(range(x.dim()))
    count = math.prod(x.shape[dim] for dim in dims) - a.int("correction", 1)
    squares = (wide(x) - wide(mean)).square().sum(dims, keepdim=a.bool("keepdim", False))
    return (squares / count).sqrt().to(x.dtype)


@OPS.op("LpNormV2")
def lp_norm_v2(a: Attributes, x: Tensor) -> Tensor:
    """The p-norm over axes, or all dims; p beyond the 32-bit integers means an infinite one."""
    demand(a, FLOATS, x)
    if a.float("epsilon", 1e-12) != 0:
        raise ValueError(f"{a.where}: no semantics for an epsilon but 0")
    p = a.float("p", 2.0)
    if abs(p) >= 2**31 - 1:
        p = math.copysign(math.inf, p)
    axes = a.ints("axes", ()) or None
    norm = torch.linalg.vector_norm(wide(x), p, axes, a.bool("keepdim", False))
    return norm.to(x.dtype)


@OPS.op("Cumsum")
def cumsum(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    (dim,) = integers(axis)
    return _cumulative(a, x, dim, torch.cumsum, 0)


@OPS.op("CumsumD")
def cumsum_d(a: Attributes, x: Tensor) -> Tensor:
    return _cumulative(a, x, a.int("axis"), torch.cumsum, 0)


@OPS.op("Cumprod")
def cumprod(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    (dim,) = integers(axis)
    return _cumulative(a, x, dim, torch.cumprod, 1)


@OPS.op("CumprodD")
def cumprod_d(a: Attributes, x: Tensor) -> Tensor:
    return _cumulative(a, x, a.int("axis"), torch.cumprod, 1)


def _cumulative(
    a: Attributes, x: Tensor, axis: int, compute: Callable[..., Tensor], first: int
) -> Tensor:
    """From the last element if reverse; each without its own element if exclusive."""
    demand(a, FLOATS | INTEGERS, x)
    dim = normal_axis(a, axis, x.dim())
    if a.bool("reverse", False):
        x = x.flip(dim)
    if a.bool("exclusive", False) and x.numel():
        x = torch.cat([torch.full_like(x.narrow(dim, 0, 1), first), x], dim)
        x = x.narrow(dim, 0, x.shape[dim] - 1)
    result = compute(wide(x), dim, dtype=wide(x).dtype).to(x.dtype)
    return copied(result.flip(dim) if a.bool("reverse", False) else result)


@OPS.op("MseLoss", equal=("predict", "label"))
def mse_loss(a: Attributes, predict: Tensor, label: Tensor) -> Tensor:
    demand(a, FLOATS, predict)
    reduction = a.str("reduction", "mean")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{a.where}: no semantics for reduction={reduction!r}")
    loss = functional.mse_loss(wide(predict), wide(label), reduction=reduction)
    return loss.to(predict.dtype)


@OPS.op("NLLLoss", equal=("x", "weight"))
def nll_loss(
    a: Attributes, x: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood at each row's target, and the sum of the weights that count.

    Without a reduction the second result is 0.
    """
    demand(a, FLOATS, x)
    demand(a, INDICES, target)
    codes = ("none", "mean", "sum")
    reduction, ignored = a.str("reduction", "mean"), a.int("ignore_index", -100)
    if reduction not in codes or x.dim() != 2:
        raise ValueError(f"{a.where}: no semantics for reduction={reduction!r} of {x.dim()} dims")
    loss, total = torch.ops.aten.nll_loss_forward.default(
        x, target.long(), weight, codes.index(reduction), ignored
    )
    return loss, total
