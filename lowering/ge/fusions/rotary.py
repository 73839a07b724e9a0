"""Rotary position embeddings.

    x * cos + cat(-x2, x1) * sin                    ->  npu_rotary_mul
    cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)   ->  npu_rotary_mul
    the same, x1 the even and x2 the odd elements   ->  npu_interleave_rope

x1 and x2 are the halves of x's last dim, where nothing else is said. In the first form cos and sin
have x's last dim, in the others half of it: they are doubled, once for all layers.

Limits are those of the documentation of `torch_npu.npu_rotary_mul` (half mode, ahead of time) and
`torch_npu.npu_interleave_rope`. The converter of npu_rotary_mul to GE drops the mode for most
devices, so no other mode is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import Size, dtype_of, known_above, same, same_shape, shape_of
from rolemesh.passes.recognise import ENDS_OF_ROTATIONS, Rotation, find_rotation

__all__ = ["interleave_rope", "rotary_mul"]

aten = torch.ops.aten

_MUL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MUL_WIDTH = 894
"""Largest head dim: even, below 896."""
_MUL_ROWS = 999
"""Largest batch and number of heads."""
_MUL_SPREADS = ((2,), (0, 2), (0, 1, 2), (1,), (0, 1), (0,))
"""Dims along which cos and sin vary: 11SD, B1SD, BNSD; 1S1D, BS1D; S11D, and SB1D as BS1D."""

_INTERLEAVE_DTYPES = (torch.float16, torch.bfloat16)
_INTERLEAVE_WIDTH = 64
"""The only head dim."""


def rotary_mul() -> Fusion:
    """The fusion of halves."""
    ends = _ends()
    return Fusion(torch.ops.npu.npu_rotary_mul.default, ends, _find_halves)


def interleave_rope() -> Fusion:
    """The fusion of even and odd elements."""
    ends = _ends()
    return Fusion(torch.ops.npu.npu_interleave_rope.default, ends, _find_interleaved)


def _ends() -> frozenset[object]:
    define_npu_ops()
    define_composite_ops()
    return ENDS_OF_ROTATIONS | {torch.ops.rolemesh.rotary.default}


def _find_halves(end: fx.Node, setting: Setting) -> Found | None:
    found = find_rotation(end)
    if found is None or found.step != 1 or not _fits(found, _MUL_DTYPES):
        return None
    if setting.within_limits and not _is_documented(shape_of(found.x), shape_of(found.cos)):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        cos, sin = (_doubled(new, angle, found.share) for angle in (found.cos, found.sin))
        return [new(torch.ops.npu.npu_rotary_mul.default, found.x, cos, sin)]

    return Found((end,), found.inner, emit)


def _find_interleaved(end: fx.Node, setting: Setting) -> Found | None:
    found = find_rotation(end)
    if found is None or found.step != 2 or not _fits(found, _INTERLEAVE_DTYPES):
        return None
    batch, _, _, width = shape_of(found.x)
    each, heads, *rest = shape_of(found.cos)
    repeats = not same(each, batch)
    if not same(heads, 1) or (repeats and not all(isinstance(n, int) for n in (batch, *rest))):
        return None
    if setting.within_limits and not same(width, _INTERLEAVE_WIDTH):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        angles = [_doubled(new, angle, found.share) for angle in (found.cos, found.sin)]
        if repeats:
            sizes = [batch, *shape_of(angles[0])[1:]]
            angles = [new.shared(angle, aten.expand.default, angle, sizes) for angle in angles]
        return [new(torch.ops.npu.npu_interleave_rope.default, found.x, *angles)]

    return Found((end,), found.inner, emit)


def _doubled(new: Emitter, angle: fx.Node, share: int) -> fx.Node:
    return angle if share == 1 else new.shared(angle, aten.cat.default, [angle] * share, -1)


def _fits(found: Rotation, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether cos and sin broadcast to a tensor of four dims, all of one dtype."""
    x, cos, sin = (shape_of(value) for value in (found.x, found.cos, found.sin))
    kinds = {dtype_of(value) for value in (found.x, found.cos, found.sin)}
    if len(kinds) != 1 or not kinds.issubset(dtypes) or not len(x) == len(cos) == 4:
        return False
    spreads = all(same(a, 1) or same(a, n) for a, n in zip(cos[:3], x[:3], strict=True))
    return same_shape(cos, sin) and spreads and same(cos[3] * found.share, x[3])


def _is_documented(x: Sequence[Size], cos: Sequence[Size]) -> bool:
    """Whether npu_rotary_mul is documented for these sizes; cos may have half of the last dim."""
    for spread in _MUL_SPREADS:
        # A dim of one element is of either kind.
        fits = all(same(x[d], 1) or same(cos[d], 1) != (d in spread) for d in range(3))
        rows = [x[d] for d in range(3) if d != spread[-1]]
        if fits and not any(known_above(n, _MUL_ROWS) for n in rows):
            return not known_above(x[3], _MUL_WIDTH)
    return False
