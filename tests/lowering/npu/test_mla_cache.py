"""The fused cache write of MLA against norm, rotation and loops over tokens."""

from __future__ import annotations

import pytest
import torch
from tests.lowering.npu.runs import DTYPES, checked, f, near
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
ops = torch.ops.npu
BATCH, LENGTH, LATENT, ROPE = 2, 5, 64, 32
SIZE, BLOCKS = 4, 6


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Complex numbers of neighbouring elements, times `cos + i sin`, real parts first."""
    real, imaginary = x.double()[..., ::2], x.double()[..., 1::2]
    half = real.shape[-1]
    c, s = cos.double(), sin.double()
    return torch.cat(
        [
            real * c[..., :half] - imaginary * s[..., :half],
            imaginary * c[..., half:] + real * s[..., half:],
        ],
        -1,
    )


def norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    return torch.nn.functional.rms_norm(x.double(), (x.shape[-1],), gamma.double(), epsilon)


def inputs(dtype: torch.dtype, rows: int = LENGTH) -> tuple[Tensor, ...]:
    return (
        f(BATCH, 1, LENGTH, LATENT + ROPE, dtype=dtype),
        f(LATENT, dtype=dtype),
        f(BATCH, 1, rows, ROPE, dtype=dtype, seed=1).cos(),
        f(BATCH, 1, rows, ROPE, dtype=dtype, seed=2).sin(),
    )


PER_TOKEN = [7, -1, 0, 22, 5, 9, 14, 2, -1, 11]
PER_BLOCK = [8, 20, 12, -1]


def slots(mode: str) -> list[int]:
    """The slot of each token, in a cache of pages."""
    if "BLK" not in mode:
        return PER_TOKEN
    found = []
    for b in range(BATCH):
        for t in range(LENGTH):
            first = PER_BLOCK[2 * b + t // SIZE]
            found.append(first + t % SIZE if first >= 0 else -1)
    return found


def token_of(cache: Tensor, slot: int, fractal: bool) -> Tensor:
    """One stored token of a cache `[blocks, size, 1, D]`."""
    if not fractal:
        return cache[slot // SIZE, slot % SIZE, 0]
    inner = 32 // cache.element_size()
    stored = cache.reshape(BLOCKS, -1, SIZE, inner)
    return stored[slot // SIZE, :, slot % SIZE].flatten()


def check_pages(found: Tensor, before: Tensor, tokens: Tensor, mode: str) -> None:
    """Each token is at its slot, and nothing else has changed."""
    fractal = mode.endswith("NZ")
    places = dict(zip(slots(mode), tokens.flatten(0, 2), strict=True))
    for slot in range(BLOCKS * SIZE):
        wanted = places.get(slot, token_of(before, slot, fractal))
        near(token_of(found, slot, fractal), wanted)


PAGED = ["PA", "PA_BNSD", "PA_NZ", "PA_BLK_BNSD", "PA_BLK_NZ"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", PAGED)
def test_pages(mode: str, dtype: torch.dtype) -> None:
    kv, gamma, cos, sin = inputs(dtype)
    index = torch.tensor(PER_BLOCK if "BLK" in mode else PER_TOKEN)
    caches = [f(BLOCKS, SIZE, 1, width, dtype=dtype) for width in (ROPE, LATENT)]
    k_rope, c_kv, k_cache, ckv_cache = checked(
        ops.npu_kv_rmsnorm_rope_cache_v2_functional,
        kv,
        gamma,
        cos,
        sin,
        index,
        *caches,
        epsilon=0.1,
        cache_mode=mode,
        is_output_kv=True,
    )
    key = rotated(kv[..., LATENT:], cos, sin)
    latent = norm(kv[..., :LATENT], gamma, 0.1)
    near(k_rope, key)
    near(c_kv, latent)
    check_pages(k_cache, caches[0], key, mode)
    check_pages(ckv_cache, caches[1], latent, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, LENGTH])
def test_rows(rows: int, dtype: torch.dtype) -> None:
    kv, gamma, cos, sin = inputs(dtype, rows)
    index = torch.tensor([[6, 0, -1, 3, 5], [2, 1, 4, -1, 0]])
    caches = [f(BATCH, 1, 8, width, dtype=dtype) for width in (ROPE, LATENT)]
    found = checked(
        ops.npu_kv_rmsnorm_rope_cache_v2_functional, kv, gamma, cos, sin, index, *caches
    )
    assert found[0].isnan().all(), "a cache in rows gives no tokens back"
    expected = (rotated(kv[..., LATENT:], cos, sin), norm(kv[..., :LATENT], gamma, 1e-5))
    for before, after, tokens in zip(caches, found[2:], expected, strict=True):
        wanted = before.double()
        for b in range(BATCH):
            for t, place in enumerate(index[b].tolist()):
                if place >= 0:
                    wanted[b, :, place] = tokens[b, :, t]
        near(after, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_their_own(dtype: torch.dtype) -> None:
    kv, cos, sin = inputs(dtype)[0], *inputs(dtype)[2:]
    gamma, v = f(LATENT + ROPE, dtype=dtype), f(BATCH, 1, LENGTH, 16, dtype=dtype)
    caches = [f(BLOCKS, SIZE, 1, width, dtype=dtype) for width in (LATENT + ROPE, 16)]
    index = torch.tensor(PER_TOKEN)
    k_rope, c_kv, k_cache, ckv_cache = checked(
        ops.npu_kv_rmsnorm_rope_cache_v2_functional,
        kv,
        gamma,
        cos,
        sin,
        index,
        *caches,
        v=v,
        cache_mode="PA",
        is_output_kv=True,
    )
    normed = norm(kv, gamma, 1e-5)
    key = torch.cat([rotated(normed[..., :ROPE], cos, sin), normed[..., ROPE:]], -1)
    near(k_rope, key)
    assert torch.equal(c_kv, v)
    check_pages(k_cache, caches[0], key, "PA")
    check_pages(ckv_cache, caches[1], v, "PA")


@pytest.mark.parametrize("mode", PAGED)
def test_quantized_caches(mode: str) -> None:
    kv, gamma, cos, sin = inputs(torch.bfloat16)
    index = torch.tensor(PER_BLOCK if "BLK" in mode else PER_TOKEN)
    caches = [(f(BLOCKS, SIZE, 1, width) * 40).to(torch.int8) for width in (ROPE, LATENT)]
    scales = [f(width, seed=3) * 60 for width in (ROPE, LATENT)]
    found = checked(
        ops.npu_kv_rmsnorm_rope_cache_v2_functional,
        kv,
        gamma,
        cos,
        sin,
        index,
        *caches,
        k_rope_scale=scales[0],
        c_kv_scale=scales[1],
        cache_mode=mode,
    )
    wide = (
        rotated(kv[..., LATENT:], cos, sin),
        norm(kv[..., :LATENT], gamma, 1e-5),
    )
    fractal = mode.endswith("NZ")
    for x, scale, before, after in zip(wide, scales, caches, found[2:], strict=True):
        exact = (x * scale).clamp(-128, 127)
        assert (exact.abs() > 127).any()
        places = dict(zip(slots(mode), exact.flatten(0, 2), strict=True))
        for slot in range(BLOCKS * SIZE):
            stored = token_of(after, slot, fractal).double()
            if slot in places:
                assert (stored - places[slot]).abs().max() <= 0.501
            else:
                assert torch.equal(stored, token_of(before, slot, fractal).double())


def test_versions_agree_and_write_in_place() -> None:
    args = (*inputs(torch.float32), torch.tensor(PER_TOKEN))
    caches = [f(BLOCKS, SIZE, 1, width) for width in (ROPE, LATENT)]
    kwargs = {"cache_mode": "PA", "is_output_kv": True}
    wanted = ops.npu_kv_rmsnorm_rope_cache_v2_functional(*args, *caches, **kwargs)
    second = [cache.clone() for cache in caches]
    outputs = ops.npu_kv_rmsnorm_rope_cache_v2(*args, *second, **kwargs)
    first = [cache.clone() for cache in caches]
    results = ops.npu_kv_rmsnorm_rope_cache(*args, *first, **kwargs)
    for found in ((*outputs, *second), (*results[2:], *results[:2]), (*results[2:], *first)):
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(first[0], caches[0])


ARGS = (*inputs(torch.float32), torch.tensor(PER_TOKEN), f(BLOCKS, SIZE, 1, ROPE),
        f(BLOCKS, SIZE, 1, LATENT))  # fmt: skip
REFUSED: list[tuple[dict[str, object], str]] = [
    ({"cache_mode": "PA_X"}, "cache_mode='PA_X'"),
    ({"k_rope_offset": f(ROPE)}, "k_rope_offset=a tensor"),
    ({"k_cache_dtype": 290}, "k_cache_dtype=290"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("kwargs", "message"), REFUSED)
def test_refused(kwargs: dict[str, object], message: str, device: str) -> None:
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    with pytest.raises(RolemeshError) as caught:
        ops.npu_kv_rmsnorm_rope_cache_v2(
            *(x.to(device) for x in ARGS), **{"cache_mode": "PA", **moved}
        )
    assert caught.value.code == "RM028"
    named = f"npu_kv_rmsnorm_rope_cache has no reference semantics for {message}"
    assert named in str(caught.value)


WRONG: list[tuple[int, Tensor, str]] = [
    (1, f(LATENT - 1), f"kv has {LATENT + ROPE} dims, gamma and angles {LATENT + ROPE - 1}"),
    (4, torch.tensor([[1]]), r"index \[1, 1\] in cache_mode PA"),
    (5, f(BLOCKS, SIZE, 1, ROPE - 2), "a cache of .* for tokens of 32"),
    (
        6,
        torch.zeros(BLOCKS, SIZE, 1, LATENT, dtype=torch.int8),
        "a scale goes with a cache of int8",
    ),
]


@pytest.mark.parametrize(("place", "value", "message"), WRONG)
def test_calls_that_no_device_takes(place: int, value: Tensor, message: str) -> None:
    args = [*ARGS]
    args[place] = value
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.npu_kv_rmsnorm_rope_cache_v2(*args, cache_mode="PA")
