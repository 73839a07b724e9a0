"""Norm, rotary embedding and cache write of MLA in one op.

The caches take the latent after its norm, and the key after its rotation. A slot of a paged cache
is `block * block_size + token in block`; a negative one is skipped. A cache in fractal form (`NZ`)
holds each block as `[N * D / c, block_size, c]` with c elements of 32 bytes, whatever shape the
tensor shows.

torch_npu's `npu_kv_rmsnorm_rope_cache` writes to its caches although its schema does not say so.
Here it is captured as its functional variant and a copy to the caches, which says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolemesh.lowering.npu.caches import store
from rolemesh.lowering.npu.norms import normalised
from rolemesh.lowering.npu.rotary import evens_first, rotated_by_half
from rolemesh.lowering.npu.table import NpuOpTable, refuse

__all__ = ["OPS", "kv_rmsnorm_rope_cache", "kv_rmsnorm_rope_cache_v2"]

OPS = NpuOpTable()

_OP = "npu_kv_rmsnorm_rope_cache"

_MODES = ("Norm", "PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ")


def _check_kv(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    caches: tuple[Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None],
    v: Tensor | None,
    cache_mode: str,
) -> None:
    refuse(_OP, cache_mode=None if cache_mode in _MODES else cache_mode)
    torch._check(
        kv.dim() == 4 and gamma.dim() == 1 and cos.dim() == 4 and cos.shape == sin.shape,
        lambda: f"kv {list(kv.shape)}, gamma {list(gamma.shape)}, angles {list(cos.shape)}",
    )
    wanted = gamma.shape[0] if v is not None else gamma.shape[0] + cos.shape[3]
    torch._check(
        kv.shape[3] == wanted, lambda: f"kv has {kv.shape[3]} dims, gamma and angles {wanted}"
    )
    widths = _widths(kv, gamma, cos, v)
    for cache, width, scale in zip(caches, widths, scales, strict=True):
        torch._check(
            cache.dim() == 4 and cache.shape[3] == width,
            lambda: f"a cache of {list(cache.shape)} for tokens of {width}",  # noqa: B023
        )
        torch._check(
            (scale is None) == cache.is_floating_point(),
            lambda: f"a scale goes with a cache of int8, not {cache.dtype}",  # noqa: B023
        )
    torch._check(
        index.dim() == (2 if cache_mode == "Norm" else 1),
        lambda: f"index {list(index.shape)} in cache_mode {cache_mode}",
    )


def _widths(kv: Tensor, gamma: Tensor, cos: Tensor, v: Tensor | None) -> tuple[int, int]:
    """Head dims of the first and the second cache."""
    return (cos.shape[3], gamma.shape[0]) if v is None else (kv.shape[3], v.shape[3])


def _kv_shape(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refuse(_OP, k_rope_offset=k_rope_offset, c_kv_offset=c_kv_offset)
    caches, scales = (k_cache, ckv_cache), (k_rope_scale, c_kv_scale)
    _check_kv(kv, gamma, cos, sin, index, caches, scales, v, cache_mode)
    k_out, v_out = (kv.new_empty([*kv.shape[:3], width]) for width in _widths(kv, gamma, cos, v))
    return k_cache.new_empty(k_cache.shape), ckv_cache.new_empty(ckv_cache.shape), k_out, v_out


def _fractal(cache: Tensor) -> Tensor:
    """A view `[blocks, block_size, parts, c]` of a cache in fractal form."""
    blocks, size, heads, width = cache.shape
    inner = 32 // cache.element_size()
    return cache.view(blocks, heads * width // inner, size, inner).transpose(1, 2)


def _slots(index: Tensor, tokens: Tensor, cache: Tensor, cache_mode: str) -> Tensor:
    """The slot of each token of `[B, N, S, D]`, for a cache of `[blocks, block_size, ...]`.

    In mode `Norm` the rows of the cache are its blocks, and a row is a sequence's own. In modes
    with `BLK` an index is the first slot of each sequence's successive blocks.
    """
    batch, _, length, _ = tokens.shape
    if cache_mode == "Norm":
        first = torch.arange(batch)[:, None] * cache.shape[2]
        return torch.where(index >= 0, index + first, -1).flatten()
    if "BLK" not in cache_mode:
        return index
    size = cache.shape[1]
    place = torch.arange(length)
    starts = index.view(batch, -1)[:, place // size]
    return torch.where(starts >= 0, starts // size * size + place % size, -1).flatten()


_KV = (
    "Tensor kv, Tensor gamma, Tensor cos, Tensor sin, Tensor index, Tensor{} k_cache,"
    " Tensor{} ckv_cache, *, Tensor? k_rope_scale=None, Tensor? c_kv_scale=None,"
    " Tensor? k_rope_offset=None, Tensor? c_kv_offset=None, Tensor? v=None, float epsilon=1e-5,"
    " str cache_mode='Norm', bool is_output_kv=False"
)
_KV_V2 = f"{_KV}, int? k_cache_dtype=None, int? ckv_cache_dtype=None"


def _kv_v2_shape(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    refuse(_OP, k_cache_dtype=k_cache_dtype, ckv_cache_dtype=ckv_cache_dtype)
    return _kv_shape(
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
        cache_mode=cache_mode,
    )[2:]


@OPS.op(
    f"npu_kv_rmsnorm_rope_cache_v2({_KV_V2.format('(a!)', '(b!)')}) -> (Tensor, Tensor)",
    ge="KvRmsNormRopeCache",
    shape=_kv_v2_shape,
    functional=f"npu_kv_rmsnorm_rope_cache_v2_functional({_KV_V2.format('', '')})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def kv_rmsnorm_rope_cache_v2(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
    k_cache_dtype: int | None = None,
    ckv_cache_dtype: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kv_rmsnorm_rope_cache`, without the caches among the results."""
    refuse(_OP, k_cache_dtype=k_cache_dtype, ckv_cache_dtype=ckv_cache_dtype)
    return kv_rmsnorm_rope_cache(
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
        epsilon=epsilon,
        cache_mode=cache_mode,
        is_output_kv=is_output_kv,
    )[2:]


@OPS.op(
    f"npu_kv_rmsnorm_rope_cache({_KV.format('', '')}) -> (Tensor, Tensor, Tensor, Tensor)",
    ge="KvRmsNormRopeCache",
    shape=_kv_shape,
    functional="npu_kv_rmsnorm_rope_cache_v2_functional",
    aliases={0: "k_cache", 1: "ckv_cache"},
)
def kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm the latent, rotate the key, and store both.

    Without v, kv `[B, 1, S, Dv + Dk]` is the latent, normed and scaled by gamma `[Dv]`, and the
    key, rotated by angles `[B, 1, S or 1, Dk]` as `npu_interleave_rope` does. With v
    `[B, 1, S, E]`, all of kv is normed, its first dims are rotated, and v goes to the second cache
    as it is. Caches are `[B, 1, length, D]` in mode `Norm`, else `[blocks, block_size, 1, D]`, in
    modes with `NZ` stored in fractal form. A scale `[D]` makes an int8 cache.

    Returns:
        Both caches, and what was stored, `[B, 1, S, D]` in kv's dtype. The latter are unspecified
        (here NaN) unless `is_output_kv` is set and the cache is paged.
    """
    _, _, k_out, v_out = _kv_shape(
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
        cache_mode=cache_mode,
    )
    turned = cos.shape[3]
    if v is None:
        latent, rotary = kv.split([gamma.shape[0], turned], -1)
        normed = normalised(latent, 1, epsilon)[0] * gamma.float()
        found = (_rotated(rotary, cos, sin), normed)
    else:
        normed = normalised(kv, 1, epsilon)[0] * gamma.float()
        key = torch.cat([_rotated(normed[..., :turned], cos, sin), normed[..., turned:]], -1)
        found = (key, v.float())
    caches, scales = (k_cache, ckv_cache), (k_rope_scale, c_kv_scale)
    outputs = (k_out, v_out)
    for wide, cache, scale, output in zip(found, caches, scales, outputs, strict=True):
        stored = wide
        if scale is not None:
            stored = (wide * scale).round().clamp(-128, 127)
        tokens = stored.transpose(1, 2).flatten(0, 1)
        blocks = cache.transpose(1, 2) if cache_mode == "Norm" else cache
        slots = _slots(index, wide, cache, cache_mode)
        store(_fractal(blocks) if cache_mode.endswith("NZ") else blocks, slots, tokens)
        if is_output_kv and cache_mode != "Norm":
            output.copy_(wide)
        else:
            output.fill_(torch.nan)
    return k_cache, ckv_cache, k_out, v_out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """DeepSeek's rotation in fp32."""
    halves = evens_first(x.float())
    return halves * cos.float() + rotated_by_half(halves) * sin.float()
