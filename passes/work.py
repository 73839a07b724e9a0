"""The arithmetic of an op: floating-point operations by the shapes of its operands.

A multiplication and an addition count as two. Ops that memory bounds have none, and are not in the
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch

__all__ = ["flops_of"]

_Shapes = Sequence[Sequence[int]]


def _product(shapes: _Shapes) -> int:
    left, right = shapes[:2]
    return 2 * math.prod(left) * right[-1]


def _attention(shapes: _Shapes) -> int:
    query, key, value = shapes[:3]
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _composite_attention(shapes: _Shapes) -> int:
    query, key, value, *options = shapes
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1] + _tail(options))


def _attention_backward(shapes: _Shapes) -> int:
    """The gradients of both products, and scores once more; the gradient of the result is first."""
    query, key = shapes[1:3]
    again = 2 * math.prod(query[:-1]) * key[-2] * query[-1]
    return again + 2 * _attention(shapes[1:])


def _composite_attention_backward(shapes: _Shapes) -> int:
    """The gradients of both products, and both products once more."""
    return 3 * _composite_attention(shapes[1:])


def _sparse_attention(shapes: _Shapes) -> int:
    query, _, value, indices, *options = shapes
    return 2 * math.prod(query[:-1]) * indices[-1] * (query[-1] + value[-1] + _tail(options))


def _tail(options: _Shapes) -> int:
    """Features of the tails of queries and keys, which are last, after a mask and sinks `[H]`."""
    return options[-1][-1] if len(options) > 1 and len(options[-1]) == 4 else 0


def _experts(shapes: _Shapes) -> int:
    """Each route goes through one expert's two projections."""
    _, ids, _, up, down = shapes[:5]
    return 2 * math.prod(ids) * (math.prod(up[1:]) + math.prod(down[1:]))


def _experts_backward(shapes: _Shapes) -> int:
    """The gradients of both products, and both products once more."""
    return 3 * _experts(shapes[1:])


def _grouped_backward(shapes: _Shapes) -> int:
    """A product for each of the two gradients."""
    return 2 * _product(shapes)


_FLOPS: Mapping[str, Callable[[_Shapes], int]] = MappingProxyType(
    {
        "aten::mm": _product,
        "aten::bmm": _product,
        "aten::_grouped_mm": _product,
        "aten::_scaled_grouped_mm": _product,
        "transformers::grouped_mm_fallback": _product,
        "transformers::grouped_mm_fallback_backward": _grouped_backward,
        "mesh.grouped_backward": _grouped_backward,
        "mesh.grouped_sums": _product,
        "aten::scaled_dot_product_attention": _attention,
        "aten::_scaled_dot_product_attention_math": _attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
        "aten::_scaled_dot_product_flash_attention": _attention,
        "aten::_scaled_dot_product_efficient_attention": _attention,
        "aten::_scaled_dot_product_cudnn_attention": _attention,
        "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "aten::_scaled_dot_product_flash_attention_backward": _attention_backward,
        "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward,
        "aten::_scaled_dot_product_cudnn_attention_backward": _attention_backward,
        "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
        "rolemesh::attention": _composite_attention,
        "rolemesh::attention_backward": _composite_attention_backward,
        "rolemesh::sparse_attention": _sparse_attention,
        "rolemesh::experts": _experts,
        "mesh.experts": _experts,
        "rolemesh::experts_backward": _experts_backward,
        "mesh.experts_backward": _experts_backward,
    }
)


def flops_of(target: object, shapes: _Shapes) -> int:
    """Floating-point operations of one call.

    Args:
        target: The op.
        shapes: Shapes of its tensor operands, in order.
    """
    if isinstance(target, torch._ops.OpOverload):
        count = _FLOPS.get(target._schema.name)
    else:
        count = _FLOPS.get(str(target))
    return 0 if count is None else count(shapes)
