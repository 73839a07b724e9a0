"""The two signatures of fused inference attention; what they compute is in `attention`.

Quantized keys, values and results, padding on the left, and shared prefixes are refused.
`inner_precise` chooses between speed and precision on the device, and changes nothing here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from rolemesh.lowering.npu.attention import UNLIMITED, Attention
from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = ["OPS"]

OPS = NpuOpTable()


def _fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Sequence[int] | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
) -> Attention:
    refuse(
        "npu_fused_infer_attention_score",
        dequant_scale1=dequant_scale1,
        quant_scale1=quant_scale1,
        dequant_scale2=dequant_scale2,
        quant_scale2=quant_scale2,
        quant_offset2=quant_offset2,
        antiquant_scale=antiquant_scale,
        antiquant_offset=antiquant_offset,
        key_antiquant_scale=key_antiquant_scale,
        key_antiquant_offset=key_antiquant_offset,
        value_antiquant_scale=value_antiquant_scale,
        value_antiquant_offset=value_antiquant_offset,
        query_padding_size=query_padding_size,
        kv_padding_size=kv_padding_size,
        key_shared_prefix=key_shared_prefix,
        value_shared_prefix=value_shared_prefix,
        actual_shared_prefix_len=actual_shared_prefix_len,
        key_rope_antiquant_scale=key_rope_antiquant_scale,
        antiquant_mode=antiquant_mode or None,
        key_antiquant_mode=key_antiquant_mode or None,
        value_antiquant_mode=value_antiquant_mode or None,
        inner_precise=None if inner_precise in range(4) else inner_precise,
    )
    return Attention(
        op="npu_fused_infer_attention_score",
        query=query,
        key=key,
        value=value,
        heads=num_heads,
        kv_heads=num_key_value_heads,
        scale=scale,
        layout=input_layout,
        pse_shift=pse_shift,
        mask=atten_mask,
        query_lengths=actual_seq_lengths,
        key_lengths=actual_seq_lengths_kv,
        block_table=block_table,
        query_rope=query_rope,
        key_rope=key_rope,
        sink=None,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        block_size=block_size,
        lse=softmax_lse_flag,
    )


def _fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    dequant_scale_key: Tensor | None = None,
    dequant_offset_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    dequant_offset_value: Tensor | None = None,
    dequant_scale_key_rope: Tensor | None = None,
    quant_scale_out: Tensor | None = None,
    quant_offset_out: Tensor | None = None,
    quant_scale_p: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = UNLIMITED,
    next_tokens: int = UNLIMITED,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    query_dtype: int | None = None,
    key_dtype: int | None = None,
    value_dtype: int | None = None,
    query_rope_dtype: int | None = None,
    key_rope_dtype: int | None = None,
    key_shared_prefix_dtype: int | None = None,
    value_shared_prefix_dtype: int | None = None,
    dequant_scale_query_dtype: int | None = None,
    dequant_scale_key_dtype: int | None = None,
    dequant_scale_value_dtype: int | None = None,
    dequant_scale_key_rope_dtype: int | None = None,
    out_dtype: int | None = None,
) -> Attention:
    refuse(
        "npu_fused_infer_attention_score_v2",
        dequant_scale_query=dequant_scale_query,
        dequant_scale_key=dequant_scale_key,
        dequant_offset_key=dequant_offset_key,
        dequant_scale_value=dequant_scale_value,
        dequant_offset_value=dequant_offset_value,
        dequant_scale_key_rope=dequant_scale_key_rope,
        quant_scale_out=quant_scale_out,
        quant_offset_out=quant_offset_out,
        quant_scale_p=quant_scale_p,
        query_quant_mode=query_quant_mode or None,
        key_quant_mode=key_quant_mode or None,
        value_quant_mode=value_quant_mode or None,
        inner_precise=None if inner_precise in range(4) else inner_precise,
        query_dtype=query_dtype,
        key_dtype=key_dtype,
        value_dtype=value_dtype,
        query_rope_dtype=query_rope_dtype,
        key_rope_dtype=key_rope_dtype,
        key_shared_prefix_dtype=key_shared_prefix_dtype,
        value_shared_prefix_dtype=value_shared_prefix_dtype,
        dequant_scale_query_dtype=dequant_scale_query_dtype,
        dequant_scale_key_dtype=dequant_scale_key_dtype,
        dequant_scale_value_dtype=dequant_scale_value_dtype,
        dequant_scale_key_rope_dtype=dequant_scale_key_rope_dtype,
        out_dtype=out_dtype,
    )
    return Attention(
        op="npu_fused_infer_attention_score_v2",
        query=query,
        key=key,
        value=value,
        heads=num_query_heads,
        kv_heads=num_key_value_heads,
        scale=softmax_scale,
        layout=input_layout,
        pse_shift=pse_shift,
        mask=atten_mask,
        query_lengths=actual_seq_qlen,
        key_lengths=actual_seq_kvlen,
        block_table=block_table,
        query_rope=query_rope,
        key_rope=key_rope,
        sink=learnable_sink,
        sparse_mode=sparse_mode,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        block_size=block_size,
        lse=return_softmax_lse,
    )


def _then(
    call: Callable[..., Attention], step: Callable[[Attention], tuple[Tensor, Tensor]]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """A step of the call, as a function of the op's arguments."""

    @functools.wraps(call)
    def function(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        return step(call(*args, **kwargs))

    return function


def _enter(name: str, call: Callable[..., Attention], arguments: str) -> None:
    OPS.op(
        f"{name}({arguments}) -> (Tensor, Tensor)",
        ge="FusedInferAttentionScore",
        shape=_then(call, Attention.result),
    )(_then(call, Attention.run))


_enter(
    "npu_fused_infer_attention_score",
    _fused_infer_attention_score,
    "Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, Tensor? atten_mask=None,"
    " SymInt[]? actual_seq_lengths=None, SymInt[]? actual_seq_lengths_kv=None,"
    " Tensor? dequant_scale1=None, Tensor? quant_scale1=None, Tensor? dequant_scale2=None,"
    " Tensor? quant_scale2=None, Tensor? quant_offset2=None, Tensor? antiquant_scale=None,"
    " Tensor? antiquant_offset=None, Tensor? key_antiquant_scale=None,"
    " Tensor? key_antiquant_offset=None, Tensor? value_antiquant_scale=None,"
    " Tensor? value_antiquant_offset=None, Tensor? block_table=None,"
    " Tensor? query_padding_size=None, Tensor? kv_padding_size=None,"
    " Tensor? key_shared_prefix=None, Tensor? value_shared_prefix=None,"
    " SymInt[]? actual_shared_prefix_len=None, Tensor? query_rope=None, Tensor? key_rope=None,"
    " Tensor? key_rope_antiquant_scale=None, int num_heads=1, float scale=1.0,"
    " int pre_tokens=2147483647, int next_tokens=2147483647, str input_layout='BSH',"
    " int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0,"
    " int antiquant_mode=0, int key_antiquant_mode=0, int value_antiquant_mode=0,"
    " bool softmax_lse_flag=False",
)
_enter(
    "npu_fused_infer_attention_score_v2",
    _fused_infer_attention_score_v2,
    "Tensor query, Tensor key, Tensor value, *, Tensor? query_rope=None, Tensor? key_rope=None,"
    " Tensor? pse_shift=None, Tensor? atten_mask=None, SymInt[]? actual_seq_qlen=None,"
    " SymInt[]? actual_seq_kvlen=None, Tensor? block_table=None,"
    " Tensor? dequant_scale_query=None, Tensor? dequant_scale_key=None,"
    " Tensor? dequant_offset_key=None, Tensor? dequant_scale_value=None,"
    " Tensor? dequant_offset_value=None, Tensor? dequant_scale_key_rope=None,"
    " Tensor? quant_scale_out=None, Tensor? quant_offset_out=None, Tensor? quant_scale_p=None,"
    " Tensor? learnable_sink=None, int num_query_heads=1, int num_key_value_heads=0,"
    " float softmax_scale=1.0, int pre_tokens=2147483647, int next_tokens=2147483647,"
    " str input_layout='BSH', int sparse_mode=0, int block_size=0, int query_quant_mode=0,"
    " int key_quant_mode=0, int value_quant_mode=0, int inner_precise=0,"
    " bool return_softmax_lse=False, int? query_dtype=None, int? key_dtype=None,"
    " int? value_dtype=None, int? query_rope_dtype=None, int? key_rope_dtype=None,"
    " int? key_shared_prefix_dtype=None, int? value_shared_prefix_dtype=None,"
    " int? dequant_scale_query_dtype=None, int? dequant_scale_key_dtype=None,"
    " int? dequant_scale_value_dtype=None, int? dequant_scale_key_rope_dtype=None,"
    " int? out_dtype=None",
)
