"""Normalisations: softmax, and layer, group, instance and batch norm.

All are accumulated in float32 if their operand has 16 bits. Channels are dim 1: torchair states
that layout with the tensors, and leaves the attribute data_format at its default.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from rolemesh.runtime.ge.ops.checks import FLOATS, demand, normal_axis, only, wide
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("SoftmaxV2")
def softmax_v2(a: Attributes, x: Tensor) -> Tensor:
    """Over one axis; half_to_float leaves the result of float16 in float32."""
    demand(a, FLOATS, x)
    target = x.dtype
    if a.bool("half_to_float", False):
        demand(a, frozenset({torch.float16}), x)
        target = torch.float32
    return x.softmax(_one_axis(a, x), dtype=target)


@OPS.op("LogSoftmaxV2")
def log_softmax_v2(a: Attributes, logits: Tensor) -> Tensor:
    """Over one axis."""
    demand(a, FLOATS, logits)
    return logits.log_softmax(_one_axis(a, logits))


def _one_axis(a: Attributes, x: Tensor) -> int:
    axes = a.ints("axes", (-1,))
    if len(axes) != 1:
        raise ValueError(f"{a.where}: no semantics for axes={axes}, only for one")
    return normal_axis(a, axes[0], x.dim())


@OPS.op("LayerNormV4")
def layer_norm_v4(
    a: Attributes,
    x: Tensor,
    normalized_shape: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the last dims, which normalized_shape repeats; also the mean and 1 / deviation."""
    shape = integers(normalized_shape)
    if list(x.shape[x.dim() - len(shape) :]) != shape:
        raise ValueError(f"{a.where}: {shape} are not the last dims of {list(x.shape)}")
    return _layer_norm(a, x, len(shape), gamma, beta, a.float("epsilon", 1e-5))


@OPS.op("LayerNormV3")
def layer_norm_v3(
    a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the dims from begin_norm_axis on; also the mean and 1 / deviation."""
    first = normal_axis(a, a.int("begin_norm_axis", 0), x.dim())
    if normal_axis(a, a.int("begin_params_axis", 0), x.dim()) != first:
        raise ValueError(f"{a.where}: no semantics for parameters of other dims than {first} on")
    return _layer_norm(a, x, x.dim() - first, gamma, beta, a.float("epsilon", 1e-5))


def _layer_norm(
    a: Attributes, x: Tensor, dims: int, gamma: Tensor | None, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    demand(a, FLOATS, x)
    weight, bias = (None if each is None else wide(each) for each in (gamma, beta))
    shape = list(x.shape[x.dim() - dims :])
    y, mean, rstd = torch.native_layer_norm(wide(x), shape, weight, bias, epsilon)
    return y.to(x.dtype), mean, rstd


@OPS.op("GroupNorm", equal=("x", "gamma", "beta"))
def group_norm(
    a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the channels of a group and the dims behind; also the mean and variance [N, groups]."""
    y, mean, variance = _group_norm(a, x, gamma, beta, a.float("eps", 1e-4))
    return y, mean.to(x.dtype), variance.to(x.dtype)


@OPS.op("GroupNormV2", equal=("x", "gamma", "beta"))
def group_norm_v2(
    a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm with 1 / deviation for the variance."""
    epsilon = a.float("eps", 1e-5)
    y, mean, variance = _group_norm(a, x, gamma, beta, epsilon)
    return y, mean.to(x.dtype), torch.rsqrt(variance + epsilon).to(x.dtype)


def _group_norm(
    a: Attributes, x: Tensor, gamma: Tensor, beta: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    demand(a, FLOATS, x)
    only(a, is_training=True)
    if a.str("data_format", "NHWC") not in ("NHWC", "NCHW"):
        raise ValueError(f"{a.where}: no semantics for data_format={a.str('data_format')!r}")
    groups, inner = a.int("num_groups"), wide(x)
    if x.dim() < 2 or x.shape[1] % groups:
        raise ValueError(f"{a.where}: {list(x.shape)} has no {groups} groups of channels")
    y = functional.group_norm(inner, groups, wide(gamma), wide(beta), epsilon).to(x.dtype)
    grouped = inner.reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    return y, mean, variance


@OPS.op("BNInfer")
def bn_infer(
    a: Attributes, x: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    """Batch norm by given statistics of each channel."""
    demand(a, FLOATS, x)
    epsilon = a.float("epsilon")
    return _by_statistics(x, scale, offset, wide(mean), wide(variance), epsilon)


def _by_statistics(
    x: Tensor, scale: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    factor = wide(scale) * torch.rsqrt(variance + epsilon)
    centred = wide(x) - mean.reshape(shape)
    return (centred * factor.reshape(shape) + wide(offset).reshape(shape)).to(x.dtype)


@OPS.op("BatchNormV3", writes={1: "running_mean", 2: "running_var"})
def batch_norm_v3(
    a: Attributes,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Batch norm by the statistics of the batch if is_training, else by the running ones.

    Training moves the running ones by the momentum (with the unbiased variance), and returns the
    batch's mean and 1 / deviation, which are empty otherwise.
    """
    demand(a, FLOATS, x)
    epsilon, momentum = a.float("epsilon", 1e-5), a.float("momentum", 0.1)
    if not a.bool("is_training", True):
        mean, variance = wide(running_mean), wide(running_var)
        y = _by_statistics(x, weight, bias, mean, variance, epsilon)
        none = running_mean.new_empty(0)
        return y, running_mean, running_var, none, none.clone()
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(wide(x), dims, correction=0)
    unbiased = wide(x).var(dims, correction=1)
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    rstd = torch.rsqrt(variance + epsilon)
    y = _by_statistics(x, weight, bias, mean, variance, epsilon)
    saved = running_mean.dtype
    return y, running_mean, running_var, mean.to(saved), rstd.to(saved)
