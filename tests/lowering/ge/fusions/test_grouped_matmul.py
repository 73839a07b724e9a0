"""Products of groups of rows, and the other forms of `_grouped_mm`, which stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, graph_text, hits
from torch import Tensor

BF16, F32 = torch.bfloat16, torch.float32
grouped_mm = torch.ops.aten._grouped_mm.default
ENDS = torch.tensor([3, 3, 9, 11], dtype=torch.int32)


def operands(dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    return f(11, 16, dtype=dtype), f(4, 16, 24, dtype=dtype)


def test_rows_by_groups() -> None:
    assert hits(grouped_mm, *operands(), ENDS) == {"grouped_matmul": 1}
    even = torch.tensor([0, 0, 11, 11], dtype=torch.int32)
    assert hits(grouped_mm, *operands(), even) == {"grouped_matmul": 1}


def test_rows_after_the_last_group_are_free() -> None:
    forms = both_forms(grouped_mm, *operands(), ENDS)
    ends = torch.tensor([3, 3, 5, 7], dtype=torch.int32)
    before, after = (form(*operands(), ends) for form in forms[:2])
    torch.testing.assert_close(after[:7], before[:7])


def test_transposed_weights() -> None:
    def experts(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, w.transpose(1, 2), ends)

    x, w = f(11, 16, dtype=BF16), f(4, 24, 16, dtype=BF16)
    assert hits(experts, x, w, ENDS) == {"grouped_matmul": 1}


def test_ends_are_cast_once_for_all_projections_of_the_experts() -> None:
    def experts(x: Tensor, up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(grouped_mm(x, up, ends), down, ends)

    x, up, down = *operands(), f(4, 24, 8, dtype=BF16)
    assert hits(experts, x, up, down, ENDS) == {"grouped_matmul": 2}
    text = graph_text(both_forms(experts, x, up, down, ENDS).after.graph)
    assert text.count("= _to_copy") == 1


def test_other_forms_stay() -> None:
    x, w = operands()
    columns = torch.tensor([8, 24], dtype=torch.int32)
    three = f(2, 8, 16, dtype=BF16)
    assert not any(both_forms(grouped_mm, three, f(16, 24, dtype=BF16), columns).made.values())
    assert not any(both_forms(grouped_mm, x.t()[:, :8], w[0, :8], columns[:1]).made.values())
    assert not any(both_forms(grouped_mm, three, f(2, 16, 8, dtype=BF16)).made.values())


@pytest.mark.parametrize(("inner", "outer"), [(16, 65544), (65544, 8)])
def test_documented_sizes(inner: int, outer: int) -> None:
    given = (torch.zeros(2, inner, dtype=BF16), torch.zeros(1, inner, outer, dtype=BF16))
    ends = torch.tensor([2], dtype=torch.int32)
    assert not any(both_forms(grouped_mm, *given, ends).made.values())
    forms = both_forms(grouped_mm, *given, ends, within_limits=False)
    assert forms.made["npu_grouped_matmul"] == 1


def test_text(golden: Callable[[str, str], None]) -> None:
    forms = both_forms(grouped_mm, *operands(), ENDS)
    before, after = graph_text(forms.before.graph), graph_text(forms.after.graph)
    golden("grouped_matmul", f"{before}\n\n-- fused\n\n{after}")
