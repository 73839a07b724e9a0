"""Writes to caches: by index, and by slots of pages.

A slot is `block * block_size + token in block`; a negative one is skipped, and the token it belongs
to is not stored. No slot may come twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = ["OPS", "scatter_nd_update_", "scatter_pa_kv_cache", "store"]

OPS = NpuOpTable()


def _scatter_nd_update_shape(
    input: Tensor,  # noqa: A002
    indices: Tensor,
    updates: Tensor,
) -> Tensor:
    width = indices.shape[-1]
    wanted = [*indices.shape[:-1], *input.shape[width:]]
    torch._check(
        indices.dim() >= 2 and width <= input.dim() and list(updates.shape) == wanted,
        lambda: f"updates {list(updates.shape)} at {list(indices.shape)} of {list(input.shape)}",
    )
    torch._check(
        updates.dtype == input.dtype, lambda: f"updates of {updates.dtype} into {input.dtype}"
    )
    return input


@OPS.op(
    "npu_scatter_nd_update_(Tensor(a!) input, Tensor indices, Tensor updates) -> Tensor(a!)",
    ge="ScatterNdUpdate",
    shape=_scatter_nd_update_shape,
    functional="npu_scatter_nd_update(Tensor input, Tensor indices, Tensor updates) -> Tensor",
)
def scatter_nd_update_(
    input: Tensor,  # noqa: A002
    indices: Tensor,
    updates: Tensor,
) -> Tensor:
    """`input[indices[..., 0], indices[..., 1], ...] = updates`; indices count from the front."""
    _scatter_nd_update_shape(input, indices, updates)
    where = indices.long().unbind(-1)
    for dim, found in enumerate(where):
        if found.numel():
            low, high = int(found.min()), int(found.max())
            torch._check_index(
                low >= 0 and high < input.shape[dim],
                lambda: f"indices {low} to {high} in a dim of {input.shape[dim]}",  # noqa: B023
            )
    input[where] = updates
    return input


def store(blocks: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """Write tokens to their slots.

    Args:
        blocks: `[blocks, block_size, ...]`, changed in place.
        slots: `[n]`, negative for tokens that are not stored.
        tokens: `[n, ...]`, with as many elements per token as a slot has.
    """
    kept = slots >= 0
    slots, size = slots[kept].long(), blocks.shape[1]
    found = tokens[kept].reshape(-1, *blocks.shape[2:])
    blocks[slots // size, slots % size] = found.to(blocks.dtype)


def _check_scatter_pa(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    cache_mode: str | None,
    **compressed: Tensor | None,
) -> None:
    op = "npu_scatter_pa_kv_cache"
    refuse(op, **compressed)
    known = cache_mode in (None, "Norm", "PA_NZ")
    refuse(op, cache_mode=None if known else cache_mode)
    refuse(op, "for each head its own slots", key=None if key.dim() == 3 else key)
    for tokens, cache in ((key, key_cache), (value, value_cache)):
        _check_pages(tokens, cache, slot_mapping, cache_mode == "PA_NZ")


def _check_pages(tokens: Tensor, cache: Tensor, slots: Tensor, fractal: bool) -> None:
    torch._check(
        cache.dim() == 4 and slots.shape == tokens.shape[:1] and cache.dtype == tokens.dtype,
        lambda: (
            f"tokens {list(tokens.shape)}, slots {list(slots.shape)}, cache {list(cache.shape)}"
        ),
    )
    heads, width = tokens.shape[1:]
    fits = list(cache.shape[2:]) == [heads, width]
    if fractal:
        fits = cache.shape[1] * cache.shape[3] == heads * width
    torch._check(fits, lambda: f"tokens {list(tokens.shape)} for a cache of {list(cache.shape)}")


def _scatter_pa_kv_cache_shape(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    _check_scatter_pa(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        cache_mode,
        compress_lens=compress_lens,
        compress_seq_offsets=compress_seq_offsets,
        seq_lens=seq_lens,
    )


_SCATTER_PA = (
    "Tensor slot_mapping, *, Tensor? compress_lens=None, Tensor? compress_seq_offsets=None,"
    " Tensor? seq_lens=None, str? cache_mode='PA_NZ'"
)


@OPS.op(
    "npu_scatter_pa_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache,"
    f" Tensor(b!) value_cache, {_SCATTER_PA}) -> ()",
    ge="ScatterPaKvCache",
    shape=_scatter_pa_kv_cache_shape,
    functional="npu_scatter_pa_kv_cache_functional(Tensor key, Tensor value, Tensor key_cache,"
    f" Tensor value_cache, {_SCATTER_PA}) -> (Tensor, Tensor)",
)
def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Store the keys and values `[tokens, N, D]` of tokens at their slots.

    The caches are `[blocks, block_size, N, D]` in mode `Norm`, which None stands for, and
    `[blocks, N * D / c, block_size, c]` in mode `PA_NZ`.
    """
    _scatter_pa_kv_cache_shape(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        compress_lens=compress_lens,
        compress_seq_offsets=compress_seq_offsets,
        seq_lens=seq_lens,
        cache_mode=cache_mode,
    )
    for tokens, cache in ((key, key_cache), (value, value_cache)):
        store(cache.transpose(1, 2) if cache_mode == "PA_NZ" else cache, slot_mapping, tokens)
