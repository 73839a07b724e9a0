"""Convolutions: their rules as a table, each checked on all its choices."""

from __future__ import annotations

import pytest
import torch
from tests.passes.rules.harness import check_op

from rolemesh.passes.rules import convolution
from rolemesh.passes.rules.registry import Rules

aten = torch.ops.aten
RULES = Rules((convolution.RULES,), (convolution.LOCAL,))


def f(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def call(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: tuple[int, ...] = (1,),
    padding: tuple[int, ...] = (0,),
    transposed: bool = False,
    groups: int = 1,
) -> tuple[object, ...]:
    """The arguments of `aten.convolution`, one number for each spatial dim."""
    space = weight.ndim - 2

    def each(values: tuple[int, ...]) -> list[int]:
        return list(values * space if len(values) == 1 else values)

    ones, zeros = each((1,)), each((0,))
    return (x, weight, bias, each(stride), each(padding), ones, transposed, zeros, groups)


CASES = [
    # Patches of an image pass, and without a bias the input channels may shard.
    (
        call(f(3, 5, 6, 8), f(7, 5, 2, 4), stride=(2, 4)),
        "a b+ (c d!) (e f!), g b+ d! f! -> a g c e | linear 10 01",
    ),
    (
        call(f(3, 5, 6, 8), f(7, 5, 2, 4), f(7), stride=(2, 4)),
        "a b! (c d!) (e f!), g b! d! f!, g -> a g c e | linear 101 011",
    ),
    # Kernels overlap, are padded or leave a rest: that dim is whole.
    (
        call(f(3, 5, 6, 9), f(7, 5, 2, 4), stride=(1, 4)),
        "a b+ c! d!, e b+ f! g! -> a e h! i! | linear 10 01",
    ),
    (
        call(f(3, 5, 6), f(7, 5, 2), stride=(2,), padding=(1,)),
        "a b+ c!, d b+ e! -> a d f! | linear 10 01",
    ),
    # A kernel of one is a matrix product at each position.
    (call(f(3, 5, 6), f(7, 5, 1)), "a b+ c, d b+ 1 -> a d c | linear 10 01"),
    (call(f(3, 5, 6), f(7, 5, 1), stride=(2,)), "a b+ c!, d b+ e! -> a d f! | linear 10 01"),
    # Of several groups each rank has its own.
    (
        call(f(3, 6, 7), f(6, 1, 4), f(6), padding=(3,), groups=6),
        "a (b c!) d!, (b e!) c! f!, (b e!) -> a (b e!) g! | linear 101 011",
    ),
    (
        call(f(2, 6, 7), f(9, 2, 3), groups=3),
        "a (b c!) d!, (b e!) c! f! -> a (b e!) g! | linear 10 01",
    ),
    # Transposed: the weight has the input's channels first.
    (
        call(f(3, 5, 6), f(5, 7, 2), stride=(2,), transposed=True),
        "a b+ c!, b+ d e! -> a d f! | linear 10 01",
    ),
    (
        call(f(2, 6, 5), f(6, 4, 3), transposed=True, groups=3),
        "a (b c!) d!, (b c!) e! f! -> a (b e!) g! | linear 10 01",
    ),
]


@pytest.mark.parametrize(("args", "expect"), CASES)
def test_rule(args: tuple[object, ...], expect: str) -> None:
    check_op(RULES, aten.convolution.default, args, expect=expect)
