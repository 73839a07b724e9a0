"""The experts implementation "rolemesh" of `transformers`.

A module of experts becomes one op. What its gate computes is recorded while the module runs, and
given to the op as text; a module that does anything else than the op runs as the library's own
`grouped_mm`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rolemesh.lowering.composite.gate import Recorded

__all__ = ["Experts", "experts_function"]

Experts = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""Takes the module, its hidden states, and the ids and weights of each token's experts."""


def experts_function(otherwise: Experts) -> Experts:
    """How `transformers` computes experts for this implementation.

    Args:
        otherwise: What computes modules that the op cannot express.
    """

    def experts(
        self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Experts of `transformers`, by one op of ours.

        Args:
            self: The module.
            hidden_states: `[N, H]`.
            top_k_index: `[N, k]`, the experts of each token.
            top_k_weights: `[N, k]`, their weights.

        Returns:
            `[N, H]`.
        """
        activation = _activation(self)
        name = "gate_up_proj" if self.has_gate else "up_proj"
        up = getattr(self, name)
        if activation is None or up.dtype != hidden_states.dtype:
            return otherwise(self, hidden_states, top_k_index, top_k_weights)
        up_bias = getattr(self, f"{name}_bias") if self.has_bias else None
        down_bias = self.down_proj_bias if self.has_bias else None
        found: Tensor = torch.ops.rolemesh.experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            up,
            self.down_proj,
            up_bias,
            down_bias,
            activation,
            self.is_transposed,
        )
        return found

    return experts


def _activation(module: nn.Module) -> str | None:
    """What a module of experts computes between its projections; None if it has no such text."""
    if module.has_post_expert_norm:
        return None
    compute: Callable[[Recorded], object] = (
        module._apply_gate if module.has_gate else module.act_fn  # type: ignore[assignment]
    )
    try:
        found = compute(Recorded())
    except (AttributeError, TypeError):  # it does what cannot be recorded
        return None
    if not isinstance(found, Recorded):
        return None
    return found.text if ("rows" in found.text) != bool(module.has_gate) else None
