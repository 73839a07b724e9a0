"""Defines the composite ops in torch.

Each has its kernel for CPU tensors, its decomposition for those of other devices, its shape
function for tensors without data, and its gradient or the refusal of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch._ops import OpOverload

from rolemesh.lowering.composite import (
    attention,
    attention_backward,
    experts,
    experts_backward,
    rms_norm,
    rotary,
    sparse_attention,
)
from rolemesh.lowering.composite.autograd import register_gradient
from rolemesh.lowering.composite.op import CompositeOp, register_shape

__all__ = ["OPS", "decompositions", "define_composite_ops", "inlined"]

OPS: Mapping[str, CompositeOp] = MappingProxyType(
    {
        op.name: op
        for op in (
            attention.OP,
            attention_backward.OP,
            sparse_attention.OP,
            experts.OP,
            experts_backward.OP,
            rms_norm.OP,
            rotary.OP,
        )
    }
)
"""All composite ops, by name."""


def define_composite_ops() -> None:
    """Define every op as `torch.ops.rolemesh.*`; a second call does nothing."""
    _library()


@functools.cache
def _library() -> torch.library.Library:
    """The definitions; they go away with this object."""
    library = torch.library.Library("rolemesh", "FRAGMENT")
    for op in OPS.values():
        library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
        library.impl(op.name, op.kernel, "CPU")
        library.impl(op.name, op.decomposition, "CompositeExplicitAutograd")
        register_shape(library, op.name, op.shape)
        register_gradient(op, library)
    return library


def decompositions() -> dict[OpOverload, Callable[..., object]]:
    """What a target traces in place of composite ops that it has no op of its own for."""
    define_composite_ops()
    return {op.overload: op.decomposition for op in OPS.values()}


def inlined() -> dict[OpOverload, Callable[..., object]]:
    """What a compiler that can call kernels traces in place of composite ops."""
    define_composite_ops()
    return {op.overload: op.inlined for op in OPS.values() if op.inlined is not None}
