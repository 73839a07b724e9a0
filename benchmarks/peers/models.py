"""What every peer computes: the models on one device, their calls, and what those must give.

Invariants:

* Weights, caches and ids depend on the name and the seed alone, so all ranks and all peers have the
  same.
* A call can be repeated: `rewind` puts the cache's length back, and the call writes the same rows
  to the same places again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, StaticCache

from rolemesh.compiler.models.cases import static_cache

__all__ = ["MODELS", "Call", "Model", "build", "cache_of", "reference", "rewind"]


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
        batch: Number of sequences.
        tokens: New tokens of each.
        cache: Capacity of the cache, in tokens; the new ones are its last.
    """

    batch: int
    tokens: int
    cache: int

    @property
    def start(self) -> int:
        """Position of the first new token."""
        return self.cache - self.tokens

    def ids(self, vocabulary: int) -> torch.Tensor:
        """The new tokens, `[batch, tokens]`."""
        generator = torch.Generator().manual_seed(7)
        return torch.randint(0, vocabulary, (self.batch, self.tokens), generator=generator)


@dataclass(frozen=True)
class Model:
    """A type of `transformers`, its configuration, and its calls by phase."""

    kind: str
    fields: Mapping[str, object]
    calls: Mapping[str, Call]


_NO_SPECIAL_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_GROUPED_HEADS = {
    **_NO_SPECIAL_TOKENS,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
_SHORT = {"prefill": Call(1, 512, 512), "decode": Call(8, 1, 512)}
MODELS: Mapping[str, Model] = {
    "llama": Model(
        "llama", {**_GROUPED_HEADS, "num_hidden_layers": 6, "intermediate_size": 1408}, _SHORT
    ),
    "qwen3_moe": Model(
        "qwen3_moe",
        {
            **_GROUPED_HEADS,
            "num_hidden_layers": 4,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 704,
            "norm_topk_prob": True,
        },
        _SHORT,
    ),
    "deepseek_v32": Model(
        "deepseek_v32",
        {
            **_NO_SPECIAL_TOKENS,
            "hidden_size": 512,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": 384,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "index_n_heads": 4,
            "index_head_dim": 128,
            "index_topk": 256,
            "intermediate_size": 1408,
            "moe_intermediate_size": 352,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "vocab_size": 4096,
            "max_position_embeddings": 8192,
        },
        {"prefill": Call(1, 1024, 4096), "decode": Call(4, 1, 4096)},
    ),
}
"""Models by name."""


def build(name: str, ops: str | None = None) -> PreTrainedModel:
    """The model with random weights, in fp32.

    Args:
        name: Its name.
        ops: Implementation of attention and experts; by default those of transformers.
    """
    model = MODELS[name]
    given = {} if ops is None else {"attn_implementation": ops, "experts_implementation": ops}
    config = CONFIG_MAPPING[model.kind](**model.fields)
    made = AutoModelForCausalLM.from_config(config, **given).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0, 0.1, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return made


def cache_of(model: PreTrainedModel, call: Call, rank: int = 0, ranks: int = 1) -> StaticCache:
    """A cache filled with random rows.

    Args:
        model: The whole model.
        call: The call it is for.
        rank: Which chunk of the key and value heads it keeps.
        ranks: Number of chunks.
    """
    cache = static_cache(model, 1, call.cache)  # runs the model, which takes long for many
    generator = torch.Generator().manual_seed(5)
    for layer in cache.layers:
        kept = {name: value for name, value in vars(layer).items() if _is_kept(value)}
        for name, value in kept.items():
            rows = value.new_empty(call.batch, *value.shape[1:]).normal_(generator=generator)
            is_split = ranks > 1 and name in ("keys", "values")
            setattr(layer, name, rows.chunk(ranks, 1)[rank].clone() if is_split else rows)
    return cache


def _is_kept(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 1


def rewind(cache: StaticCache, call: Call) -> None:
    """Set the cache's lengths to what they are before the call."""
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, torch.Tensor) and value.ndim == 0:
                value.fill_(call.start)


def reference(name: str, phase: str) -> torch.Tensor:
    """The last token's logits on one device, uncompiled: `[batch, 1, vocabulary]`."""
    model, call = build(name), MODELS[name].calls[phase]
    cache = cache_of(model, call)
    rewind(cache, call)
    ids = call.ids(model.config.vocab_size)
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
