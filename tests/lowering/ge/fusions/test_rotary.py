"""Rotary embeddings of halves and of even and odd elements, and what only looks like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, flat, fused, graph_text, hits
from tests.lowering.ge.lowered import dynamic_examples
from torch import Tensor

from rolemesh.lowering.composite.define import define_composite_ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (turned(x) * sin)


def other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return sin * torch.cat((second.neg(), first), 3) + cos * x


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def halves_in_other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((cos * first - sin * second, sin * first + cos * second), 3)


def alternate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def angles(*shape: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    phase = f(*shape) * 3
    return phase.cos().to(dtype), phase.sin().to(dtype)


SPREADS = [(1, 1, 3), (2, 1, 3), (2, 5, 3), (1, 5, 1), (2, 5, 1), (2, 1, 1)]
"""Dims of cos and sin that are documented for x of [2, 5, 3, D]."""


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("spread", SPREADS, ids=str)
@pytest.mark.parametrize("form", [whole, other_order])
def test_whole_angles(
    form: Callable[..., Tensor], spread: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = f(2, 5, 3, 14, dtype=dtype)
    assert hits(form, x, *angles(*spread, 14, dtype=dtype)) == {"rotary_mul": 1}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("spread", SPREADS, ids=str)
@pytest.mark.parametrize("form", [halves, halves_in_other_order])
def test_half_angles(
    form: Callable[..., Tensor], spread: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = f(2, 5, 3, 14, dtype=dtype)
    assert hits(form, x, *angles(*spread, 7, dtype=dtype)) == {"rotary_mul": 1}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3])
def test_even_and_odd_elements(tokens: int, batch: int, dtype: torch.dtype) -> None:
    x = f(2, 5, 3, 64, dtype=dtype)
    cos, sin = angles(batch, 1, tokens, 32, dtype=dtype)
    assert hits(alternate, x, cos, sin) == {"interleave_rope": 1}


def test_doubled_angles_are_made_once() -> None:
    def block(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return halves(q, cos, sin), halves(k, cos, sin), alternate(q, cos, sin)

    q, k = f(2, 5, 3, 64, dtype=BF16), f(2, 1, 3, 64, dtype=BF16)
    given = (q, k, *angles(1, 1, 3, 32, dtype=BF16))
    assert hits(block, *given) == {"rotary_mul": 2, "interleave_rope": 1}
    text = graph_text(both_forms(block, *given).after.graph)
    assert text.count("= cat.default") == 2
    assert text.count("= expand.default") == 2


def test_rotated_part_of_a_head() -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat([whole(x[..., :6], cos, sin), x[..., 6:]], -1)

    assert hits(partial, f(2, 5, 3, 14), *angles(1, 1, 3, 6)) == {"rotary_mul": 1}


def negated_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, -first), -1) * sin


def not_negated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, first), -1) * sin


def another_function(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second.abs(), first), -1) * sin


def not_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-first, second), -1) * sin


def less(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos - turned(x) * sin


def scaled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(x * cos, turned(x) * sin, alpha=2)


def of_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x + 1) * cos + turned(x) * sin


def uneven(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 5:], x[..., :5]), -1) * sin


def along_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, 2)
    return x * cos + torch.cat((-second, first), 2) * sin


def three_parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-x[..., 7:], x[..., :6], x[..., 6:7]), -1) * sin


def shares_the_turn(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    rotated = turned(x)
    return x * cos + rotated * sin, rotated * 2


def shares_a_product(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    product = x * cos
    return product + turned(x) * sin, product * 2


@pytest.mark.parametrize(
    "form",
    [
        negated_first,
        not_negated,
        another_function,
        not_swapped,
        less,
        scaled,
        of_another,
        uneven,
        along_tokens,
        three_parts,
        shares_the_turn,
        shares_a_product,
    ],
)
def test_near_misses_of_whole_angles_stay(form: Callable[..., object]) -> None:
    assert hits(form, f(2, 5, 4, 14), *angles(1, 1, 4, 14)) == {}


def signs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)


def order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second * cos + first * sin, first * cos - second * sin), -1)


def reversed_difference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second * sin - first * cos, second * cos + first * sin), -1)


def angles_swapped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * sin + first * cos), -1)


def stacked(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def every_third(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., :-1:2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


def two_sums(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), -1)


def two_differences(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos - first * sin), -1)


def scaled_difference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    less = torch.sub(first * cos, second * sin, alpha=2)
    return torch.cat((less, second * cos + first * sin), -1)


def scaled_sum(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    more = torch.add(second * cos, first * sin, alpha=2)
    return torch.cat((first * cos - second * sin, more), -1)


def one_angle_twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * cos), -1)


def with_a_third_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, first), -1)


def joined_along_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), 2)


def shares_a_sum(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, -1)
    difference = first * cos - second * sin
    return torch.cat((difference, second * cos + first * sin), -1), difference.exp()


@pytest.mark.parametrize(
    "form",
    [
        signs,
        order,
        reversed_difference,
        angles_swapped,
        stacked,
        every_third,
        two_sums,
        two_differences,
        scaled_difference,
        scaled_sum,
        one_angle_twice,
        with_a_third_part,
        joined_along_tokens,
        shares_a_sum,
    ],
)
def test_near_misses_of_half_angles_stay(form: Callable[..., object]) -> None:
    x, (cos, sin) = f(2, 5, 3, 64, dtype=BF16), angles(1, 1, 3, 32, dtype=BF16)
    assert hits(form, x, cos, sin) == {}


def test_other_dtypes_stay() -> None:
    x, (cos, sin) = f(2, 5, 3, 64), angles(1, 1, 3, 64)
    assert hits(whole, x.bfloat16(), cos, sin) == {}
    assert hits(whole, x, cos.bfloat16(), sin.bfloat16()) == {}
    assert hits(whole, x, cos, sin.bfloat16()) == {}
    assert not any(both_forms(whole, x.double(), cos.double(), sin.double()).made.values())
    assert hits(alternate, x, *angles(1, 1, 3, 32)) == {}


def test_other_ranks_and_shapes_of_angles_stay() -> None:
    assert hits(whole, f(5, 3, 14), *angles(1, 3, 14)) == {}
    assert hits(whole, f(2, 5, 3, 14), *angles(3, 14)) == {}
    assert hits(whole, f(2, 5, 3, 14), *angles(1, 1, 3, 1)) == {}
    assert hits(whole, f(1, 5, 3, 14), *angles(4, 1, 3, 14)) == {}
    cos, sin = angles(1, 1, 3, 14)[0], angles(1, 1, 1, 14)[1]
    assert hits(whole, f(2, 5, 3, 14), cos, sin) == {}
    # npu_interleave_rope takes no angles of their own for each head
    assert hits(alternate, f(2, 5, 3, 64, dtype=BF16), *angles(2, 5, 3, 32, dtype=BF16)) == {}


@pytest.mark.parametrize(
    ("x", "cos"),
    [
        ((2, 5, 3, 896), (1, 1, 3, 896)),
        ((1000, 1, 3, 4), (1, 1, 3, 4)),
        ((1, 1000, 3, 4), (1, 1, 3, 4)),
        ((2, 3, 1000, 4), (1, 3, 1, 4)),
        ((2, 5, 3, 4), (1, 5, 3, 4)),
    ],
)
def test_sizes_beyond_the_documented_ones(x: tuple[int, ...], cos: tuple[int, ...]) -> None:
    given = (f(*x), *angles(*cos))
    assert hits(whole, *given) == {}
    assert hits(whole, *given, within_limits=False) == {"rotary_mul": 1}


def test_documented_sizes_at_the_limit() -> None:
    assert hits(whole, f(999, 1, 2, 4), *angles(1, 1, 2, 4)) == {"rotary_mul": 1}
    assert hits(whole, f(2, 1, 1000, 4), *angles(1, 1, 1000, 4)) == {"rotary_mul": 1}
    assert hits(whole, f(2, 1, 3, 894), *angles(1, 1, 3, 894)) == {"rotary_mul": 1}


def test_other_head_dims_of_interleave_rope() -> None:
    given = (f(2, 5, 3, 32, dtype=BF16), *angles(1, 1, 3, 16, dtype=BF16))
    assert hits(alternate, *given) == {}
    assert hits(alternate, *given, within_limits=False) == {"interleave_rope": 1}


def test_angles_are_not_repeated_for_a_batch_that_is_a_symbol() -> None:
    given = (f(2, 5, 3, 64, dtype=BF16), *angles(1, 1, 3, 32, dtype=BF16))
    batch = dynamic_examples(given, {0: (0,)}, apart=True)
    assert not any(fused(flat(alternate, batch)).made.values())
    tokens = dynamic_examples(given, dict.fromkeys(range(3), (2,)), apart=True)
    made = fused(flat(alternate, tokens)).made
    assert not any(made.values()), "the batches differ, and the tokens are a symbol"


def test_text(golden: Callable[[str, str], None]) -> None:
    def block(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return whole(q, cos, sin), alternate(k, cos[..., :32], sin[..., :32])

    q, k = f(2, 5, 3, 64, dtype=BF16), f(2, 1, 3, 64, dtype=BF16)
    forms = both_forms(block, q, k, *angles(1, 3, 64, dtype=BF16))
    before, after = graph_text(forms.before.graph), graph_text(forms.after.graph)
    golden("rotary", f"{before}\n\n-- fused\n\n{after}")


def test_rotation_as_one_op_is_the_same_fusion() -> None:
    define_composite_ops()

    def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.ops.rolemesh.rotary(x, cos, sin, False)

    def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.ops.rolemesh.rotary(x, cos, sin, True)

    x, angles = f(2, 3, 5, 64, dtype=BF16), f(2, 1, 5, 64, dtype=BF16)
    assert hits(halves, x, angles, angles) == {"rotary_mul": 1}
    parts = (angles[..., :32].clone(), angles[..., 32:].clone())
    assert hits(halves, x, *parts) == {"rotary_mul": 1}
    assert hits(neighbours, x, *parts) == {"interleave_rope": 1}
    assert hits(halves, f(5, 64), f(5, 64), f(5, 64)) == {}
