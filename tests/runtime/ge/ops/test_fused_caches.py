"""GE's fused cache writes compute what the torch ops do that become them, in place."""

from __future__ import annotations

import pytest
import torch
from tests.runtime.ge.ops.calls import FLOATS, call, ints, reals

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.runtime.ge.ops.fused_caches import OPS

define_npu_ops()
npu = torch.ops.npu
SLOTS = ints([1, 5, -1, 11], dtype=torch.int32)
# As torchair's converter writes them.
SCATTER = {"scatter_mode": "None", "strides": [1, 1], "offsets": [0, 0]}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["Norm", "PA_NZ"])
def test_scatter_pa_kv_cache(mode: str, dtype: torch.dtype) -> None:
    key, value = reals(4, 2, 8).to(dtype), reals(4, 2, 4).to(dtype)
    shapes = [(3, 4, 2, 8), (3, 4, 2, 4)] if mode == "Norm" else [(3, 4, 4, 4), (3, 2, 4, 4)]
    caches = [reals(*shape).to(dtype) for shape in shapes]
    expected = npu.npu_scatter_pa_kv_cache_functional(key, value, *caches, SLOTS, cache_mode=mode)
    inputs = {
        "key": key,
        "key_cache": caches[0],
        "slot_mapping": SLOTS,
        "value": value,
        "value_cache": caches[1],
    }
    found = call(OPS, "ScatterPaKvCache", inputs, {**SCATTER, "cache_mode": mode})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(tuple(caches), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ({"compress_seq_offset": SLOTS}, {}, "compress_seq_offsets=a tensor"),
        ({"seq_lens": SLOTS}, {}, "seq_lens=a tensor"),
        ({}, {"scatter_mode": "Alibi"}, "scatter_mode='Alibi'"),
    ],
)
def test_scatter_pa_kv_cache_refuses(
    inputs: dict[str, torch.Tensor], attributes: dict[str, object], message: str
) -> None:
    cache = reals(3, 4, 2, 8)
    given = {
        "key": reals(4, 2, 8),
        "key_cache": cache,
        "slot_mapping": SLOTS,
        "value": reals(4, 2, 8),
        "value_cache": cache.clone(),
    }
    with pytest.raises(RolemeshError, match=message):
        call(OPS, "ScatterPaKvCache", {**given, **inputs}, {**SCATTER, **attributes})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["Norm", "PA", "PA_BLK_BNSD"])
def test_kv_rms_norm_rope_cache(mode: str, dtype: torch.dtype) -> None:
    kv, gamma = reals(2, 1, 3, 12).to(dtype), reals(8).to(dtype)
    cos, sin = (reals(2, 1, 3, 4, seed=i).cos().to(dtype) for i in (1, 2))
    lead = (2, 1, 6) if mode == "Norm" else (4, 4, 1)
    caches = [reals(*lead, width).to(dtype) for width in (4, 8)]
    index = {
        "Norm": ints([[2, -1, 0], [5, 3, 1]]),
        "PA": ints([1, 5, -1, 11, 0, 3]),
        "PA_BLK_BNSD": ints([12, 4]),
    }[mode]
    options = {"epsilon": 0.25, "cache_mode": mode, "is_output_kv": True}
    expected = npu.npu_kv_rmsnorm_rope_cache_v2_functional(
        kv, gamma, cos, sin, index, *caches, **options
    )
    inputs = {
        "kv": kv,
        "gamma": gamma,
        "cos": cos,
        "sin": sin,
        "index": index,
        "k_cache": caches[0],
        "ckv_cache": caches[1],
    }
    found = call(OPS, "KvRmsNormRopeCache", inputs, options)
    k_rope, c_kv, *written = expected
    torch.testing.assert_close(found, (*written, k_rope, c_kv), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(caches, written, rtol=0, atol=0)


def test_kv_rms_norm_rope_cache_of_int8() -> None:
    kv, gamma, angle = reals(2, 1, 3, 12), reals(8), reals(2, 1, 3, 4)
    caches = [torch.zeros(4, 4, 1, width, dtype=torch.int8) for width in (4, 8)]
    scales = {"k_rope_scale": reals(4) * 9, "c_kv_scale": reals(8) * 9}
    index = ints([1, 5, -1, 11, 0, 3])
    expected = npu.npu_kv_rmsnorm_rope_cache_v2_functional(
        kv, gamma, angle.cos(), angle.sin(), index, *caches, **scales, cache_mode="PA"
    )
    inputs = {
        "kv": kv,
        "gamma": gamma,
        "cos": angle.cos(),
        "sin": angle.sin(),
        "index": index,
        "k_cache": caches[0],
        "ckv_cache": caches[1],
        **scales,
    }
    found = call(OPS, "KvRmsNormRopeCache", inputs, {"cache_mode": "PA"})
    torch.testing.assert_close(found[:2], expected[2:], rtol=0, atol=0)
    assert found[0].any()


def test_every_op_is_tested() -> None:
    assert set(OPS.ops) == {"ScatterPaKvCache", "KvRmsNormRopeCache"}
