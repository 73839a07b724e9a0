"""Rules of ops that combine elements along dims: sums, extremes, scans, softmax, norms, sorts.

A sum, a mean or an extreme of a sharded dim is a partial value. Everything else that reads a whole
dim replicates it; results that keep the dim keep its factor, so that labels can be followed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule, RuleBuilder
from rolemesh.passes.rules.arguments import argument, dim_argument, dims_argument
from rolemesh.passes.rules.registry import (
    LocalCall,
    LocalForm,
    LocalFunction,
    RuleFunction,
    replicated_rule,
)

__all__ = ["LOCAL", "RULES"]

Patterns = tuple[tuple[bool, ...], ...]
_UNARY: Patterns = ((True,),)


def _without(
    dims: Sequence[tuple[int, ...]], gone: Collection[int], ndim: int
) -> list[tuple[int, ...]]:
    """Dims of a result with `ndim` dims: the gone ones have extent one if it keeps them."""
    if ndim == len(dims):
        return [() if dim in gone else factors for dim, factors in enumerate(dims)]
    return [factors for dim, factors in enumerate(dims) if dim not in gone]


def _reduction(
    kind: Kind, dims_at: int | None, *, reduction: str = "sum", linear: Patterns = ()
) -> RuleFunction:
    """The rule of ops that remove dims (or leave them with extent one), with any results.

    Args:
        kind: What a removed dim allows.
        dims_at: Index of the dims argument; None for an op that always reduces all dims.
        reduction: How REDUCE factors combine.
        linear: Patterns of partial operands.
    """

    def rule(call: OpCall) -> Rule:
        builder = RuleBuilder()
        shape = call.operands[0].shape
        dims = builder.dims(shape)
        if dims_at is None:
            gone: Collection[int] = range(len(shape))
        else:
            gone = dims_argument(call, dims_at, len(shape))
        for dim in gone:
            if dim < len(shape):
                builder.kinds[dim] = kind
        results = [_without(dims, gone, value.ndim) for value in call.results]
        return builder.build([dims], results, linear=linear, reduction=reduction)

    return rule


def _along(dim_at: int, linear: Patterns = ()) -> RuleFunction:
    """The rule of ops that read and keep one dim: scans, softmax, also of several operands."""

    def rule(call: OpCall) -> Rule:
        builder = RuleBuilder()
        shape = call.operands[0].shape
        dims = builder.dims(shape)
        if dims:
            dim = dim_argument(call, dim_at, len(dims))
            builder.kinds[dim] = Kind.REPLICATE
        return builder.build([dims] * len(call.operands), [dims] * len(call.results), linear=linear)

    return rule


def _moving(dim_at: int, default: int) -> RuleFunction:
    """The rule of sorts: elements move along a dim, of which the results may keep a part."""

    def rule(call: OpCall) -> Rule:
        builder = RuleBuilder()
        shape, target = call.operands[0].shape, call.results[0].shape
        dims = builder.dims(shape)
        result = dims
        if dims:
            dim = dim_argument(call, dim_at, len(dims), default)
            builder.kinds[dim] = Kind.PERMUTE
            if shape[dim] != target[dim]:
                kept = builder.factor(target[dim], Kind.PERMUTE)
                result = [*dims[:dim], kept, *dims[dim + 1 :]]
        return builder.build([dims], [result] * len(call.results))

    return rule


# ------------------------------------------------------------------------------------------ norms


def trailing_norm(call: OpCall) -> Rule:
    """`native_layer_norm(x, shape, weight, bias, eps)`, `_fused_rms_norm(x, shape, weight, eps)`.

    Statistics have the leading dims, then dims of extent one.
    """
    builder = RuleBuilder()
    shape = call.operands[0].shape
    dims = builder.dims(shape)
    first = len(shape) - len(cast(Sequence[int], argument(call, 1, "normalized_shape")))
    for dim in range(first, len(shape)):
        builder.kinds[dim] = Kind.REPLICATE
    statistics = dims[:first] + [()] * (len(shape) - first)
    return builder.build(
        [dims] + [dims[first:]] * (len(call.operands) - 1),
        [dims] + [statistics] * (len(call.results) - 1),
    )


def group_norm(call: OpCall) -> Rule:
    """`native_group_norm(x, weight, bias, N, C, HxW, group, eps)`: only the batch shards."""
    builder = RuleBuilder()
    shape = call.operands[0].shape
    dims = [builder.factor(shape[0]), *builder.dims(shape[1:], Kind.REPLICATE)]
    groups = builder.factor(call.results[1].shape[1], Kind.REPLICATE)
    return builder.build(
        [dims] + [[dims[1]]] * (len(call.operands) - 1),
        [dims] + [[dims[0], groups]] * (len(call.results) - 1),
    )


def group_norm_local(local: LocalCall) -> LocalForm:
    """The batch size is an argument too."""
    args = (*local.args[:3], local.result_shape()[0], *local.args[4:])
    return local.call.target, args, local.kwargs


_sum_all = _reduction(Kind.REDUCE, None, linear=_UNARY)
_mean_all = _reduction(Kind.REDUCE, None, reduction="avg", linear=_UNARY)
_whole = _reduction(Kind.REPLICATE, 1)
_whole_all = _reduction(Kind.REPLICATE, None)

REDUCTIONS: Mapping[str, RuleFunction] = {
    "aten::sum.default": _sum_all,
    "aten::sum.dim_IntList": _reduction(Kind.REDUCE, 1, linear=_UNARY),
    "aten::mean.default": _mean_all,
    "aten::mean.dim": _reduction(Kind.REDUCE, 1, reduction="avg", linear=_UNARY),
    "aten::amax": _reduction(Kind.REDUCE, 1, reduction="max"),
    "aten::amin": _reduction(Kind.REDUCE, 1, reduction="min"),
    "aten::max.default": _reduction(Kind.REDUCE, None, reduction="max"),
    "aten::min.default": _reduction(Kind.REDUCE, None, reduction="min"),
    # Which element it was, and products and truth values, are no reduction of the mesh dialect.
    "aten::max.dim": _whole,
    "aten::min.dim": _whole,
    "aten::argmax": _whole,
    "aten::argmin": _whole,
    "aten::median.dim": _whole,
    "aten::any.default": _whole_all,
    "aten::any.dim": _whole,
    "aten::any.dims": _whole,
    "aten::all.default": _whole_all,
    "aten::all.dim": _whole,
    "aten::all.dims": _whole,
    "aten::prod.default": _whole_all,
    "aten::prod.dim_int": _whole,
    "aten::logsumexp": _whole,
    "aten::var.dim": _whole,
    "aten::var.correction": _whole,
    "aten::std.dim": _whole,
    "aten::std.correction": _whole,
    "aten::var_mean.dim": _whole,
    "aten::var_mean.correction": _whole,
    "aten::linalg_vector_norm": _reduction(Kind.REPLICATE, 2),
    "aten::norm.Scalar": _whole_all,
    "aten::norm.ScalarOpt_dim": _reduction(Kind.REPLICATE, 2),
}

ALONG: Mapping[str, RuleFunction] = {
    "aten::cumsum": _along(1, linear=_UNARY),
    "aten::cumprod": _along(1),
    "aten::cummax": _along(1),
    "aten::cummin": _along(1),
    "aten::logcumsumexp": _along(1),
    "aten::_softmax": _along(1),
    "aten::_safe_softmax": _along(1),
    "aten::_log_softmax": _along(1),
    "aten::softmax": _along(1),
    "aten::log_softmax": _along(1),
    "aten::_softmax_backward_data": _along(2, linear=((True, False),)),
    "aten::_log_softmax_backward_data": _along(2, linear=((True, False),)),
    "aten::sort.default": _moving(1, -1),
    "aten::sort.stable": _moving(2, -1),
    "aten::argsort.default": _moving(1, -1),
    "aten::argsort.stable": _moving(2, -1),
    "aten::topk": _moving(2, -1),
}

RULES: dict[str, RuleFunction] = {
    **REDUCTIONS,
    **ALONG,
    "aten::native_layer_norm": trailing_norm,
    "aten::layer_norm": trailing_norm,
    "aten::_fused_rms_norm": trailing_norm,
    "aten::rms_norm": trailing_norm,
    "aten::native_group_norm": group_norm,
    "aten::histc": replicated_rule,
    "aten::bincount": replicated_rule,
}

LOCAL: dict[str, LocalFunction] = {"aten::native_group_norm": group_norm_local}
