"""Integers that shape nothing become scalar tensors; those that do are symbols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tests.compiler.capture.backends import capturing
from tests.models import forget_compiled
from torch import Tensor

from rolemesh.compiler.capture.entry import Captured
from rolemesh.compiler.ir.program import InputKind, tensor_type
from rolemesh.compiler.models.cases import language_model_case
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model


@dataclass
class State:
    """Counts in a Python int, as caches do. Dynamo passes it as an input once it has changed."""

    seen: int = 3


def run(
    use: Callable[[Tensor, int], Tensor], calls: int
) -> tuple[list[Captured], list[Tensor], State]:
    found: list[Captured] = []

    def step(x: Tensor, state: State) -> Tensor:
        y = use(x, state.seen)
        state.seen = state.seen + 1
        return y

    forget_compiled()
    compiled = torch.compile(step, backend=capturing(found), fullgraph=True)
    state = State()
    return found, [compiled(torch.arange(4), state) for _ in range(calls)], state


@pytest.mark.parametrize(
    "use",
    [
        lambda x, n: x + n,
        lambda x, n: x - (n - 2),
        lambda x, n: x * (n * 2) + max(n - 5, 0),
        lambda x, n: x.float() * min(n + 1, 6),
    ],
)
def test_an_integer_that_shapes_nothing_is_a_scalar_tensor(
    use: Callable[[Tensor, int], Tensor],
) -> None:
    found, got, state = run(use, 5)
    assert len(found) <= 3
    last = found[-1].program
    (entry,) = (entry for entry in last.inputs if entry.name == "state.seen")
    assert entry.kind is InputKind.USER
    assert tensor_type(last.placeholders[last.inputs.index(entry)]) == ((), torch.int64)
    for index, value in enumerate(got):
        torch.testing.assert_close(value, use(torch.arange(4), 3 + index))
    assert type(state.seen) is int
    assert state.seen == 8


@pytest.mark.parametrize(
    "use",
    [
        lambda x, n: x.new_zeros(n),
        lambda x, n: x.roll(n),
        lambda x, n: x + 10 // n,
        lambda x, n: x + (10 - n),
        lambda x, n: torch.full((2,), n),
        lambda x, n: (x < n) + 0,
    ],
)
def test_an_integer_that_ops_need_as_one_is_a_symbol(
    use: Callable[[Tensor, int], Tensor],
) -> None:
    found, got, state = run(use, 4)
    assert len(found) <= 3
    scope = found[-1].program.scope
    assert scope is not None
    assert len(scope.hints) == 1
    for index, value in enumerate(got):
        torch.testing.assert_close(value, use(torch.arange(4), 3 + index))
    assert state.seen == 7


def test_a_sliding_window_decodes_without_a_capture_a_step() -> None:
    pytest.importorskip("transformers")
    model = tiny_model(tiny_config("gpt_oss", layers=1, attn="eager"))
    case = language_model_case(model, tokens=4, max_len=16, decode_steps=5)
    expected = case.fresh()
    found: list[Captured] = []
    forget_compiled()
    compiled = torch.compile(model, backend=capturing(found), fullgraph=True)
    with torch.no_grad():
        for phase, (args, kwargs) in case.phases.items():
            got = compiled(*args, **kwargs)
            want = model(*expected.phases[phase][0], **expected.phases[phase][1])
            torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    assert len(found) <= 4
    assert "past_key_values.layers[0].cumulative_length_int" in [
        entry.name for entry in found[-1].program.inputs
    ]
