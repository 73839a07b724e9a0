"""GE's attention ops, by the references of the ops that become them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rolemesh.lowering.npu import sparse_attention
from rolemesh.lowering.npu.attention import UNLIMITED, Attention
from rolemesh.lowering.npu.table import refuse
from rolemesh.runtime.ge.ops.table import Attributes, OpTable

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("FusedInferAttentionScore", dynamic=("key", "value"), equal=("query", "key", "value"))
def fused_infer_attention_score(
    a: Attributes,
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    q_start_idx: Tensor | None = None,
    kv_start_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fused attention; both of torch_npu's versions become this op."""
    refuse(
        "FusedInferAttentionScore",
        dequant_scale1=dequant_scale1,
        quant_scale1=quant_scale1,
        dequant_scale2=dequant_scale2,
        quant_scale2=quant_scale2,
        quant_offset2=quant_offset2,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        query_padding_size=query_padding_size,
        kv_padding_size=kv_padding_size,
        key_antiquant_scale=key_antiquant_scale,
        key_antiquant_offset=key_antiquant_offset,
        value_antiquant_scale=value_antiquant_scale,
        value_antiquant_offset=value_antiquant_offset,
        key_shared_prefix=key_shared_prefix,
        value_shared_prefix=value_shared_prefix,
        actual_shared_prefix_len=actual_shared_prefix_len,
        key_rope_antiquant_scale=key_rope_antiquant_scale,
        dequant_scale_query=dequant_scale_query,
        q_start_idx=q_start_idx,
        kv_start_idx=kv_start_idx,
        key=None if len(key) == 1 else len(key),
        value=None if len(value) == 1 else len(value),
        **{name: a.int(name, 0) or None for name in _UNUSED},
    )
    return Attention(
        op="FusedInferAttentionScore",
        query=query,
        key=key[0],
        value=value[0],
        heads=a.int("num_heads"),
        kv_heads=a.int("num_key_value_heads", 0),
        scale=a.float("scale", 1.0),
        layout=a.str("input_layout", "BSH"),
        pse_shift=pse_shift,
        mask=atten_mask,
        query_lengths=actual_seq_lengths,
        key_lengths=actual_seq_lengths_kv,
        block_table=block_table,
        query_rope=query_rope,
        key_rope=key_rope,
        sink=learnable_sink,
        sparse_mode=a.int("sparse_mode", 0),
        pre_tokens=a.int("pre_tokens", UNLIMITED),
        next_tokens=a.int("next_tokens", UNLIMITED),
        block_size=a.int("block_size", 0),
        lse=a.bool("softmax_lse_flag", False),
    ).run()


_UNUSED = (
    "antiquant_mode",
    "key_antiquant_mode",
    "value_antiquant_mode",
    "query_quant_mode",
    "pse_type",
    "out_dtype",
)
"""Attributes that have to be 0: they belong to quantized operands and other position biases."""


@OPS.op("LightningIndexer", equal=("query", "key"))
def lightning_indexer(
    a: Attributes,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The keys with the largest scores."""
    return sparse_attention.lightning_indexer(
        query,
        key,
        weights,
        actual_seq_lengths_query=actual_seq_lengths_query,
        actual_seq_lengths_key=actual_seq_lengths_key,
        block_table=block_table,
        layout_query=a.str("layout_query", "BSND"),
        layout_key=a.str("layout_key", "BSND"),
        sparse_count=a.int("sparse_count", 2048),
        sparse_mode=a.int("sparse_mode", 3),
        pre_tokens=a.int("pre_tokens", sparse_attention.UNLIMITED),
        next_tokens=a.int("next_tokens", sparse_attention.UNLIMITED),
        return_value=a.bool("return_values", False),
    )


@OPS.op("SparseFlashAttention", equal=("query", "key", "value", "query_rope", "key_rope"))
def sparse_flash_attention(
    a: Attributes,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_indices: Tensor,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the keys that were picked."""
    return sparse_attention.sparse_flash_attention(
        query,
        key,
        value,
        sparse_indices,
        a.float("scale_value"),
        block_table=block_table,
        actual_seq_lengths_query=actual_seq_lengths_query,
        actual_seq_lengths_kv=actual_seq_lengths_kv,
        query_rope=query_rope,
        key_rope=key_rope,
        sparse_block_size=a.int("sparse_block_size", 1),
        layout_query=a.str("layout_query", "BSND"),
        layout_kv=a.str("layout_kv", "BSND"),
        sparse_mode=a.int("sparse_mode", 3),
        pre_tokens=a.int("pre_tokens", sparse_attention.UNLIMITED),
        next_tokens=a.int("next_tokens", sparse_attention.UNLIMITED),
        attention_mode=a.int("attention_mode", 0),
        return_softmax_lse=a.bool("return_softmax_lse", False),
        sinks=sinks,
    )
