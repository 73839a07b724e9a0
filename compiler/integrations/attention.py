"""The attention implementation "rolemesh" of `transformers`.

Masks are boolean and explicit, so that a sharded program can cut them by query tokens. None stands
for "every query sees every key", and is given only for a single query or without causality.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["attention", "mask_function"]

_UNKNOWN = ("block_indices", "cache", "sinks")
"""Arguments that change the result and that the op does not have."""


def mask_function(explicit: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """How `transformers` makes masks for this implementation.

    Args:
        explicit: Its function for scaled dot product attention, which leaves a mask out where the
            op's own causal flag stands for it.
    """

    def attention_mask(
        *args: object, q_length: int, allow_is_causal_skip: bool = True, **kwargs: object
    ) -> Tensor | None:
        skip = allow_is_causal_skip and q_length == 1
        return explicit(*args, q_length=q_length, allow_is_causal_skip=skip, **kwargs)

    return attention_mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of `transformers`, by one op of ours.

    Args:
        module: The attention layer.
        query: `[B, H, T, D]`.
        key: `[B, K, S, D]`, where K divides H.
        value: `[B, K, S, V]`.
        attention_mask: Boolean or additive, broadcasts to `[B, H, T, S]`.
        dropout: Has to be zero.
        scaling: Factor of the products; `1 / sqrt(D)` if None.
        is_causal: Whether a query sees no later keys if there is no mask; the module's if None.
        position_bias: Added to the scores.
        indices: `[B, T, k]`, the keys that each query may see.
        s_aux: `[H]`, attention sinks.
        softcap: Soft cap of the scores.
        **kwargs: What other implementations take; those that would change the result are refused.

    Returns:
        The result `[B, T, H, V]`, and no weights.

    Raises:
        RolemeshError: RM018 for arguments that the op does not have.
    """
    _refuse(dropout, indices, softcap, kwargs)
    rows, columns = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = attention_mask
    if mask is None and causal and rows != 1:
        row = torch.arange(rows, device=query.device)[:, None]
        mask = (torch.arange(columns, device=query.device) <= row)[None, None]
    if position_bias is not None:
        mask = _biased(position_bias, mask)
    ops = torch.ops.rolemesh
    if indices is None:
        found = ops.attention(query, key, value, mask, scale, s_aux, softcap or 0.0)
    else:
        found = ops.sparse_attention(query, key, value, indices, mask, scale, s_aux)
    return found, None


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype is torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _refuse(
    dropout: float, indices: Tensor | None, softcap: float | None, kwargs: dict[str, object]
) -> None:
    wanted = {name: kwargs.get(name) is not None for name in _UNKNOWN}
    wanted |= {"dropout": bool(dropout), "softcap": bool(softcap) and indices is not None}
    for name, given in wanted.items():
        if given:
            raise RolemeshError(
                "RM018",
                what=f"attention implementation 'rolemesh' has no argument {name!r}",
                where="attn_implementation of a transformers model",
                why="rolemesh::attention and rolemesh::sparse_attention do not compute it",
                fix="use attn_implementation 'sdpa' or 'eager' for this model",
            )
