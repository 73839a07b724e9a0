"""RMS norm patterns: fused where they are exactly that, left alone where they are only similar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, graph_text, hits
from torch import Tensor

from rolemesh.lowering.composite.define import define_composite_ops

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [F32, BF16, F16]


def inner(x: Tensor, eps: float = 1e-6) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def weight_last(x: Tensor, weight: Tensor) -> Tensor:
    return weight * inner(x).to(x.dtype)


def weight_first(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * inner(x, 1e-5)).to(x.dtype)


def other_order(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    squares = (wide * wide).mean(wide.dim() - 1, keepdim=True)
    return ((torch.rsqrt(squares + 0.25) * wide) * weight).to(x.dtype)


def as_captured_from_the_module(x: Tensor, weight: Tensor) -> Tensor:
    """What torch.nn.RMSNorm becomes in a captured program."""
    wide = x.float()
    mean = torch.ops.aten.mean.dim(wide.pow(2), [x.dim() - 1], True)
    return (wide * torch.ops.aten.add.Scalar(mean, 1e-3).rsqrt() * weight).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (1, 7, 1), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize(
    "norm", [weight_last, weight_first, other_order, as_captured_from_the_module]
)
def test_all_forms(norm: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = f(*shape, dtype=dtype), f(shape[-1], dtype=dtype)
    assert hits(norm, x, weight) == {"rms_norm": 1}


def test_large_and_tiny_values_and_nan() -> None:
    x = torch.tensor([[1e4, -2e4, 3e4], [1e-4, 0, 1e-5], [0, 0, 0], [float("nan"), 1, 2]])
    assert hits(weight_last, x, f(3)) == {"rms_norm": 1}
    assert hits(weight_last, x.to(BF16), f(3, dtype=BF16)) == {"rms_norm": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_sum_is_a_result_too(dtype: torch.dtype) -> None:
    def block(x: Tensor, y: Tensor, weight: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        early = total * 2
        normed = weight_last(total, weight)
        return early, normed @ w, total - normed

    given = [f(2, 3, 8, dtype=dtype, seed=n) for n in (1, 2)]
    weights = f(8, dtype=dtype), f(8, 5, dtype=dtype)
    assert hits(block, *given, *weights) == {"add_rms_norm": 1}


def test_one_sum_normed_twice_is_added_once() -> None:
    def twice(x: Tensor, y: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return weight_last(total, first), weight_first(total, second)

    given = [f(3, 4, seed=n) for n in (1, 2)]
    assert hits(twice, *given, f(4, seed=3), f(4, seed=4)) == {"add_rms_norm": 1, "rms_norm": 1}


def test_sum_before_its_weight_is_fused_without_the_sum() -> None:
    def late(x: Tensor, y: Tensor, raw: Tensor) -> Tensor:
        total = x + y
        return weight_last(total, raw * 2)

    assert hits(late, f(3, 4), f(3, 4, seed=1), f(4)) == {"rms_norm": 1}


@pytest.mark.parametrize("alpha", [1, 2])
def test_scaled_addition_stays(alpha: int) -> None:
    def scaled(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return weight_last(torch.add(x, y, alpha=alpha), weight)

    name = "add_rms_norm" if alpha == 1 else "rms_norm"
    assert hits(scaled, f(3, 4), f(3, 4, seed=1), f(4)) == {name: 1}


@pytest.mark.parametrize("other", [(4,), (1, 4), (3, 1)])
def test_broadcast_addition_stays(other: tuple[int, ...]) -> None:
    def broadcast(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return weight_last(x + y, weight)

    assert hits(broadcast, f(3, 4), f(*other), f(4)) == {"rms_norm": 1}


def test_addition_of_a_number_stays() -> None:
    assert hits(lambda x, weight: weight_last(x + 1.5, weight), f(3, 4), f(4)) == {"rms_norm": 1}


def test_addition_of_another_dtype_stays() -> None:
    def mixed(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return weight_last(x + y, weight)

    assert hits(mixed, f(3, 4), f(3, 4, dtype=BF16), f(4)) == {"rms_norm": 1}


def _not_a_norm(**change: Any) -> Callable[..., Tensor]:
    """RMS norm but for one thing."""
    options: dict[str, Any] = {
        "wide": torch.Tensor.float,
        "power": lambda wide: wide.pow(2),
        "mean": lambda squares: squares.mean(-1, keepdim=True),
        "shift": lambda mean: mean + 1e-6,
        "root": torch.rsqrt,
        "scaled": lambda wide, root: wide * root,
        "end": lambda normed, weight, dtype: weight * normed.to(dtype),
    }
    options |= change

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        wide = options["wide"](x)
        root = options["root"](options["shift"](options["mean"](options["power"](wide))))
        found: Tensor = options["end"](options["scaled"](wide, root), weight, x.dtype)
        return found

    return norm


def test_the_unchanged_one_is_a_norm() -> None:
    assert hits(_not_a_norm(), f(3, 4), f(4)) == {"rms_norm": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"power": lambda wide: wide.pow(3)},
        {"power": lambda wide: (wide + 1).pow(2)},
        {"mean": lambda squares: squares.mean(0, keepdim=True)},
        {"mean": lambda squares: squares.mean((0, 1), keepdim=True)},
        {"mean": lambda squares: squares.sum(-1, keepdim=True)},
        {"mean": lambda squares: squares.mean(-1).unsqueeze(0)},
        {"mean": lambda squares: squares.mean(-1, keepdim=True, dtype=torch.float64)},
        {"shift": lambda mean: torch.add(mean, 2.0, alpha=3)},
        {"shift": lambda mean: mean + mean},
        {"shift": lambda mean: mean * 2},
        {"shift": lambda mean: mean},
        {"root": lambda mean: mean.sqrt()},
        {"scaled": lambda wide, root: wide + root},
        {"scaled": lambda wide, root: (wide * 2) * root},
        {"end": lambda normed, weight, dtype: weight + normed},
        {"end": lambda normed, weight, dtype: normed},
        {"end": lambda normed, weight, dtype: weight[:, None] * normed},
        {"end": lambda normed, weight, dtype: weight[:1] * normed},
        {"end": lambda normed, weight, dtype: weight * normed.to(BF16)},
    ],
)
def test_near_misses_in_fp32_stay(change: dict[str, Any]) -> None:
    forms = both_forms(_not_a_norm(**change), f(4, 4), f(4))
    assert not any(forms.made.values())
    assert graph_text(forms.after.graph) == graph_text(forms.before.graph)


@pytest.mark.parametrize(
    "change",
    [
        {"wide": lambda x: x},
        {"wide": lambda x: x.double()},
        {"wide": lambda x: x.float() * 2},
        {"end": lambda normed, weight, dtype: weight * normed},
        {"end": lambda normed, weight, dtype: weight * normed.to(F16)},
    ],
)
def test_near_misses_in_bf16_stay(change: dict[str, Any]) -> None:
    assert hits(_not_a_norm(**change), f(3, 4, dtype=BF16), f(4, dtype=BF16)) == {}


def test_weight_of_another_dtype_stays() -> None:
    assert hits(weight_last, f(3, 4), f(4, dtype=BF16)) == {}
    assert hits(weight_last, f(3, 4, dtype=F16), f(4, dtype=BF16)) == {}


def test_norm_in_fp32_between_casts_keeps_them() -> None:
    x, weight = f(3, 4, dtype=BF16), f(4)
    assert hits(weight_first, x, weight) == {"rms_norm": 1}
    text = graph_text(both_forms(weight_first, x, weight).after.graph)
    assert text.count("= _to_copy") == 2


def test_double_precision_and_one_dim_stay() -> None:
    forms = both_forms(weight_last, f(3, 4).double(), f(4).double())
    assert not any(forms.made.values())
    assert hits(weight_last, f(4), f(4)) == {}


@pytest.mark.parametrize("which", range(4))
def test_inner_value_that_is_needed_elsewhere_keeps_the_pattern(which: int) -> None:
    def leaks(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        squares = x.pow(2)
        mean = squares.mean(-1, keepdim=True)
        root = torch.rsqrt(mean + 1e-6)
        normed = x * root
        return weight * normed, (squares, mean, root, normed)[which] + 1

    assert hits(leaks, f(3, 4), f(4)) == {}


def test_cast_of_the_input_may_be_needed_elsewhere() -> None:
    def shares(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return weight * normed.to(x.dtype), wide.exp()

    assert hits(shares, f(3, 4, dtype=BF16), f(4, dtype=BF16)) == {"rms_norm": 1}


def test_text(golden: Callable[[str, str], None]) -> None:
    def block(x: Tensor, y: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        total = weight_first(x, first) + y
        return total, weight_last(total, second)

    examples = [f(2, 3, 8, dtype=BF16), f(2, 3, 8, dtype=BF16)]
    forms = both_forms(block, *examples, f(8, dtype=BF16), f(8, dtype=BF16))
    before, after = graph_text(forms.before.graph), graph_text(forms.after.graph)
    golden("rms_norm", f"{before}\n\n-- fused\n\n{after}")


def test_norm_as_one_op_is_the_same_fusion() -> None:
    define_composite_ops()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.rolemesh.rms_norm(x, weight, 1e-6, True)

    def norm_of_sum(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        return norm(a + b, weight)

    for dtype in (F32, BF16):
        x, weight = f(2, 3, 8, dtype=dtype), f(8, dtype=dtype)
        assert hits(norm, x, weight) == {"rms_norm": 1}
        assert hits(norm_of_sum, x, x, weight) == {"add_rms_norm": 1}
    assert hits(norm, f(8), f(8)) == {}
    assert hits(norm, f(3, 8, dtype=BF16), f(8)) == {}
