"""Rules of dense and sparse attention as one op, checked on all choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op, make_call
from tests.passes.rules.rule_line import rule_line

from rolemesh.lowering.composite.define import define_composite_ops
from rolemesh.passes.rules import composite_attention
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.work import flops_of

define_composite_ops()
DENSE = torch.ops.rolemesh.attention.default
SPARSE = torch.ops.rolemesh.sparse_attention.default
BACKWARD = torch.ops.rolemesh.attention_backward.default
RULES = Rules((composite_attention.RULES,), (composite_attention.LOCAL,))


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def seen(*shape: int) -> torch.Tensor:
    """A mask in which every query sees a key."""
    mask = f(*shape) > 0
    mask[..., 0] = True
    return mask


def picks(*shape: int, keys: int) -> torch.Tensor:
    """Distinct keys for each query, the last -1."""
    found = torch.rand(*shape[:-1], keys, generator=torch.Generator().manual_seed(1)).argsort(-1)
    found = found[..., : shape[-1]].clone()
    found[..., -1] = -1
    return found.int()


GROUPED = (f(2, 6, 5, 8), f(2, 3, 7, 8), f(2, 3, 7, 4))
LATENT = (f(3, 4, 5, 8), f(3, 1, 7, 8), f(3, 1, 7, 6))
TAILS = (f(2, 6, 5, 3), f(2, 3, 7, 3))
LATENT_TAILS = (f(3, 4, 5, 2), f(3, 1, 7, 2))
CASES = [
    (DENSE, (*GROUPED, None, 0.5),
     "a (b c) d e!, a b f! e!, a b f! g -> a d (b c) g | linear 001"),
    (DENSE, (f(3, 4, 5, 8), f(3, 4, 7, 8), f(3, 4, 7, 5), seen(3, 1, 5, 7), 0.5),
     "a b c d!, a b e! d!, a b e! f, a 1 c e! -> a c b f | linear 0010"),
    (DENSE, (*GROUPED, seen(1, 6, 5, 7), 0.5, f(6), 0.9),
     "a (b c) d e!, a b f! e!, a b f! g, 1 (b c) d f!, (b c) -> a d (b c) g | linear 00100"),
    (DENSE, (*GROUPED, f(5, 7), 0.5),
     "a (b c) d e!, a b f! e!, a b f! g, d f! -> a d (b c) g | linear 0010"),
    (DENSE, (*LATENT, seen(1, 1, 1, 7), 0.5, f(4)),
     "a b c d!, a 1 e! d!, a 1 e! f, 1 1 1 e!, b -> a c b f | linear 00100"),
    (SPARSE, (*LATENT, picks(3, 5, 4, keys=7), seen(3, 1, 5, 7), 0.5),
     "a b c d!, a 1 e! d!, a 1 e! f, a c g!, a 1 c e! -> a c b f | linear 00100"),
    (SPARSE, (*GROUPED, picks(2, 5, 4, keys=7), None, 0.5, f(6)),
     "a (b c) d e!, a b f! e!, a b f! g, a d h!, (b c) -> a d (b c) g | linear 00100"),
    (DENSE, (*GROUPED, None, 0.5, None, 0.0, *TAILS),
     "a (b c) d e!, a b f! e!, a b f! g, a (b c) d h!, a b f! h! -> a d (b c) g | linear 00100"),
    (SPARSE, (*LATENT, picks(3, 5, 4, keys=7), None, 0.5, None, *LATENT_TAILS),
     "a b c d!, a 1 e! d!, a 1 e! f, a c g!, a b c h!, a 1 e! h! -> a c b f | linear 001000"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "expect"), CASES)
def test_rule(op: torch._ops.OpOverload, args: tuple[object, ...], expect: str) -> None:
    check_op(RULES, op, args, expect=expect, ranks=(2, 3), limit=4)


QKV = "a+ (c d+) b+ f!, a+ c g! f!, a+ c g! e!"
QKV_TAILS = "a+ (c d+) b+ h!, a+ c g! h!"
ONE_KEY = "a+ c+ b+ e!, a+ 1 f! e!, a+ 1 f! d!"
ONE_KEY_TAILS = "a+ c+ b+ g!, a+ 1 f! g!"
GRADIENTS = [
    ((f(2, 5, 6, 4), *GROUPED, None, 0.5), f"a+ b+ (c d+) e!, {QKV} -> {QKV}, h!, i!, j!"),
    ((f(2, 5, 6, 4), *GROUPED, seen(1, 6, 5, 7), 0.5, f(6), 0.9, *TAILS),
     f"a+ b+ (c d+) e!, {QKV}, 1 (c d+) b+ g!, (c d+), {QKV_TAILS} -> {QKV}, (c d+), {QKV_TAILS}"),
    ((f(3, 5, 4, 6), *LATENT, None, 0.5, None, 0.0, *LATENT_TAILS),
     f"a+ b+ c+ d!, {ONE_KEY}, {ONE_KEY_TAILS} -> {ONE_KEY}, h!, {ONE_KEY_TAILS}"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "expect"), GRADIENTS, ids=("grouped", "all", "latent"))
def test_rule_of_the_gradient(args: tuple[object, ...], expect: str) -> None:
    check_op(RULES, BACKWARD, args, expect=expect, ranks=(2, 3), limit=6)


def test_one_head() -> None:
    call, _ = make_call(DENSE, (f(2, 1, 5, 8), f(2, 1, 7, 8), f(2, 1, 7, 4), None, 0.5))
    assert rule_line(RULES.rule(call)) == "a 1 b c!, a 1 d! c!, a 1 d! e -> a b 1 e | linear 001"


def test_work_of_sparse_attention_does_not_depend_on_the_number_of_keys() -> None:
    shapes = [x.shape for x in LATENT]
    assert flops_of(DENSE, shapes) == 2 * 3 * 4 * 5 * 7 * (8 + 6)
    assert flops_of(SPARSE, [*shapes, (3, 5, 2)]) == 2 * 3 * 4 * 5 * 2 * (8 + 6)


def test_work_of_gradients() -> None:
    """Two products for each product, and what is computed once more."""
    shapes = [(3, 5, 4, 6), *[x.shape for x in LATENT]]
    assert flops_of(BACKWARD, shapes) == 3 * 2 * 3 * 4 * 5 * 7 * (8 + 6)
    torchs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert flops_of(torchs, shapes) == 2 * 3 * 4 * 5 * 7 * (3 * 8 + 2 * 6)


def test_work_of_tails() -> None:
    shapes, tails = [x.shape for x in LATENT], [x.shape for x in LATENT_TAILS]
    for options in ([], [(3, 1, 5, 7)], [(4,)], [(3, 1, 5, 7), (4,)]):
        assert flops_of(DENSE, [*shapes, *options, *tails]) == 2 * 3 * 4 * 5 * 7 * (8 + 6 + 2)
        assert flops_of(DENSE, [*shapes, *options]) == 2 * 3 * 4 * 5 * 7 * (8 + 6)
        named = [*shapes, (3, 5, 4), *options]
        assert flops_of(SPARSE, [*named, *tails]) == 2 * 3 * 4 * 5 * 4 * (8 + 6 + 2)
        assert flops_of(SPARSE, named) == 2 * 3 * 4 * 5 * 4 * (8 + 6)
