"""GE's fused cache writes, by the references of the ops that become them.

All change their caches in place. `npu_scatter_nd_update` becomes ScatterNdUpdate, which other ops
become too; it is in `scatter`.
"""

from __future__ import annotations

from torch import Tensor

from rolemesh.lowering.npu import caches, mla_cache
from rolemesh.lowering.npu.table import refuse
from rolemesh.runtime.ge.ops.table import Attributes, OpTable

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op(
    "ScatterPaKvCache",
    equal=("key", "key_cache", "value", "value_cache"),
    writes={0: "key_cache", 1: "value_cache"},
)
def scatter_pa_kv_cache(
    a: Attributes,
    key: Tensor,
    key_cache: Tensor,
    slot_mapping: Tensor,
    value: Tensor,
    value_cache: Tensor,
    compress_lens: Tensor | None = None,
    compress_seq_offset: Tensor | None = None,
    seq_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Store keys and values at their slots."""
    mode = a.str("scatter_mode", "None")
    refuse("ScatterPaKvCache", scatter_mode=None if mode == "None" else mode)
    caches.scatter_pa_kv_cache(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        compress_lens=compress_lens,
        compress_seq_offsets=compress_seq_offset,
        seq_lens=seq_lens,
        cache_mode=a.str("cache_mode", "Norm"),
    )
    return key_cache, value_cache


@OPS.op(
    "KvRmsNormRopeCache",
    equal=("kv", "gamma", "cos", "sin", "v"),
    writes={0: "k_cache", 1: "ckv_cache"},
)
def kv_rms_norm_rope_cache(
    a: Attributes,
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm the latent, rotate the key, and store both."""
    return mla_cache.kv_rmsnorm_rope_cache(
        kv,
        gamma,
        cos,
        sin,
        index,
        k_cache,
        ckv_cache,
        k_rope_scale=k_rope_scale,
        c_kv_scale=c_kv_scale,
        k_rope_offset=k_rope_offset,
        c_kv_offset=c_kv_offset,
        v=v,
        epsilon=a.float("epsilon", 1e-5),
        cache_mode=a.str("cache_mode", "Norm"),
        is_output_kv=a.bool("is_output_kv", False),
    )
