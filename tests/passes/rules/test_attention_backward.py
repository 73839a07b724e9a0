"""Gradients of attention: their rules as a table; the CPU's kernel checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op
from tests.passes.rules.rule_line import rule_line
from tests.passes.rules.test_attention import CPU, f

from rolemesh.compiler.ir.rule import Kind, OpCall, Rule
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules import attention_backward
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((attention_backward.RULES,), (attention_backward.LOCAL,))
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

Q = "a b c+ e!"
KV = "a b f! e!, a b f! d!"
ROWS = "a b c+ d!, a b c+"
PLAIN = f"a b c+ d!, {Q}, {KV}, {ROWS}"
RESULTS = f"{Q}, {KV}"
HEADS = "a (b c+) d+ e!, a (b c+) d+ f!, a b g! f!, a b g! e!"
GROUPED = f"{HEADS}, a (b c+) d+ e!, a (b c+) d+ -> a (b c+) d+ f!, a b g! f!, a b g! e!"
SHARED_RESULTS = "a b+ c+ e!, a 1 f! e!, a 1 f! d!"
SHARED = f"a b+ c+ d!, {SHARED_RESULTS}, a b+ c+ d!, a b+ c+"
PADDED = "a b c! e!, a b f! e!, a b f! d!"
CASES = [
    ((6, 5), (6, 7), {}, False, f"{PLAIN} -> {RESULTS}"),
    ((6, 5), (6, 7), {"attn_mask": f(2, 1, 5, 7)}, False, f"{PLAIN}, a 1 c+ f! -> {RESULTS}"),
    ((6, 5), (6, 7), {"attn_mask": f(7)[None].expand(5, 7), "scale": 0.3}, False,
     f"{PLAIN}, c+ f! -> {RESULTS}"),
    ((6, 5), (6, 7), {}, True, f"{PLAIN} -> {RESULTS}".replace("c+", "c!")),
    ((6, 5), (3, 7), {}, False, GROUPED),
    ((6, 5), (1, 7), {}, False, f"{SHARED} -> {SHARED_RESULTS}"),
]  # fmt: skip


@pytest.mark.parametrize(("queries", "keys", "kwargs", "causal", "expect"), CASES)
def test_rule(
    queries: tuple[int, int],
    keys: tuple[int, int],
    kwargs: dict[str, object],
    causal: bool,
    expect: str,
) -> None:
    q, k, v = f(2, *queries, 8), f(2, *keys, 8), f(2, *keys, 8) + 1
    out, lse = CPU(q, k, v, 0.0, causal, **kwargs)
    args = (out.flip(0) + 0.5, q, k, v, out, lse, 0.0, causal)
    check_op(RULES, BACKWARD, args, kwargs, expect=expect, limit=20)


def elsewhere(name: str, args: tuple[object, ...], results: list[tuple[int, ...]]) -> Rule:
    """The rule of an op that has no kernel here; a tuple among the arguments is a shape."""
    half = torch.bfloat16
    call_args = tuple(TensorType(a, half) if isinstance(a, tuple) else a for a in args)
    operands = tuple(a for a in call_args if isinstance(a, TensorType))
    target = getattr(aten, f"_scaled_dot_product_{name}_backward").default
    types = tuple(TensorType(shape, half) for shape in results)
    return RULES.rule(OpCall(target, call_args, {}, operands, types))


OUT, KEYS, LSE = (2, 6, 5, 64), (2, 6, 7, 64), (2, 6, 5)
TENSORS = (OUT, OUT, KEYS, KEYS)
MASK = [True, True, True, False]
GRADIENTS = [OUT, KEYS, KEYS]
NONE = (0,)


@pytest.mark.parametrize(
    ("name", "args", "results", "expect"),
    [
        ("flash_attention", (*TENSORS, OUT, LSE, None, None, 5, 7, 0.0, False, (2,), ()),
         GRADIENTS, f"{PLAIN}, g!, . -> {RESULTS}"),
        ("cudnn_attention",
         (*TENSORS, OUT, (*LSE, 1), (), (), None, None, None, 5, 7, 0.0, False),
         GRADIENTS, f"{PLAIN} 1, ., . -> {RESULTS}"),
        ("efficient_attention",
         (*TENSORS, (2, 1, 5, 7), OUT, (2, 6, 32), (), (), 0.0, MASK), [*GRADIENTS, NONE],
         f"a b c! d!, {PADDED}, a 1 c! f!, a b c! d!, a b g!, ., . -> {PADDED}, h!"),
        ("fused_attention_overrideable",
         (*TENSORS, (5, 7), MASK, OUT, LSE, None, None, 5, 7, 0.0, False, (), ()),
         [*GRADIENTS, NONE],
         f"a b c+ d!, {Q}, {KV}, c+ f!, {ROWS}, ., . -> {RESULTS}, g!"),
    ],
)  # fmt: skip
def test_rule_of_device_kernels(
    name: str, args: tuple[object, ...], results: list[tuple[int, ...]], expect: str
) -> None:
    found = rule_line(elsewhere(name, args, results))
    assert found == expect


def test_dropout_and_gradients_of_masks_stay_whole() -> None:
    bias = (2, 6, 5, 7)
    given = (*TENSORS, bias, OUT, LSE, (), ())
    with_bias = [*GRADIENTS, bias]
    for rule in (
        elsewhere("efficient_attention", (*given, 0.1, MASK), [*GRADIENTS, NONE]),
        elsewhere("efficient_attention", (*given, 0.0, [True] * 4), with_bias),
    ):
        assert set(rule.kinds) == {Kind.REPLICATE}
