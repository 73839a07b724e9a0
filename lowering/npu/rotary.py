"""Rotary position embeddings.

All compute `x * cos + rotated(x) * sin` in fp32 and round once. They differ in what is paired:

    half             element i with element i + D/2     (Llama)
    interleave       element 2i with element 2i + 1     (GPT-J)
    quarter          half, in each half of the dim
    interleave-half  first moves even elements before odd ones, then half  (DeepSeek)

cos and sin have the extent of the head dim, and broadcast along the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = [
    "OPS",
    "apply_rotary_pos_emb",
    "evens_first",
    "interleave_rope",
    "rotary_mul",
    "rotary_mul_mode",
    "rotated_by_half",
]

OPS = NpuOpTable()


def rotated_by_half(x: Tensor) -> Tensor:
    """`(-second half, first half)` of the last dim."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def evens_first(x: Tensor) -> Tensor:
    """The elements at even places of the last dim, then those at odd places."""
    return torch.cat([x[..., ::2], x[..., 1::2]], -1)


def _rotated_in_pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _rotated_by_quarter(x: Tensor) -> Tensor:
    return torch.cat([rotated_by_half(half) for half in x.chunk(2, -1)], -1)


_ROTATED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "half": rotated_by_half,
    "interleave": _rotated_in_pairs,
    "quarter": _rotated_by_quarter,
}


def _check_angles(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    torch._check(
        cos.shape == sin.shape and cos.dim() == x.dim() and cos.shape[-1] == x.shape[-1],
        lambda: f"angles {list(cos.shape)}, {list(sin.shape)} do not fit {list(x.shape)}",
    )
    torch._check(
        all(a == 1 or a == n for a, n in zip(cos.shape[:-1], x.shape[:-1], strict=True)),
        lambda: f"angles {list(cos.shape)} do not broadcast to {list(x.shape)}",
    )


def rotary_mul_mode(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """`x * cos + rotated(x) * sin`.

    Args:
        x: `[..., D]`.
        cos: `[..., D]`, broadcast along the dims before the last.
        sin: Likewise.
        mode: One of those in the module's docstring.

    Returns:
        A tensor of x's shape and dtype.
    """
    wide = evens_first(x.float()) if mode == "interleave-half" else x.float()
    turned = _ROTATED["half" if mode == "interleave-half" else mode](wide)
    return (wide * cos.float() + turned * sin.float()).to(x.dtype)


def _check_mode(op: str, mode: str, modes: tuple[str, ...]) -> None:
    refuse(op, rotary_mode=None if mode in modes else mode)


_MUL_MODES = ("half", "interleave", "quarter", "interleave-half")


def _rotary_mul_shape(
    input: Tensor,  # noqa: A002
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    _check_mode("npu_rotary_mul", rotary_mode, _MUL_MODES)
    _check_angles(input, r1, r2)
    return input.new_empty(input.shape)


@OPS.op(
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half',"
    " Tensor? rotate=None) -> Tensor",
    ge="RotaryMul",
    shape=_rotary_mul_shape,
)
def rotary_mul(
    input: Tensor,  # noqa: A002
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    rotate: Tensor | None = None,
) -> Tensor:
    """Rotate one tensor; r1 is the cosine and r2 the sine.

    With `rotate` the rotation is `input @ rotate`, a `[D, D]` matrix of zeros and signs.
    """
    _check_mode("npu_rotary_mul", rotary_mode, _MUL_MODES)
    _check_angles(input, r1, r2)
    if rotate is None:
        return rotary_mul_mode(input, r1, r2, rotary_mode)
    wide = input.float()
    return (wide * r1.float() + (wide @ rotate.float()) * r2.float()).to(input.dtype)


_LAYOUTS = ("BSND", "SBND", "BNSD", "TND")


def _check_apply(x: Tensor, cos: Tensor, sin: Tensor, layout: str, rotary_mode: str) -> None:
    _check_mode("npu_apply_rotary_pos_emb", rotary_mode, tuple(_ROTATED))
    refuse("npu_apply_rotary_pos_emb", layout=None if layout in _LAYOUTS else layout)
    _check_angles(x, cos, sin)
    torch._check(
        x.dim() == len(layout) and cos.shape[layout.index("N")] == 1,
        lambda: f"{list(x.shape)} with angles {list(cos.shape)} is not {layout}",
    )


def _apply_rotary_pos_emb_shape(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[Tensor, Tensor]:
    for x in (query, key):
        _check_apply(x, cos, sin, layout, rotary_mode)
    return query.new_empty(query.shape), key.new_empty(key.shape)


@OPS.op(
    "npu_apply_rotary_pos_emb(Tensor query, Tensor key, Tensor cos, Tensor sin,"
    " str layout='BSND', str rotary_mode='half') -> (Tensor, Tensor)",
    ge="ApplyRotaryPosEmb",
    shape=_apply_rotary_pos_emb_shape,
)
def apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the same angles, `[B, S, 1, D]` in the layout's order of dims."""
    for x in (query, key):
        _check_apply(x, cos, sin, layout, rotary_mode)
    turned_query = rotary_mul_mode(query, cos, sin, rotary_mode)
    return turned_query, rotary_mul_mode(key, cos, sin, rotary_mode)


def _check_interleave(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    _check_angles(x, cos, sin)
    torch._check(
        x.dim() == 4 and cos.shape[1] == 1,
        lambda: f"x {list(x.shape)} is [B, N, S, D], angles {list(cos.shape)} are [B, 1, S, D]",
    )


def _interleave_rope_shape(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _check_interleave(x, cos, sin)
    return x.new_empty(x.shape)


@OPS.op(
    "npu_interleave_rope(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    ge="InterleaveRope",
    shape=_interleave_rope_shape,
)
def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, N, S, D]` as DeepSeek does; the result has its even elements in front."""
    _check_interleave(x, cos, sin)
    return rotary_mul_mode(x, cos, sin, "interleave-half")
