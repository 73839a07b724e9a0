"""Fused attention with given results, which capture mode calls in its place."""

from __future__ import annotations

import pytest
import torch

from rolemesh.lowering.npugraph.static_attention import define_static_attention


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("npu_fused_infer_attention_score", "num_heads"),
        ("npu_fused_infer_attention_score_v2", "num_query_heads"),
    ],
)
def test_results_are_put_where_they_belong(name: str, heads: str) -> None:
    define_static_attention()
    define_static_attention()
    op = getattr(torch.ops.npu, name)
    query, key, value = torch.randn(3, 2, 4, 3, 16, dtype=torch.bfloat16)
    options = {heads: 4, "input_layout": "BNSD"}
    want = op(query, key, value, **options)
    workspace = getattr(torch.ops.npu, f"_{name}_get_max_workspace")(query, key, value, **options)
    assert workspace.device == query.device
    out = [torch.full_like(tensor, 9) for tensor in want]
    got = op.out(query, key, value, **options, workspace=workspace, out=out)
    for given, found, expected in zip(out, got, want, strict=True):
        assert found.data_ptr() == given.data_ptr()
        assert torch.equal(given, expected)
