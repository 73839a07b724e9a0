"""Cache writes against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from tests.lowering.npu.runs import checked, f
from torch import Tensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops

define_npu_ops()
ops = torch.ops.npu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "width"), [((2,), 1), ((3,), 2), ((2, 2), 3)])
def test_scatter_nd_update(
    rows: tuple[int, ...], width: int, index_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    x = (f(4, 5, 6) * 9).to(dtype)
    places = torch.tensor([[3, 4, 5], [0, 2, 1], [3, 1, 0], [1, 4, 2]])[:, :width]
    count = torch.Size(rows).numel()
    indices = places[:count].reshape(*rows, width).to(index_dtype)
    updates = (f(*rows, *x.shape[width:], seed=1) * 9).to(dtype)
    expected = x.clone()
    for place, update in zip(places[:count], updates.reshape(count, *x.shape[width:]), strict=True):
        expected[tuple(place.tolist())] = update
    (functional,) = checked(ops.npu_scatter_nd_update, x, indices, updates)
    assert torch.equal(functional, expected)
    assert not torch.equal(x, expected)
    returned = ops.npu_scatter_nd_update_(x, indices, updates)
    assert returned is x
    assert torch.equal(x, expected)


def test_scatter_nd_update_of_a_view() -> None:
    x = f(3, 4, 5)
    expected = x.clone()
    expected[1, 2] = 7
    ops.npu_scatter_nd_update_(x[1], torch.tensor([[2]]), torch.full((1, 5), 7.0))
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([[4]], "indices 0 to 4 in a dim of 4"), ([[-1]], "indices -1 to 0 in a dim of 4")],
)
def test_indices_that_do_not_exist(indices: list[list[int]], message: str) -> None:
    with pytest.raises(IndexError, match=message):
        ops.npu_scatter_nd_update_(f(4, 5), torch.tensor([[0], *indices]), f(2, 5))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_updates_must_fit(device: str) -> None:
    x, indices = f(4, 5).to(device), torch.tensor([[0], [1]]).to(device)
    with pytest.raises(
        (RuntimeError, ValueError), match=r"updates \[2, 4\] at \[2, 1\] of \[4, 5\]"
    ):
        ops.npu_scatter_nd_update_(x, indices, f(2, 4).to(device))
    with pytest.raises((RuntimeError, ValueError), match=r"float16 into torch.float32"):
        ops.npu_scatter_nd_update_(x, indices, f(2, 5).half().to(device))


SLOTS = [5, -1, 0, 8, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("mode", ["Norm", None, "PA_NZ"])
def test_scatter_pa_kv_cache(mode: str | None, dtype: torch.dtype) -> None:
    blocks, size, heads, inner = 4, 3, 2, 4
    tokens = [(f(5, heads, width) * 9).to(dtype) for width in (8, 12)]
    fractal = mode == "PA_NZ"
    shapes = [
        (blocks, heads * width // inner, size, inner) if fractal else (blocks, size, heads, width)
        for width in (8, 12)
    ]
    caches = [(f(*shape) * 9).to(dtype) for shape in shapes]
    expected = [cache.clone() for cache in caches]
    for x, cache in zip(tokens, expected, strict=True):
        for token, slot in zip(x, SLOTS, strict=True):
            if slot < 0:
                continue
            if not fractal:
                cache[slot // size, slot % size] = token
                continue
            flat = token.flatten()
            for part in range(flat.shape[0] // inner):
                cache[slot // size, part, slot % size] = flat[part * inner : (part + 1) * inner]
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    functional = checked(
        ops.npu_scatter_pa_kv_cache_functional, *tokens, *caches, slots, cache_mode=mode
    )
    checked(ops.npu_scatter_pa_kv_cache, *tokens, *caches, slots, cache_mode=mode)
    for found, changed, wanted in zip(functional, caches, expected, strict=True):
        assert torch.equal(found, wanted)
        assert torch.equal(changed, wanted)


ARGS = (f(5, 2, 8), f(5, 2, 8), f(4, 3, 2, 8), f(4, 3, 2, 8), torch.tensor(SLOTS))
REFUSED: list[tuple[tuple[Tensor, ...], dict[str, object], str]] = [
    (ARGS, {"compress_lens": f(1)}, "compress_lens=a tensor"),
    (ARGS, {"seq_lens": f(1)}, "seq_lens=a tensor"),
    (ARGS, {"cache_mode": "PA_BNSD"}, "cache_mode='PA_BNSD'"),
    ((f(2, 3, 2, 8), f(2, 3, 2, 8), *ARGS[2:]), {}, "key=a tensor for each head its own slots"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSED)
def test_refused(args: tuple[Tensor, ...], kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(RolemeshError) as caught:
        ops.npu_scatter_pa_kv_cache(*args, **{"cache_mode": "Norm", **kwargs})
    assert caught.value.code == "RM028"
    named = f"npu_scatter_pa_kv_cache has no reference semantics for {message}"
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("args", "mode"),
    [
        ((*ARGS[:2], f(4, 3, 2, 6), *ARGS[3:]), "Norm"),
        ((*ARGS[:2], f(4, 3, 2, 8), *ARGS[3:]), "PA_NZ"),
        ((*ARGS[:4], torch.tensor([1, 2])), "Norm"),
        ((*ARGS[:2], f(4, 3, 2, 8).half(), *ARGS[3:]), "Norm"),
    ],
)
def test_caches_must_fit(args: tuple[Tensor, ...], mode: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"tokens \[5, 2, 8\]"):
        ops.npu_scatter_pa_kv_cache(*args, cache_mode=mode)
