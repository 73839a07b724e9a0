"""Products of sorted rows, one weight for each group -> npu_grouped_matmul.

`_grouped_mm` of rows `[M, K]` and weights `[E, K, N]` by the ends of E groups. Rows after the last
group have unspecified contents in both ops.

Limits are those of `torch_npu.npu_grouped_matmul`'s documentation: fp16, bf16 or fp32, and last
dims below 65536.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from rolemesh.lowering.ge.fusions.base import Emitter, Found, Fusion, Setting
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.patterns import (
    argument,
    dtype_of,
    is_call,
    known_above,
    shape_of,
)

__all__ = ["BY_ENDS", "BY_ROWS", "DTYPES", "SINGLE_RESULT", "WIDTH", "grouped_matmul"]

aten = torch.ops.aten

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDTH = 65535
"""Largest last dim of rows and weights, however the weights lie in memory."""
SINGLE_RESULT = 3
BY_ROWS = 0
BY_ENDS = 0
"""Values of `split_item`, `group_type` and `group_list_type` (and `expert_tokens_num_type`)."""


def grouped_matmul() -> Fusion:
    """The fusion."""
    define_npu_ops()
    ends = frozenset({aten._grouped_mm.default})
    return Fusion(torch.ops.npu.npu_grouped_matmul.default, ends, _find)


def _find(end: fx.Node, setting: Setting) -> Found | None:
    rows, weight = end.args[:2]
    ends = argument(end, "offs")
    assert isinstance(rows, fx.Node)
    assert isinstance(weight, fx.Node)
    if not isinstance(ends, fx.Node) or argument(end, "bias") is not None:
        return None
    kinds = {dtype_of(value) for value in (rows, weight, end)}
    by_rows = len(shape_of(rows)) == 2 and len(shape_of(weight)) == 3
    if len(kinds) != 1 or not kinds.issubset(DTYPES) or not by_rows:
        return None
    if setting.within_limits and any(known_above(n, WIDTH) for n in shape_of(weight)[1:]):
        return None

    def emit(new: Emitter) -> Sequence[fx.Node]:
        made = new(
            torch.ops.npu.npu_grouped_matmul.default,
            [rows],
            [weight],
            group_list=_as_int64(new, ends),
            split_item=SINGLE_RESULT,
            group_type=BY_ROWS,
            group_list_type=BY_ENDS,
        )
        return [new.part(made, 0)]

    return Found((end,), (), emit)


def _as_int64(new: Emitter, ends: fx.Node) -> fx.Node:
    if dtype_of(ends) is torch.int64:
        return ends
    for user in ends.users:  # the other projection of the same experts has made the cast
        wide = is_call(user, aten._to_copy.default) and user.kwargs == {"dtype": torch.int64}
        if wide and user < new.anchor:
            return user
    return new(aten._to_copy.default, ends, dtype=torch.int64)
