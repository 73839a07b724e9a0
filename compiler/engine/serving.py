"""The module that an engine compiles: a model together with slots and masks.

Its arguments are tensors of one call and the cache tensors; what else a call depends on (whether
requests are fresh, which logits are wanted) are plain values, each combination a program of its
own.
"""

from __future__ import annotations

import inspect

import torch

from rolemesh.compiler.engine.cache import Batch, Tables
from rolemesh.compiler.engine.masks import mask_configs, register_builders, slot_masks

__all__ = ["ServingModel"]


class ServingModel(torch.nn.Module):
    """A causal language model over slots.

    Args:
        model: The model, unmodified.
        max_len: Tokens a slot can hold.
    """

    def __init__(self, model: torch.nn.Module, max_len: int) -> None:
        from rolemesh.compiler.engine.view import SlotView, cache_layers
        from rolemesh.compiler.models.cases import cache_argument

        super().__init__()
        register_builders()
        self.model = model
        self.max_len = max_len
        self.layers = cache_layers(model, max_len)
        self.view = SlotView
        self.cache_argument = cache_argument(model, "rolemesh.Engine")
        self.arguments = frozenset(inspect.signature(model.forward).parameters)
        self.mask_configs = mask_configs(model)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def forward(
        self,
        token_ids: torch.Tensor,
        position_ids: torch.Tensor,
        places: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
        tables: Tables,
        fresh: bool,
        last: bool,
    ) -> torch.Tensor:
        """Run the model on one batch.

        Args:
            token_ids: As in `Batch`.
            position_ids: As in `Batch`.
            places: As in `Batch`.
            rows: As in `Batch`.
            slots: As in `Batch`.
            tables: The cache tensors; they get the batch's keys, values and states.
            fresh: Whether all requests are at their start.
            last: Whether only the last token's logits are wanted.

        Returns:
            Logits `[batch, tokens or 1, vocabulary]`.
        """
        batch = Batch(token_ids, position_ids, places, rows, slots)
        view = self.view(self.layers, tables, batch, self.max_len, fresh)
        masks = slot_masks(self.model, self.mask_configs, self.dtype, places, view)
        optional: dict[str, object] = {"position_ids": position_ids, "attention_mask": masks}
        if last:
            optional["logits_to_keep"] = 1
        known = {name: value for name, value in optional.items() if name in self.arguments}
        known[self.cache_argument] = view
        logits = self.model(token_ids, use_cache=True, **known).logits
        view.commit()
        return logits[:, -1:] if last else logits
