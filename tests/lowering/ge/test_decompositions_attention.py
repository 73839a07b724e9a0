"""Fused attention and matmuls over groups equal the eager kernels, in every form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tests.lowering.ge.numerics import (
    FLOATS,
    HALF,
    ONE,
    Case,
    check_dynamic,
    check_static,
    parametrize,
    parametrize_dynamic,
    tensor,
)
from torch import Tensor
from torch.nn import functional

from rolemesh.lowering.ge.decompositions_attention import ATTENTION as DECOMPOSITIONS

aten = torch.ops.aten

SEEN = torch.ones(7, 9, dtype=torch.bool).tril(1)
BLIND = SEEN & (torch.arange(7) != 2).unsqueeze(-1)  # row 2 sees nothing


def flash(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, **options)


def added(mask: Tensor, x: Tensor) -> Tensor:
    return torch.where(mask, 0.0, -math.inf).to(x.dtype)


def attention(
    shapes: str,
    dtypes: Sequence[torch.dtype] = ONE,
    mask: Tensor | None = None,
    dynamic: bool = False,
    **options: object,
) -> Case:
    """The CPU's fused attention, with its log-sum-exp."""

    def function(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Sequence[Tensor]:
        given = {"attn_mask": added(masks[0], q)} if masks else {}
        return flash(q, k, v, **given, **options)

    return Case(function, shapes, dtypes, dynamic, () if mask is None else (mask,), reorder=False)


FORMS = "2 4 7 8; 2 4 9 8; 2 4 9 8"
GROUPED = "2 6 7 8; 2 2 9 8; 2 2 9 8"
sdpa = functional.scaled_dot_product_attention

ATTENTION = {
    "plain": attention("2 4 n 8; 2 4 9 8; 2 4 9 8", HALF, dynamic=True),
    "causal": attention(FORMS, FLOATS, is_causal=True),
    "causal_dynamic": attention("2 4 n 8; 2 4 n 8; 2 4 n 8", is_causal=True, dynamic=True),
    "scale": attention(FORMS, scale=0.3),
    "mask": attention(FORMS, HALF, SEEN),
    "mask_for_each_head": attention(FORMS, ONE, tensor(torch.bool, 2, 4, 7, 9)),
    "mask_hides_a_row": attention(FORMS, FLOATS, BLIND),
    "groups": attention(GROUPED, FLOATS),
    "groups_mask": attention(GROUPED, ONE, SEEN),
    "one_row": attention("2 4 1 8; 2 4 n 8; 2 4 n 8", FLOATS, dynamic=True),
    "boolean_mask": Case(sdpa, FORMS, FLOATS, False, (BLIND,)),
    "math": Case(sdpa, "4 7 8; 4 9 8; 4 9 8", FLOATS, False, (BLIND,)),  # no fused kernel
}


@parametrize(ATTENTION)
def test_attention(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(ATTENTION)
def test_attention_dynamic(case: Case) -> None:
    check_dynamic(case)


def test_fused_forms_of_other_devices() -> None:
    """They have no kernel here, so their decompositions are called and compared with the CPU's."""
    q, k, v = Case(list, FORMS).inputs(torch.float32, 0)
    bias = added(SEEN, q)
    on_cuda = DECOMPOSITIONS[aten._scaled_dot_product_flash_attention.default]
    found = on_cuda(q, k, v, 0.0, True)
    torch.testing.assert_close(found[:2], flash(q, k, v, is_causal=True))
    assert len(found) == 9
    efficient = DECOMPOSITIONS[aten._scaled_dot_product_efficient_attention.default]
    found = efficient(q, k, v, bias, False, scale=0.5)
    torch.testing.assert_close(found[0], flash(q, k, v, attn_mask=bias, scale=0.5)[0])
    assert len(found) == 4
    overrideable = DECOMPOSITIONS[aten._scaled_dot_product_fused_attention_overrideable.default]
    found = overrideable(q, k, v, bias)
    torch.testing.assert_close(found[:2], flash(q, k, v, attn_mask=bias))
    assert len(found) == 9


def test_dropout_is_left_alone() -> None:
    x = tensor(torch.float32, 2, 4, 7, 8)
    for op, function in DECOMPOSITIONS.items():
        if op is not aten._grouped_mm.default:
            bias = (None, False) if "efficient" in str(op) else ()
            assert function(x, x, x, *bias, dropout_p=0.5) is NotImplemented


ENDS = torch.tensor([4, 4, 9], dtype=torch.int32)  # one group is empty
WHOLE = torch.tensor([4, 4, 16], dtype=torch.int32)  # eager wants rows of a multiple of 16 bytes
BF16 = (torch.bfloat16,)


def grouped(*operands: Tensor) -> Tensor:
    return torch._grouped_mm(*operands)


def fallback(*operands: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(*operands)


GROUPED_MM = {
    "rows": Case(grouped, "9 16; 3 16 24", BF16, False, (ENDS,), reorder=False),
    "columns": Case(grouped, "3 8 16; 16 16", BF16, False, (WHOLE,), reorder=False),
    "inner": Case(grouped, "8 16; 16 24", BF16, False, (WHOLE,), reorder=False),
    "batches": Case(grouped, "3 8 16; 3 16 24", BF16, reorder=False),
    "fallback": Case(fallback, "9 5; 3 5 7", FLOATS, False, (ENDS,)),
    "fallback_dynamic": Case(fallback, "n 5; 3 5 7", ONE, True, (torch.tensor([2, 5, 11]),)),
    "fallback_rows_left": Case(fallback, "12 5; 3 5 7", ONE, False, (ENDS,)),
}


@pytest.fixture(autouse=True)
def _transformers() -> None:
    """Defines the op of `transformers`."""
    pytest.importorskip("transformers.integrations.moe")


@parametrize(GROUPED_MM)
def test_grouped_mm(case: Case, dtype: torch.dtype) -> None:
    check_static(case, dtype)


@parametrize_dynamic(GROUPED_MM)
def test_grouped_mm_dynamic(case: Case) -> None:
    check_dynamic(case)
