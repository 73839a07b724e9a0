"""Attention masks for rows that each have a length of their own.

`transformers` builds the masks of a cached call from a rule per layer type (causal, sliding,
chunked, ...) and one offset that all rows share. `slot_masks` uses the library's own rules, so that
every architecture gets its own masks, but evaluates them at the place of each token in its slot. It
does so through the library's table of mask builders: the configuration that rules are read from
names `BUILDER_PREFIX` plus the model's attention implementation, and `register_builders` puts that
builder there. The model itself keeps its implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.ir.errors import RolemeshError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

__all__ = [
    "BUILDER_PREFIX",
    "MaskConfig",
    "configuration",
    "mask_configs",
    "register_builders",
    "slot_masks",
]

BUILDER_PREFIX = "rolemesh_slots_"
"""Mask builders of slots are registered as this plus the attention implementation."""

Masks = torch.Tensor | dict[str, torch.Tensor | None] | None
MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def configuration(model: torch.nn.Module) -> PreTrainedConfig:
    """The configuration of the language model of a `transformers` model."""
    config: PreTrainedConfig = model.config
    return config.get_text_config(decoder=True)


class MaskConfig:
    """A configuration as mask rules read it: with our builder, and one type of layers.

    Args:
        config: The configuration of the language model.
        implementation: Its attention implementation.
        layer_type: The type; None if the configuration has no types.
    """

    def __init__(
        self, config: PreTrainedConfig, implementation: str, layer_type: str | None
    ) -> None:
        self._config = config
        self._attn_implementation = BUILDER_PREFIX + implementation
        if layer_type is not None:
            self.layer_types = [layer_type]

    def __getattr__(self, name: str) -> object:
        return getattr(self._config, name)

    def get_text_config(self, **_: object) -> MaskConfig:
        """Itself: it is that of the language model."""
        return self


def register_builders() -> None:
    """Make the mask builders of slots known to `transformers`."""
    from transformers.masking_utils import AttentionMaskInterface

    for implementation, builder in (("sdpa", _boolean_mask), ("eager", _additive_mask)):
        AttentionMaskInterface.register(BUILDER_PREFIX + implementation, builder)


def mask_configs(model: torch.nn.Module) -> tuple[MaskConfig, ...]:
    """Configurations to read mask rules from, one per layer type, in a fixed order.

    Raises:
        RolemeshError: RM018 if the attention implementation takes no prepared mask.
    """
    text = configuration(model)
    implementation = text._attn_implementation or "eager"
    if implementation not in ("sdpa", "eager"):
        raise RolemeshError(
            "RM018",
            f"the engine cannot mask attention implementation {implementation!r}",
            where="rolemesh.Engine",
            why="requests of one batch have lengths of their own, which needs a mask per row",
            fix='load the model with attn_implementation="sdpa" or "eager"',
        )
    # The library goes through layer types as a set, in an order that differs between processes.
    types = sorted(set(getattr(text, "layer_types", None) or ()))
    return tuple(MaskConfig(text, implementation, layer_type) for layer_type in types or [None])


def slot_masks(
    model: torch.nn.Module,
    configs: tuple[MaskConfig, ...],
    dtype: torch.dtype,
    places: torch.Tensor,
    view: Cache,
) -> Masks:
    """The masks of one call, as the model takes them: a tensor, or one by layer type.

    Args:
        model: The model, which may have a mask function of its own.
        configs: What `mask_configs` returned.
        dtype: Data type of the hidden states.
        places: `[batch, tokens]`, where each token is in its slot.
        view: The cache of the call, whose `get_query_offset` is `places`.
    """
    from transformers.masking_utils import create_masks_for_generate

    build = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    # The rules read the batch, the number of tokens and the dtype off the embeddings.
    embeddings = places.unsqueeze(-1).to(dtype)
    by_type: dict[str, torch.Tensor | None] = {}
    for config in configs:
        masks = build(
            config=config,
            inputs_embeds=embeddings,
            attention_mask=None,
            past_key_values=view,
            position_ids=places,
        )
        if not isinstance(masks, Mapping):
            return masks
        by_type.update(masks)
    # Models of nothing but layers with states take no mapping.
    return by_type if any(mask is not None for mask in by_type.values()) else None


def _boolean_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: torch.Tensor,
    mask_function: MaskFunction,
    device: torch.device,
    **_: object,
) -> torch.Tensor:
    """True where a token may attend: `[batch, 1, tokens, length]`. The offset is the places."""
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.arange(1, device=device)[None, :, None, None]
    keys = torch.arange(kv_length, device=device)[None, None, None, :]
    allowed = mask_function(batch, head, q_offset[:, None, :, None], keys)
    return allowed.expand(batch_size, -1, q_length, kv_length)


def _additive_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: torch.Tensor,
    mask_function: MaskFunction,
    device: torch.device,
    dtype: torch.dtype,
    **_: object,
) -> torch.Tensor:
    """Zero where a token may attend and the least value elsewhere."""
    allowed = _boolean_mask(batch_size, q_length, kv_length, q_offset, mask_function, device)
    zero = torch.zeros((), device=device, dtype=dtype)
    return torch.where(allowed, zero, torch.finfo(dtype).min)
