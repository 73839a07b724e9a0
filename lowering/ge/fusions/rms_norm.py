"""RMS norm, alone and after a residual addition.

    x / sqrt(mean(x^2) + eps) * weight    ->  npu_rms_norm
    the same of x = a + b                 ->  npu_add_rms_norm, which gives the sum as well

in fp32 between a cast of x and a cast back; the weight is multiplied before or after that cast. The
fused ops multiply in fp32 and round once.

Limits are those of `torch_npu.npu_rms_norm`'s documentation: fp16, bf16 or fp32, the weight of the
same dtype, 2 to 8 dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import argument, dtype_of, is_call, same_shape, shape_of
from rolemesh.passes.recognise import ENDS_OF_NORMS, Norm, find_norm

__all__ = ["add_rms_norm", "rms_norm"]

aten = torch.ops.aten

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rms_norm() -> Fusion:
    """The fusion without an addition."""
    ends = _ends()
    return Fusion(torch.ops.npu.npu_rms_norm.default, ends, _find_norm)


def add_rms_norm() -> Fusion:
    """The fusion with an addition; it goes before the one without."""
    ends = _ends()
    return Fusion(torch.ops.npu.npu_add_rms_norm.default, ends, _find_add_norm)


def _ends() -> frozenset[object]:
    define_npu_ops()
    define_composite_ops()
    return ENDS_OF_NORMS | {torch.ops.rolemesh.rms_norm.default}


def _fitting(end: fx.Node) -> Norm | None:
    """A norm within the limits."""
    norm = find_norm(end)
    fits = norm is not None and dtype_of(end) in _DTYPES and 2 <= len(shape_of(end)) <= 8
    return norm if fits else None


def _find_norm(end: fx.Node, setting: Setting) -> Found | None:
    norm = _fitting(end)
    if norm is None:
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        op = torch.ops.npu.npu_rms_norm.default
        return [new.part(new(op, norm.x, norm.gamma, norm.epsilon), 0)]

    return Found((end,), norm.inner, emit)


def _find_add_norm(end: fx.Node, setting: Setting) -> Found | None:
    norm = _fitting(end)
    if norm is None or not is_call(norm.x, aten.add.Tensor) or argument(norm.x, "alpha") != 1:
        return None
    left, right = norm.x.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    alike = all(
        dtype_of(x) == dtype_of(norm.x) and same_shape(shape_of(x), shape_of(norm.x))
        for x in (left, right)
    )
    if not alike or not norm.gamma < norm.x:
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        op = torch.ops.npu.npu_add_rms_norm.default
        made = new(op, left, right, norm.gamma, norm.epsilon)
        return [new.part(made, 2), new.part(made, 0)]

    return Found((norm.x, end), norm.inner, emit)
