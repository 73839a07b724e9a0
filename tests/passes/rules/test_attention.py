"""Attention ops: their rules as a table; those with a CPU kernel checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op
from tests.passes.rules.rule_line import rule_line

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules import attention
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((attention.RULES,), (attention.LOCAL,))
CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
MATH = aten._scaled_dot_product_attention_math.default
SDPA = aten.scaled_dot_product_attention.default


def f(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def b(*shape: int) -> torch.Tensor:
    return f(*shape, dtype=torch.bfloat16)


def seen(*shape: int) -> torch.Tensor:
    """A mask in which every query sees a key."""
    mask = f(*shape) > 0
    mask[..., 0] = True
    return mask


Q, K, V = f(2, 6, 5, 8), f(2, 6, 7, 8), f(2, 6, 7, 8)
CASES = [
    (CPU, (Q, K, V), {}, "a b c d!, a b e! d!, a b e! f! -> a b c f!, a b c"),
    (CPU, (b(3, 4, 9, 16), b(3, 4, 7, 16), b(3, 4, 7, 16)), {},
     "a b c d!, a b e! d!, a b e! f! -> a b c f!, a b c"),
    (CPU, (Q, K, V, 0.0, True), {}, "a b c! d!, a b e! d!, a b e! f! -> a b c! f!, a b c!"),
    (CPU, (Q, K, V), {"attn_mask": f(5, 7), "scale": 0.3},
     "a b c d!, a b e! d!, a b e! f!, c e! -> a b c f!, a b c"),
    (CPU, (Q, K, V), {"attn_mask": f(2, 1, 5, 7)},
     "a b c d!, a b e! d!, a b e! f!, a 1 c e! -> a b c f!, a b c"),
    (CPU, (Q, K, V), {"attn_mask": f(1, 6, 1, 7)},
     "a b c d!, a b e! d!, a b e! f!, 1 b 1 e! -> a b c f!, a b c"),
    (CPU, (f(1, 6, 5, 8), f(1, 6, 7, 8), f(1, 6, 7, 8)), {"attn_mask": f(1, 1, 5, 7)},
     "a b c d!, a b e! d!, a b e! f!, a 1 c e! -> a b c f!, a b c"),
    # grouped queries: 3 heads of keys, 2 queries for each
    (CPU, (Q, f(2, 3, 7, 8), f(2, 3, 7, 8)), {"attn_mask": f(2, 6, 5, 7)},
     "a (b c) d e!, a b f! e!, a b f! g!, a (b c) d f! -> a (b c) d g!, a (b c) d"),
    (SDPA, (Q, f(2, 3, 7, 8), f(2, 3, 7, 4)), {"enable_gqa": True},
     "a (b c) d e!, a b f! e!, a b f! g -> a (b c) d g"),
    (SDPA, (Q, f(2, 1, 7, 8), f(2, 1, 7, 8)), {"enable_gqa": True},
     "a b c d!, a 1 e! d!, a 1 e! f -> a b c f"),
    (SDPA, (Q, K, f(2, 6, 7, 4), seen(5, 7)), {},
     "a b c d!, a b e! d!, a b e! f, c e! -> a b c f"),
    (SDPA, (f(6, 5, 8), f(6, 7, 8), f(6, 7, 4)), {}, "a b c!, a d! c!, a d! e -> a b e"),
    (SDPA, (f(5, 8), f(7, 8), f(7, 4)), {}, "a b!, c! b!, c! d -> a d"),
    (SDPA, (Q, K, V), {"is_causal": True}, "a b c! d!, a b e! d!, a b e! f -> a b c! f"),
    (MATH, (Q, f(2, 3, 7, 8), f(2, 3, 7, 4)), {"enable_gqa": True},
     "a (b c) d e!, a b f! e!, a b f! g -> a (b c) d g, a (b c) d f!"),
    (MATH, (f(4, 1, 6, 5, 8), f(1, 3, 6, 7, 8), f(4, 3, 1, 7, 9), f(6, 5, 7)), {},
     "a 1 b c d!, 1 e b f! d!, a e 1 f! g, b c f! -> a e b c g, a e b c f!"),
    (MATH, (f(4, 5, 8), f(4, 7, 8), f(4, 7, 9), f(7)), {},
     "a b c!, a d! c!, a d! e, d! -> a b e, a b d!"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "kwargs", "expect"), CASES)
def test_rule(
    target: torch._ops.OpOverload,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    expect: str,
) -> None:
    check_op(RULES, target, args, kwargs, expect=expect)


def shapes_only(
    target: torch._ops.OpOverload,
    args: tuple[object, ...],
    results: list[tuple[int, ...]],
    mask: tuple[int, ...] | None = None,
) -> Rule:
    """The rule of an op that has no kernel here, from shapes."""
    half = torch.bfloat16
    q, kv = TensorType((2, 6, 5, 64), half), TensorType((2, 6, 7, 64), half)
    operands = (q, kv, kv) if mask is None else (q, kv, kv, TensorType(mask, half))
    call_args = (q, kv, kv, *args)
    return RULES.rule(
        OpCall(target, call_args, {}, operands, tuple(TensorType(shape, half) for shape in results))
    )


FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
CUDNN = aten._scaled_dot_product_cudnn_attention.default
OVERRIDE = aten._scaled_dot_product_fused_attention_overrideable.default
OUT = (2, 6, 5, 64)
QKV = "a b c d!, a b e! d!, a b e! f!"
# Shapes of results as the kernels' fake implementations give them; None and integers left out.
ELSEWHERE = [
    (FLASH, (), [OUT, (2, 6, 5), (2,), (), (0,)], None, f"{QKV} -> a b c f!, a b c, g!, ., h!"),
    (EFFICIENT, (None, True), [OUT, (2, 6, 32), (), ()], None,
     "a b c! d!, a b e! d!, a b e! f! -> a b c! f!, a b g!, ., ."),
    (EFFICIENT, (None, False), [OUT, (2, 6, 0), (), ()], None,
     f"{QKV} -> a b c f!, a b g!, ., ."),
    (EFFICIENT, (0, False), [OUT, (2, 6, 0), (), ()], (2, 6, 5, 7),
     f"{QKV}, a b c e! -> a b c f!, a b g!, ., ."),
    (CUDNN, (None, True), [OUT, (2, 6, 5, 1), (), ()], None, f"{QKV} -> a b c f!, a b c 1, ., ."),
    (OVERRIDE, (None, 0.0, True), [OUT, (2, 6, 5), (), ()], None,
     "a b c! d!, a b e! d!, a b e! f! -> a b c! f!, a b c!, ., ."),
]  # fmt: skip


@pytest.mark.parametrize(("target", "args", "results", "mask", "expect"), ELSEWHERE)
def test_rule_of_device_kernels(
    target: torch._ops.OpOverload,
    args: tuple[object, ...],
    results: list[tuple[int, ...]],
    mask: tuple[int, ...] | None,
    expect: str,
) -> None:
    assert rule_line(shapes_only(target, args, results, mask)) == expect


@pytest.mark.parametrize(
    ("target", "args", "results"),
    [
        (FLASH, (0.1,), [OUT, (2, 6, 5), (2,), (), (0,)]),
        (FLASH, (0.0, False, True), [OUT, (2, 6, 5), (2,), (), (2, 6, 5, 128)]),
        (SDPA, (None, 0.1), [OUT]),
    ],
)
def test_dropout_and_debug_masks_stay_whole(
    target: torch._ops.OpOverload, args: tuple[object, ...], results: list[tuple[int, ...]]
) -> None:
    assert set(shapes_only(target, args, results).kinds) == {Kind.REPLICATE}
