"""Executors behind Dynamo's compiled function, and inputs whose storage is freed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.compiler.capture.backends import capturing
from torch import Tensor

from rolemesh.compiler.capture.entry import Captured, executing, reference_executor, run_graph
from rolemesh.compiler.capture.tracing import trace


def update(state: Tensor, x: Tensor) -> Tensor:
    state.add_(x)
    return state.sum()


def zeros(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
    return [torch.zeros(4, 4), torch.tensor(-1.0)]


def compiled_update(into: list[Captured]) -> Callable[..., object]:
    compiled: Callable[..., object] = torch.compile(update, backend=capturing(into), fullgraph=True)
    return compiled


def test_the_executor_can_be_replaced_for_a_while() -> None:
    found: list[Captured] = []
    compiled = compiled_update(found)
    state = torch.ones(4, 4)
    assert compiled(state, torch.ones(4, 4)) == 32
    assert torch.equal(state, torch.full((4, 4), 2.0))
    with executing(found[0], zeros):
        assert compiled(state, torch.ones(4, 4)) == -1
    assert torch.equal(state, torch.zeros(4, 4))
    assert compiled(state, torch.ones(4, 4)) == 16


def test_a_replacement_concerns_one_graph() -> None:
    found: list[Captured] = []
    compiled = compiled_update(found)
    other = trace(update, torch.ones(4, 4), torch.ones(4, 4)).entry.captured
    with executing(other, zeros):
        assert compiled(torch.ones(4, 4), torch.ones(4, 4)) == 32
    with executing(None, zeros):
        assert compiled(torch.ones(4, 4), torch.ones(4, 4)) == -1


def test_a_replacement_ends_with_an_exception() -> None:
    found: list[Captured] = []
    compiled = compiled_update(found)
    compiled(torch.ones(4, 4), torch.ones(4, 4))

    def fail(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), executing(found[0], fail):
        compiled(torch.ones(4, 4), torch.ones(4, 4))
    assert compiled(torch.ones(4, 4), torch.ones(4, 4)) == 32


def test_executors_return_every_output() -> None:
    entry = trace(update, torch.ones(4, 4), torch.ones(4, 4)).entry
    with pytest.raises(ValueError, match="returned 1 values for 2 outputs"):
        entry.call(lambda captured, inputs: inputs[:1], torch.ones(4, 4), torch.ones(4, 4))


def test_executors_get_inputs_in_the_programs_order_with_constants_last() -> None:
    def f(x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0])

    seen: list[list[Tensor]] = []

    def spy(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
        seen.append(inputs)
        return reference_executor(captured, inputs)

    x = torch.zeros(2)
    got = trace(f, x).entry.call(spy, x)
    assert isinstance(got, Tensor)
    assert got.tolist() == [1.0, 2.0]
    assert seen[0][0] is x
    assert seen[0][1].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("inference", [False, True])
def test_a_freed_input_may_stand_for_its_own_new_value(inference: bool) -> None:
    with torch.inference_mode(inference):
        state = torch.ones(4, 4)
        entry = trace(update, state, torch.ones(4, 4)).entry
        state.untyped_storage().resize_(0)

        def elsewhere(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
            assert inputs[0] is state
            return [state, torch.tensor(7.0)]

        assert entry.call(elsewhere, state, torch.ones(4, 4)) == 7
        assert state.untyped_storage().nbytes() == 0
        assert state.shape == (4, 4)


def test_a_freed_input_can_be_traced() -> None:
    state = torch.ones(4, 4)
    state.untyped_storage().resize_(0)
    program = trace(update, state, torch.ones(4, 4)).program
    assert [entry.mutated for entry in program.inputs] == [True, False]


def test_run_graph_interprets_a_program() -> None:
    program = trace(update, torch.ones(4, 4), torch.ones(4, 4)).program
    state = torch.ones(4, 4)
    value, total = run_graph(program.graph, [state, torch.ones(4, 4)])
    assert total == 32
    assert torch.equal(value, torch.full((4, 4), 2.0))
    assert torch.equal(state, torch.ones(4, 4))
