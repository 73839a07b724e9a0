"""Gates as text: what is recorded of a model's code, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rolemesh.lowering.composite.gate import FUNCTIONS, Recorded, apply_gate, parts_of

ROWS = torch.linspace(-3, 3, 5 * 12).reshape(5, 12)
Gate = Callable[[Tensor], Tensor]


def swiglu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return nn.SiLU()(gate) * up


def clamped(rows: Tensor) -> Tensor:
    gate, up = rows[..., ::2], rows[..., 1::2]
    gate = gate.clamp(min=None, max=1.5)
    up = up.clamp(min=-1.5, max=1.5)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def tanh_form(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") / 2.0 - -(up**2)


def ungated(rows: Tensor) -> Tensor:
    return torch.square(nn.ReLU6(inplace=False)(rows))


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        (swiglu, "mul(silu(gate), up)"),
        (
            clamped,
            (
                "mul(add(clamp(odd, -1.5, 1.5), 1), mul(clamp(even, None, 1.5),"
                " sigmoid(mul(clamp(even, None, 1.5), 1.702))))"
            ),
        ),
        (tanh_form, "sub(div(gelu(gate, approximate='tanh'), 2.0), neg(pow(up, 2)))"),
        (ungated, "square(hardtanh(rows, min_val=0.0, max_val=6.0))"),
    ],
)
def test_recorded_code_computes_the_same(gate: Gate, text: str) -> None:
    recorded = gate(Recorded())  # type: ignore[arg-type]
    assert recorded.text == text  # type: ignore[attr-defined]
    for rows in (ROWS, ROWS.bfloat16()):
        assert torch.equal(apply_gate(text, rows), gate(rows))


@pytest.mark.parametrize(
    "gate",
    [
        lambda rows: rows.chunk(2, dim=0)[0],
        lambda rows: rows.chunk(3, dim=-1)[0],
        lambda rows: rows[..., :6],
        lambda rows: rows.softmax(-1),
        F.dropout,
        lambda rows: rows * torch.ones(12),
        lambda rows: rows * float("inf"),
        lambda rows: swiglu(rows.chunk(2, dim=-1)[0]),
        lambda rows: torch.where(rows > 0, rows, 0),
    ],
)
def test_other_code_is_not_recorded(gate: Gate) -> None:
    with pytest.raises((TypeError, AttributeError)):
        gate(Recorded())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mul(silu(gate), even)", "does not use one of"),
        ("mul(1, 2)", "does not use one of"),
        ("exec(rows)", "does not use one of|calls something else"),
        ("rows.data", "more than calls"),
        ("mul(rows", "is no gate"),
    ],
)
def test_other_texts_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parts_of(text)


def test_dynamo_records_the_numbers_that_a_module_has() -> None:
    class Layer(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit

        def forward(self, x: Tensor) -> Tensor:
            texts.append(Recorded().clamp(max=self.limit).text)
            return x + 1

    texts: list[str] = []
    layer = torch.compile(Layer(7.0), backend="eager")
    for limit in (7.0, 5.0):
        layer.limit = limit
        layer(ROWS)
    assert texts == ["clamp(rows, None, 7.0)", "clamp(rows, None, 5.0)"]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_work_element_by_element(name: str) -> None:
    numbers = {"add": "2", "sub": "2", "mul": "2", "div": "2", "pow": "2", "clamp": "-1, 1"}
    text = f"{name}(rows, {numbers[name]})" if name in numbers else f"{name}(rows)"
    whole = apply_gate(text, ROWS)
    torch.testing.assert_close(apply_gate(text, ROWS[:, 3:5]), whole[:, 3:5])
