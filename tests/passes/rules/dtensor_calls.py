"""Calls of the remaining ops that both DTensor and rolemesh have rules for, by kind."""

from __future__ import annotations

import torch
from tests.passes.rules.samples import Call, case, f, i, m

aten = torch.ops.aten

UNARY = """
    abs acos acosh asin asinh atan atanh ceil celu contiguous cosh elu erf erfc erfinv exp2 expm1
    floor frac hardsigmoid hardtanh isinf isnan isneginf isposinf leaky_relu lgamma log log10 log1p
    log2 logit mish nan_to_num positive reciprocal relu6 round selu sign sin sinh softplus sqrt
    square tan trunc
"""
BINARY = """
    atan2 copy fmax fmin gelu_backward heaviside hypot logaddexp logaddexp2 minimum sigmoid_backward
    tanh_backward
"""
COMPARISONS = ("eq", "ne", "lt", "gt")
BITWISE = ("bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift")
LOGICAL = ("logical_and", "logical_or", "logical_xor")

MORE_CALLS: list[Call] = [
    *[case(getattr(aten, name).default, f(4, 6)) for name in UNARY.split()],
    *[case(getattr(aten, name).default, f(4, 6), f(4, 6)) for name in BINARY.split()],
    *[case(getattr(aten, name).Tensor, f(4, 6), f(4, 6)) for name in COMPARISONS],
    *[case(getattr(aten, name).Tensor, i(4, 6), i(4, 6)) for name in BITWISE],
    *[case(getattr(aten, name).default, m(4, 6), m(4, 6)) for name in LOGICAL],
    case(aten.bitwise_not.default, m(4, 6)),
    case(aten.fmod.Tensor, f(4, 6), f(4, 6)),
    case(aten.xlogy.Tensor, f(4, 6), f(4, 6)),
    case(aten.rsub.Scalar, f(4, 6), 2.0),
    case(aten.threshold.default, f(4, 6), 0.5, 0.0),
    case(aten.clamp_max.default, f(4, 6), 0.5),
    case(aten.clamp_min.default, f(4, 6), 0.5),
    case(aten.addcdiv.default, f(4, 6), f(4, 6), f(4, 6)),
    case(aten.reshape.default, f(4, 6, 8), [24, 8]),
    # Creation.
    case(aten.empty_like.default, f(4, 6)),
    case(aten.ones_like.default, f(4, 6)),
    case(aten.full_like.default, f(4, 6), 2.0),
    case(aten.new_empty.default, f(4, 6), [4, 6]),
    case(aten.new_ones.default, f(4, 6), [4, 6]),
    case(aten.new_full.default, f(4, 6), [4, 6], 2.0),
    case(aten.new_empty_strided.default, f(4, 6), [4, 6], [6, 1]),
    # Reductions.
    case(aten.argmin.default, f(4, 6), 1),
    case(aten.min.default, f(4, 6)),
    case(aten.min.dim, f(4, 6), 1),
    case(aten.median.dim, f(4, 6), 1),
    case(aten.cummax.default, f(4, 6), 1),
    case(aten.cummin.default, f(4, 6), 1),
    case(aten.cumprod.default, f(4, 6), 1),
    case(aten.logcumsumexp.default, f(4, 6), 1),
    case(aten.std.correction, f(4, 6), [1]),
    case(aten.var_mean.correction, f(4, 6), [1]),
    case(aten.norm.ScalarOpt_dim, f(4, 6), 2, [1]),
    case(aten.histc.default, f(4, 6), 4),
    case(aten._safe_softmax.default, f(4, 6), 1),
    case(aten._log_softmax_backward_data.default, f(4, 6), f(4, 6), 1, torch.float32),
    case(aten.native_group_norm.default, f(4, 6, 8), f(6), f(6), 4, 6, 8, 2, 1e-5),
    # Losses and gradients.
    case(aten.nll_loss_forward.default, f(4, 6), i(4), None, 0, -100),
    case(aten.nll_loss2d_forward.default, f(4, 6, 2, 8), i(4, 2, 8), None, 0, -100),
    case(aten.nll_loss_backward.default, f(4), f(4, 6), i(4), None, 0, -100, f()),
    case(aten.nll_loss2d_backward.default, f(), f(4, 6, 2, 8), i(4, 2, 8), f(6), 1, -100, f()),
    case(aten.native_dropout_backward.default, f(4, 6), m(4, 6), 2.0),
    case(aten.logit_backward.default, f(4, 6), f(4, 6) / 2, 0.1),
    case(
        aten.native_layer_norm_backward.default,
        *(f(4, 6, 8), f(4, 6, 8) + f(8), [8], f(4, 6, 1), f(4, 6, 1) + 1, f(8), f(8), [True] * 3),
    ),
    # Products, indexing, attention, experts.
    case(aten.dot.default, f(6), f(6)),
    case(aten.index_fill.int_Scalar, f(4, 6), 1, i(2), 0.0),
    case(aten.index_put.default, f(4, 6), [i(8)], f(8, 6)),
    case(aten.index_reduce.default, f(4, 6), 1, torch.arange(2), f(4, 2), "prod"),
    case(aten.scatter_add.default, f(4, 6), 1, i(4, 2), f(4, 2)),
    case(aten.embedding_dense_backward.default, f(4, 6, 8), i(4, 6), 10, -1, False),
]
