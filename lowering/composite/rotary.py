"""`rolemesh::rotary`: rotate pairs of the last dim by angles.

    (first, second) -> (first * cos - second * sin, second * cos + first * sin)

The pairs are the two halves of the last dim, or, if `interleaved`, its even and odd elements; in
the result all firsts come before all seconds. cos and sin have the last dim of x, or half of it,
which then serves both parts. Shapes: x `[..., D]`, cos and sin `[..., D]` or `[..., D / 2]`,
broadcast along the dims before; result as x. It is computed in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.composite.op import CompositeOp, Gradient

__all__ = ["OP"]


def _shape(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.split(x.shape[-1] // 2, -1)
    return first, second


def _angles(angle: Tensor, width: int) -> tuple[Tensor, Tensor]:
    if angle.shape[-1] == width:
        return angle[..., : width // 2], angle[..., width // 2 :]
    return angle, angle


def _decomposition(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, second = _pairs(x, interleaved)
    (cos1, cos2), (sin1, sin2) = (_angles(angle, x.shape[-1]) for angle in (cos, sin))
    parts = [first * cos1 - second * sin1, second * cos2 + first * sin2]
    return torch.cat(parts, -1).to(x.dtype)


def _kernel(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Into the result, without the parts that a decomposition joins."""
    if not x.dtype == cos.dtype == sin.dtype:
        return _decomposition(x, cos, sin, interleaved)
    first, second = _pairs(x, interleaved)
    (cos1, cos2), (sin1, sin2) = (_angles(angle, x.shape[-1]) for angle in (cos, sin))
    result = x.new_empty(x.shape)
    left, right = result.split(x.shape[-1] // 2, -1)
    torch.mul(first, cos1, out=left).addcmul_(second, sin1, value=-1)
    torch.mul(second, cos2, out=right).addcmul_(first, sin2)
    return result


def _gradient(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation by the opposite angles, back to where the pairs were."""
    first, second = _pairs(x, interleaved)
    (cos1, cos2), (sin1, sin2) = (_angles(angle, x.shape[-1]) for angle in (cos, sin))
    left, right = _pairs(grad, False)
    parts = [left * cos1 + right * sin2, right * cos2 - left * sin1]
    of_x = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    of_cos = _of_angle(left * first, right * second, cos)
    of_sin = _of_angle(-left * second, right * first, sin)
    return of_x.to(x.dtype), of_cos, of_sin


def _of_angle(first: Tensor, second: Tensor, angle: Tensor) -> Tensor:
    """The gradient of cos or sin, from those of what they have for both parts of a pair."""
    whole = angle.shape[-1] != first.shape[-1]
    found = torch.cat([first, second], -1) if whole else first + second
    return found.sum_to_size(angle.shape).to(angle.dtype)


OP = CompositeOp(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    shape=_shape,
    kernel=_kernel,
    decomposition=_decomposition,
    inlined=_decomposition,
    gradient=Gradient(("x", "cos", "sin"), _gradient),
)
