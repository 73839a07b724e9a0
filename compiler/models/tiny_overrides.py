"""Sizes of tiny models, as data: which value each configuration field takes.

Three tables, read by `rolemesh.compiler.models.tiny_models` and by nobody else:

- `CURATED`: complete sizes of the types that tests lean on. Within one type all tensor dims
  differ, so that a wrong layout cannot match by accident; heads, key-value heads, experts and
  MLP widths are multiples of 4, so that up to 4 ranks shard them evenly. Expert widths are
  multiples of 8, as `torch._grouped_mm` demands in bf16. `deepseek_v32` is the exception: its
  sizes are those for which the costs of its two output-projection programs were worked out. In
  bf16 it needs the experts implementation `"batched_mm"`.
- `FIELD_CAPS`: for every other type, the largest value an integer field may keep, by field name.
- `OVERRIDES`: what single types need on top of `FIELD_CAPS`. A nested mapping addresses a
  sub-configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = [
    "CURATED",
    "FIELD_CAPS",
    "HEAD_COUNT_FIELDS",
    "KEY_VALUE_HEAD_FIELDS",
    "LAYER_COUNT_FIELDS",
    "OVERRIDES",
]

_LLAMA_LIKE: Final[Mapping[str, object]] = {
    "vocab_size": 251,
    "hidden_size": 72,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 256,
}

CURATED: Final[Mapping[str, Mapping[str, object]]] = {
    "llama": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "qwen3_moe": {
        **_LLAMA_LIKE,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
    },
    "mixtral": {
        **_LLAMA_LIKE,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {
        **_LLAMA_LIKE,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "deepseek_v3": {
        "vocab_size": 251,
        "hidden_size": 72,
        "intermediate_size": 136,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 52,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 20,
        "qk_rope_head_dim": 10,
        "v_head_dim": 14,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "max_position_embeddings": 256,
    },
    "deepseek_v32": {
        "vocab_size": 251,
        "hidden_size": 112,
        "intermediate_size": 68,
        "num_hidden_layers": 7,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "index_n_heads": 8,
        "index_head_dim": 20,
        "index_topk": 8,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 36,
        "max_position_embeddings": 256,
    },
}

LAYER_COUNT_FIELDS: Final[tuple[str, ...]] = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
    "num_blocks",
    "num_global_layers",
)
"""Fields that count layers; the first that a configuration has sizes its per-layer lists."""

HEAD_COUNT_FIELDS: Final[tuple[str, ...]] = ("num_attention_heads", "n_head", "n_heads")
"""Fields that count query heads; the first that a configuration has is compared with the
key-value heads below."""

KEY_VALUE_HEAD_FIELDS: Final[frozenset[str]] = frozenset(
    {
        "num_key_value_heads",
        "num_kv_heads",
        "num_query_groups",
        "swa_num_key_value_heads",
        "num_global_key_value_heads",
    }
)
"""Fields that count key-value heads: as many as query heads where the default has that, else the
cap of `num_key_value_heads`."""

_HIDDEN: Final = 128
_HEADS: Final = 8
_KEY_VALUE_HEADS: Final = 4
_HEAD_DIM: Final = 16
_MLP: Final = 136
_EXPERT_MLP: Final = 40
_EXPERTS: Final = 16
_STATE: Final = 12
_WINDOW: Final = 10
_CHUNK: Final = 8
_POSITIONS: Final = 256
_VOCAB: Final = 251

FIELD_CAPS: Final[Mapping[str, int]] = {
    # Width of the residual stream, and of what must equal it.
    "hidden_size": _HIDDEN,
    "d_model": _HIDDEN,
    "n_embd": _HIDDEN,
    "embed_dim": _HIDDEN,
    "embedding_size": _HIDDEN,
    "attention_hidden_size": _HIDDEN,
    "lru_width": _HIDDEN,
    "input_size": _HIDDEN,
    "out_hidden_size": _HIDDEN,
    "output_channels": _HIDDEN,
    "vision_output_dim": _HIDDEN,
    "projection_dim": _HIDDEN,
    "projector_input_dim": _HIDDEN,
    "projector_output_dim": _HIDDEN,
    "pronunciation_embed_dim": _HIDDEN,
    "shape_embed_dim": _HIDDEN,
    "ext_pw_out_channel": _HIDDEN,
    "nemo_conv_channels": _HIDDEN,
    "depthwise_separable_out_channel": _HIDDEN,
    # Heads.
    "num_attention_heads": _HEADS,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "num_heads": _HEADS,
    "attention_heads": _HEADS,
    "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "swa_num_attention_heads": _HEADS,
    "linear_num_heads": _HEADS,
    "linear_num_value_heads": _HEADS,
    "num_key_value_heads": _KEY_VALUE_HEADS,
    "linear_num_key_heads": _KEY_VALUE_HEADS,
    "index_n_heads": _HEADS,
    "mamba_n_heads": _HEADS,
    "mamba_num_heads": _HEADS,
    # Head dims.
    "head_dim": _HEAD_DIM,
    "global_head_dim": _HEAD_DIM,
    "swa_head_dim": _HEAD_DIM,
    "swa_v_head_dim": _HEAD_DIM,
    "v_head_dim": _HEAD_DIM,
    "kv_channels": _HEAD_DIM,
    "d_kv": _HEAD_DIM,
    "attention_head_dim": _HEAD_DIM,
    "linear_head_dim": _HEAD_DIM,
    "linear_key_head_dim": _HEAD_DIM,
    "linear_value_head_dim": _HEAD_DIM,
    "mamba_d_head": _HEAD_DIM,
    "mamba_head_dim": _HEAD_DIM,
    "index_head_dim": _HEAD_DIM,
    "query_pre_attn_scalar": _HEAD_DIM,
    "qk_nope_head_dim": _HEAD_DIM,
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    # Low-rank projections.
    "q_lora_rank": 52,
    "kv_lora_rank": 44,
    "laurel_rank": 8,
    "adapter_rank": 8,
    "gated_norm_rank": 8,
    "router_hidden_size": 24,
    "hidden_size_per_layer_input": 24,
    # MLP widths.
    "intermediate_size": _MLP,
    "intermediate_size_mlp": _MLP,
    "dense_intermediate_size": _MLP,
    "ffn_dim": _MLP,
    "ffn_hidden_size": _MLP,
    "encoder_ffn_dim": _MLP,
    "decoder_ffn_dim": _MLP,
    "mlp_dim": _MLP,
    "d_ff": _MLP,
    "d_inner": _MLP,
    "moe_intermediate_size": _EXPERT_MLP,
    "shared_intermediate_size": _EXPERT_MLP,
    "shared_expert_intermediate_size": _EXPERT_MLP,
    "moe_shared_expert_intermediate_size": _EXPERT_MLP,
    # Experts.
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "moe_num_experts": _EXPERTS,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    # State-space and recurrent layers.
    "state_size": _STATE,
    "ssm_state_size": _STATE,
    "mamba_d_state": _STATE,
    "mamba_d_ssm": _HEADS * _HEAD_DIM,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "n_groups": 2,
    "chunk_size": _CHUNK,
    "mamba_chunk_size": _CHUNK,
    # Attention spans and positions.
    "sliding_window": _WINDOW,
    "attention_window_size": _WINDOW,
    "local_attention": _WINDOW,
    "attention_chunk_size": _WINDOW,
    "keep_window_size": _WINDOW,
    "window_size": _CHUNK,
    "block_size": _CHUNK,
    "index_topk": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "max_position_embeddings": _POSITIONS,
    "max_target_positions": _POSITIONS,
    "max_source_positions": 64,
    "n_positions": _POSITIONS,
    "n_ctx": _POSITIONS,
    "model_max_length": _POSITIONS,
    "original_max_position_embeddings": 128,
    "floor_scale": 8,
    # Layer patterns that are counted instead of listed.
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "layer_group_size": 2,
    "max_window_layers": 1,
    # Images.
    "image_size": 32,
    "patch_size": 8,
    "mm_tokens_per_image": 4,
    "num_position_embeddings": 64,
    # Vocabularies.
    "vocab_size": _VOCAB,
    "decoder_vocab_size": _VOCAB,
    "audio_vocab_size": _VOCAB,
    "shape_vocab_size": _VOCAB,
    "pronunciation_vocab_size": _VOCAB,
    "vocab_size_per_layer_input": _VOCAB,
    "codebook_size": 64,
}

_DEFAULT_ROPE: Final[Mapping[str, object]] = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONED_ROPE: Final[Mapping[str, object]] = {**_DEFAULT_ROPE, "mrope_section": [2, 3, 3]}

OVERRIDES: Final[Mapping[str, Mapping[str, object]]] = {
    # Mamba heads times their dim must equal mamba_expand * hidden_size, which is 256.
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_head": 32, "mamba_d_ssm": 256},
    "granitemoehybrid": {
        "mamba_d_head": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mamba2": {"num_heads": 16},
    # Fields without a default, which real checkpoints always set.
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "ministral": {
        "head_dim": 16,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "nemotron": {"num_key_value_heads": 4},
    "xmod": {"default_language": "en_XX"},
    # Sizes that are lists, and must fit together.
    "internvl": {"vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
    # Features of this layer of the tower are added in the first layers of the language model.
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0]}},
    "llama4": {"vision_config": {"intermediate_size": 512}},
    "qwen2_vl": {"text_config": {"rope_parameters": _SECTIONED_ROPE}},
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _SECTIONED_ROPE},
        "vision_config": {"window_size": 32},
    },
    "glm4v": {"text_config": {"rope_parameters": _SECTIONED_ROPE}},
    # Fields whose names say little.
    "distilbert": {"dim": 128, "hidden_dim": 136},
    # Six heads by default, which do not divide the tiny hidden size.
    "nanochat": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "whisper": {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
    # Layer patterns that are written in a form of their own.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        # Attention reads the hidden state and the embedding side by side.
        "attention_hidden_size": 256,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    # By default without the layer that gives the architecture its name.
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    # Layers that reuse the key-value cache of an earlier layer of the same kind.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
        ],
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "intermediate_size": [136, 136, 136, 136],
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": _DEFAULT_ROPE,
            "sliding_attention": _DEFAULT_ROPE,
        }
    },
}
