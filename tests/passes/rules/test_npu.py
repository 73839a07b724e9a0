"""Rules of fused norms, rotations, activations and cache writes, checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.lowering.npu.define import define_npu_ops
from rolemesh.passes.rules import default_rules, npu
from rolemesh.passes.rules.registry import Rules

define_npu_ops()
ops = torch.ops.npu
RULES = Rules((npu.RULES,), (npu.LOCAL,))


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def i(*values: int) -> torch.Tensor:
    return torch.tensor(values)


SLOTS = i(5, -1, 0, 11, 7)
PAGES = (f(5, 3, 8), f(5, 3, 4))
KV = (f(3, 1, 2, 14), f(8), f(3, 1, 2, 6), f(3, 1, 2, 6))
ROWS = (torch.tensor([[0, 3], [-1, 4], [2, 1]]), f(3, 1, 5, 6), f(3, 1, 5, 8))
CASES = [
    (ops.npu_rms_norm.default, (f(3, 5, 8), f(8), 1e-5), {}, "a b c!, c! -> a b c!, a b 1"),
    (ops.npu_rms_norm.default, (b(6, 5, 8), b(8)), {}, "a b c!, c! -> a b c!, a b 1"),
    (ops.npu_rms_norm.default, (f(3, 5, 2, 8), f(2, 8)), {},
     "a b c! d!, c! d! -> a b c! d!, a b 1 1"),
    (ops.npu_add_rms_norm.default, (f(3, 5, 8), f(3, 5, 8) + 1, f(8)), {},
     "a b c!, a b c!, c! -> a b c!, a b 1, a b c!"),
    (ops.npu_add_rms_norm_v2_functional.default, (b(7, 8), b(7, 8) + 1, b(8)), {},
     "a b!, a b!, b! -> a 1, a b!, a b!"),
    (ops.npu_swiglu.default, (f(3, 5, 12),), {}, "a b (c! d) -> a b d"),
    (ops.npu_swiglu.default, (f(3, 14, 5), 1), {}, "a (b! c) d -> a c d"),
    (ops.npu_rotary_mul.default, (f(2, 3, 5, 8), f(1, 1, 5, 8), f(1, 1, 5, 8)), {},
     "a b c d!, 1 1 c d!, 1 1 c d! -> a b c d! | linear 100"),
    (ops.npu_rotary_mul.default, (f(2, 5, 3, 8), f(2, 5, 1, 8), f(2, 5, 1, 8), "interleave"), {},
     "a b c d!, a b 1 d!, a b 1 d! -> a b c d! | linear 100"),
    (ops.npu_rotary_mul.default,
     (f(2, 3, 5, 8), f(1, 1, 5, 8), f(1, 1, 5, 8), "half", f(8, 8)), {},
     "a b c d!, 1 1 c d!, 1 1 c d!, d! e! -> a b c d! | linear 1000"),
    (ops.npu_interleave_rope.default, (f(2, 3, 5, 8), f(2, 1, 1, 8), f(2, 1, 1, 8)), {},
     "a b c d!, a 1 1 d!, a 1 1 d! -> a b c d! | linear 100"),
    (ops.npu_apply_rotary_pos_emb.default,
     (f(2, 5, 6, 8), f(2, 5, 3, 8), f(2, 5, 1, 8), f(2, 5, 1, 8)), {},
     "a b c d!, a b e d!, a b 1 d!, a b 1 d! -> a b c d!, a b e d! | linear 1100"),
    (ops.npu_apply_rotary_pos_emb.default,
     (f(7, 1, 8), f(7, 3, 8), f(7, 1, 8), f(7, 1, 8), "TND"), {},
     "a b c!, a d c!, a 1 c!, a 1 c! -> a b c!, a d c! | linear 1100"),
    (ops.npu_scatter_nd_update.default, (f(7, 3, 5), torch.tensor([[6], [0]]), f(2, 3, 5)), {},
     "a! b c, d! e!, d! b c -> a! b c"),
    (ops.npu_scatter_nd_update.default, (f(7, 3, 5), torch.tensor([[6, 2], [0, 1]]), f(2, 5)), {},
     "a! b! c, d! e!, d! c -> a! b! c"),
    (ops.npu_scatter_pa_kv_cache_functional.default,
     (*PAGES, f(4, 3, 3, 8), f(4, 3, 3, 4), SLOTS), {"cache_mode": "Norm"},
     "a! b c, a! b d, e! f! b c, g! h! b d, a! -> e! f! b c, g! h! b d"),
    (ops.npu_scatter_pa_kv_cache_functional.default,
     (*PAGES, f(4, 6, 3, 4), f(4, 6, 3, 2), SLOTS), {},
     ("a! b (c! d!), a! b (e! f!), g! (b c!) h! d!, i! (b e!) j! f!, a!"
     " -> g! (b c!) h! d!, i! (b e!) j! f!")),
    (ops.npu_kv_rmsnorm_rope_cache_v2_functional.default, (*KV, *ROWS), {},
     ("a b! c! d!, e!, a b! c! f!, a b! c! g!, a h!, a i! j! k!, a l! m! n!"
     " -> a b! c! o!, a b! c! p!, a i! j! k!, a l! m! n!")),
    (ops.npu_kv_rmsnorm_rope_cache_v2_functional.default,
     (f(3, 1, 2, 14), f(14), f(3, 1, 1, 6), f(3, 1, 1, 6), ROWS[0], f(3, 1, 5, 14), f(3, 1, 5, 4)),
     {"v": f(3, 1, 2, 4)},
     ("a b! c! d!, e!, a b! 1 f!, a b! 1 g!, a h!, a i! j! k!, a l! m! n!, a b! c! o!"
     " -> a b! c! p!, a b! c! q!, a i! j! k!, a l! m! n!")),
    (ops.npu_kv_rmsnorm_rope_cache_v2_functional.default,
     (f(2, 1, 2, 14), f(8), f(2, 1, 2, 6), f(2, 1, 2, 6), i(5, -1, 7, 0), f(3, 4, 1, 6),
      f(3, 4, 1, 8)),
     {"cache_mode": "PA", "is_output_kv": True},
     ("a! b! c! d!, e!, a! b! c! f!, a! b! c! g!, h!, i! j! k! l!, m! n! o! p!"
     " -> a! b! c! q!, a! b! c! r!, i! j! k! l!, m! n! o! p!")),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "kwargs", "expect"), CASES)
def test_rule(
    target: torch._ops.OpOverload,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    expect: str,
) -> None:
    check_op(RULES, target, args, kwargs, expect=expect, ranks=(2, 3), limit=6)


def test_a_write_that_the_schema_hides_has_the_rule_of_its_functional_variant() -> None:
    args = (*KV, *ROWS)
    variant = ops.npu_kv_rmsnorm_rope_cache_v2_functional.default
    call, _ = make_call(variant, args)
    plain, _ = make_call(ops.npu_kv_rmsnorm_rope_cache.default, args)
    operands, results = rule_line(RULES.rule(call)).split(" -> ")
    stored, caches = results.split(", ")[:2], results.split(", ")[2:]
    assert rule_line(RULES.rule(plain)) == f"{operands} -> {', '.join([*caches, *stored])}"


def test_fractal_heads_that_blocks_straddle_stay_whole() -> None:
    k, cache = f(5, 4, 6), f(3, 3, 4, 8)
    call, _ = make_call(
        ops.npu_scatter_pa_kv_cache_functional.default, (k, k, cache, cache.clone(), SLOTS)
    )
    assert {kind.name for kind in RULES.rule(call).kinds} == {"REPLICATE"}


@pytest.mark.parametrize("name", [*npu.RULES])
def test_op_has_the_rule_by_default(name: str) -> None:
    assert default_rules().covers(getattr(ops, name.removeprefix("npu::")).default)
