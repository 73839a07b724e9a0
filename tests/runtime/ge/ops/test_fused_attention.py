"""GE's attention ops compute what the torch ops do that become them."""

from __future__ import annotations

import pytest
import torch
from tests.runtime.ge.ops.calls import FLOATS, call, ints, reals
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.runtime.ge.ops.fused_attention import OPS

define_npu_ops()
npu = torch.ops.npu
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_attention(dtype: torch.dtype) -> None:
    q, k, v = (reals(*shape).to(dtype) for shape in ((2, 6, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4)))
    q_rope, k_rope = reals(2, 6, 5, 2).to(dtype), reals(2, 3, 7, 2).to(dtype)
    options = {
        "num_heads": 6,
        "num_key_value_heads": 3,
        "scale": 0.3,
        "input_layout": "BNSD",
        "sparse_mode": 4,
        "pre_tokens": 2,
        "next_tokens": 1,
        "softmax_lse_flag": True,
    }
    tensors = {"atten_mask": TRIANGLE, "query_rope": q_rope, "key_rope": k_rope}
    expected = npu.npu_fused_infer_attention_score(
        q, k, v, **tensors, **options, actual_seq_lengths=[5, 3], actual_seq_lengths_kv=[7, 4]
    )
    inputs = {
        "query": q,
        "key": [k],
        "value": [v],
        "actual_seq_lengths": ints([5, 3]),
        "actual_seq_lengths_kv": ints([7, 4]),
        **tensors,
    }
    zeros = {"inner_precise": 0, "antiquant_mode": 0, "pse_type": 0, "out_dtype": 0}
    same(call(OPS, "FusedInferAttentionScore", inputs, {**options, **zeros}), expected)


def test_fused_attention_over_pages_with_bias_and_sink() -> None:
    q, cache, values = reals(2, 6, 3, 8), reals(6, 4, 24), reals(6, 4, 24, seed=1)
    table = ints([[5, 2], [1, 4]], dtype=torch.int32)
    bias, sink = reals(1, 6, 3, 8), reals(6)
    expected = npu.npu_fused_infer_attention_score_v2(
        q,
        cache,
        values,
        pse_shift=bias,
        learnable_sink=sink,
        block_table=table,
        actual_seq_kvlen=[7, 4],
        num_query_heads=6,
        num_key_value_heads=3,
        input_layout="BNSD",
        block_size=4,
    )
    inputs = {
        "query": q,
        "key": [cache],
        "value": [values],
        "pse_shift": bias,
        "learnable_sink": sink,
        "block_table": table,
        "actual_seq_lengths_kv": ints([7, 4]),
    }
    options = {
        "num_heads": 6,
        "num_key_value_heads": 3,
        "input_layout": "BNSD",
        "block_size": 4,
    }
    same(call(OPS, "FusedInferAttentionScore", inputs, options), expected)


def test_fused_attention_of_defaults() -> None:
    q, k = reals(2, 5, 8), reals(2, 7, 8)
    inputs = {"query": q, "key": [k], "value": [k]}
    found = call(OPS, "FusedInferAttentionScore", inputs, {"num_heads": 1})
    same(found, npu.npu_fused_infer_attention_score(q, k, k))


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ({"quant_scale2": reals(1)}, {}, "quant_scale2=a tensor"),
        ({"q_start_idx": ints([1])}, {}, "q_start_idx=a tensor"),
        ({"key": [reals(1, 7, 8), reals(1, 7, 8)]}, {}, "key=2"),
        ({}, {"out_dtype": 2}, "out_dtype=2"),
        ({}, {"pse_type": 1}, "pse_type=1"),
        ({}, {"sparse_mode": 9}, "sparse_mode=9"),
    ],
)
def test_fused_attention_refuses(
    inputs: dict[str, object], attributes: dict[str, object], message: str
) -> None:
    given = {"query": reals(2, 5, 8), "key": [reals(2, 7, 8)], "value": [reals(2, 7, 8)]}
    with pytest.raises(RolemeshError) as caught:
        call(
            OPS,
            "FusedInferAttentionScore",
            {**given, **inputs},  # type: ignore[dict-item]
            {"num_heads": 1, **attributes},
        )
    assert caught.value.code == "RM028"
    assert f"FusedInferAttentionScore has no reference semantics for {message}" in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS)
def test_lightning_indexer(dtype: torch.dtype) -> None:
    q, k, w = reals(5, 4, 8).to(dtype), reals(6, 4, 1, 8).to(dtype), reals(5, 4)
    tensors = {
        "actual_seq_lengths_query": ints([2, 5], dtype=torch.int32),
        "actual_seq_lengths_key": ints([6, 3], dtype=torch.int32),
        "block_table": ints([[3, 1], [0, 5]], dtype=torch.int32),
    }
    layouts = {"layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": 4}
    expected = npu.npu_lightning_indexer(q, k, w, **tensors, **layouts, return_value=True)
    inputs = {"query": q, "key": k, "weights": w, **tensors}
    limit = 9223372036854775807
    attributes = {"return_values": True, "sparse_mode": 3, "pre_tokens": limit,
                  "next_tokens": limit}  # fmt: skip
    same(call(OPS, "LightningIndexer", inputs, {**layouts, **attributes}), expected)


def test_lightning_indexer_of_defaults() -> None:
    q, k, w = reals(2, 5, 4, 8), reals(2, 7, 1, 8), reals(2, 5, 4)
    inputs = {"query": q, "key": k, "weights": w}
    same(call(OPS, "LightningIndexer", inputs, {}), npu.npu_lightning_indexer(q, k, w))


@pytest.mark.parametrize("dtype", FLOATS)
def test_sparse_flash_attention(dtype: torch.dtype) -> None:
    q, k, v = (reals(*shape).to(dtype) for shape in ((2, 3, 4, 8), (2, 6, 1, 8), (2, 6, 1, 8)))
    tensors = {
        "query_rope": reals(2, 3, 4, 2).to(dtype),
        "key_rope": reals(2, 6, 1, 2).to(dtype),
        "actual_seq_lengths_query": ints([3, 2], dtype=torch.int32),
        "actual_seq_lengths_kv": ints([6, 4], dtype=torch.int32),
        "sinks": reals(4),
    }
    picks = ints([2, 0, 1, -1, 1, 2, 0, 2, 1, 0, -1, -1], dtype=torch.int32).view(2, 3, 1, 2)
    options = {"sparse_block_size": 2, "attention_mode": 2, "return_softmax_lse": True}
    expected = npu.npu_sparse_flash_attention(q, k, v, picks, 0.25, **tensors, **options)
    inputs = {"query": q, "key": k, "value": v, "sparse_indices": picks, **tensors}
    attributes = {"scale_value": 0.25, "sparse_mode": 3, **options}
    same(call(OPS, "SparseFlashAttention", inputs, attributes), expected)


def test_every_op_is_tested() -> None:
    assert set(OPS.ops) == {"FusedInferAttentionScore", "LightningIndexer", "SparseFlashAttention"}
