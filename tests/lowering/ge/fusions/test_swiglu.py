"""SwiGLU of packed projections, and products that are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.lowering.ge.fusions.forms import both_forms, f, graph_text, hits
from torch import Tensor
from torch.nn.functional import silu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def chunked(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) * up


def sliced(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x[..., half:] * silu(x[..., :half])


def split(x: Tensor) -> Tensor:
    gate, up = x.split([x.shape[-1] // 2] * 2, x.dim() - 1)
    return silu(gate) * up


def from_the_end(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return silu(x[..., :-half]) * x[..., -half:]


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 2), (2, 3, 1, 14)], ids=str)
@pytest.mark.parametrize("form", [chunked, sliced, split, from_the_end])
def test_all_forms(
    form: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert hits(form, f(*shape, dtype=dtype)) == {"swiglu": 1}


def test_halves_of_another_dim() -> None:
    def first(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, 1)
        return silu(gate) * up

    forms = both_forms(first, f(3, 4, 5))
    assert hits(first, f(3, 4, 5)) == {"swiglu": 1}
    assert "npu_swiglu.default(x_1, 1)" in graph_text(forms.after.graph)


def test_halves_may_be_needed_elsewhere() -> None:
    def shares(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, -1)
        return silu(gate) * up, gate - up

    assert hits(shares, f(3, 8)) == {"swiglu": 1}


def gate_is_second(x: Tensor) -> Tensor:
    up, gate = x.chunk(2, -1)
    return silu(gate) * up


def uneven(x: Tensor) -> Tensor:
    return silu(x[..., :3]) * x[..., 5:]


def gap(x: Tensor) -> Tensor:
    return silu(x[..., :3]) * x[..., 4:7]


def overlap(x: Tensor) -> Tensor:
    return silu(x[..., :4]) * x[..., 3:7]


def thirds(x: Tensor) -> Tensor:
    gate, up, _ = x[..., :6].split(2, -1)
    return silu(gate) * up


def alternate(x: Tensor) -> Tensor:
    return silu(x[..., ::2]) * x[..., 1::2]


def same_half(x: Tensor) -> Tensor:
    gate, _ = x.chunk(2, -1)
    return silu(gate) * gate


def other_dims(x: Tensor) -> Tensor:
    return silu(x[:4]) * x[:, 4:].t()


def other_activation(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate.sigmoid() * up


def added(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return silu(gate) + up


def needed_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x.chunk(2, -1)
    activated = silu(gate)
    return activated * up, activated.exp()


def scaled(x: Tensor) -> Tensor:
    gate, _ = x.chunk(2, -1)
    return silu(gate) * 2.0


@pytest.mark.parametrize(
    "form",
    [
        gate_is_second,
        uneven,
        gap,
        overlap,
        thirds,
        alternate,
        same_half,
        other_dims,
        other_activation,
        added,
        needed_activation,
        scaled,
    ],
)
def test_near_misses_stay(form: Callable[[Tensor], Tensor]) -> None:
    assert hits(form, f(8, 8)) == {}


def test_two_tensors_stay() -> None:
    def separate(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up

    def two_packed(x: Tensor, y: Tensor) -> Tensor:
        return silu(x[..., :3]) * y[..., 3:]

    assert hits(separate, f(3, 6), f(3, 6, seed=1)) == {}
    assert hits(two_packed, f(4, 6), f(4, 6, seed=1)) == {}


def test_double_precision_and_nine_dims_stay() -> None:
    forms = both_forms(chunked, f(3, 4).double())
    assert not any(forms.made.values())
    assert hits(chunked, f(1, 1, 1, 1, 1, 1, 1, 3, 4)) == {}
    assert hits(chunked, f(1, 1, 1, 1, 1, 1, 3, 4)) == {"swiglu": 1}


def test_text(golden: Callable[[str, str], None]) -> None:
    def mlp(x: Tensor, packed: Tensor, down: Tensor) -> Tensor:
        return chunked(x @ packed) @ down

    forms = both_forms(mlp, f(3, 5), f(5, 14), f(7, 5))
    before, after = graph_text(forms.before.graph), graph_text(forms.after.graph)
    golden("swiglu", f"{before}\n\n-- fused\n\n{after}")
