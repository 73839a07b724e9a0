"""`trace`: nothing runs, any executor can, and other arguments are refused with the difference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.models import forget_compiled
from torch import Tensor, nn

from rolemesh.compiler.capture.entry import Captured, reference_executor
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import InputKind, Program
from rolemesh.compiler.models.cases import cache_tensors, language_model_case
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor, scale: int = 2) -> dict[str, Tensor | int]:
        self.calls += 1
        self.total.add_(x[0])
        return {"y": x * scale, "scale": scale}


class Scale(nn.Module):
    def forward(self, x: Tensor, scale: int = 2) -> dict[str, Tensor]:
        return {"y": x * scale}


def test_tracing_runs_nothing() -> None:
    model = Counter()
    trace(model, torch.ones(2, 3))
    assert model.calls == 0
    assert torch.equal(model.total, torch.zeros(3))


def test_dynamos_limit_on_compilations_does_not_limit_traces() -> None:
    with torch._dynamo.config.patch(accumulated_recompile_limit=2):
        for columns in (2, 3, 4, 5):
            traced = trace(Scale(), torch.ones(2, columns))
            assert traced.entry.call(reference_executor, torch.ones(2, columns)) is not None


def test_a_call_binds_arguments_and_rebuilds_outputs() -> None:
    model = Counter()
    traced = trace(model, torch.ones(2, 3), scale=3)
    got = traced.entry.call(reference_executor, torch.full((2, 3), 2.0), scale=3)
    assert isinstance(got, dict)
    assert got["scale"] == 3
    assert torch.equal(got["y"], torch.full((2, 3), 6.0))
    assert torch.equal(model.total, torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda entry: entry.call(reference_executor, torch.ones(4, 3)),
            "tensor 'x' size mismatch",
        ),
        (
            lambda entry: entry.call(reference_executor, torch.ones(2, 3).double()),
            "tensor 'x' dtype mismatch",
        ),
        (lambda entry: entry.call(reference_executor, torch.ones(2, 3), scale=5), "scale == 2"),
    ],
    ids=["shape", "dtype", "value"],
)
def test_other_arguments_are_refused(call: Callable[..., object], says: str) -> None:
    entry = trace(Scale(), torch.ones(2, 3)).entry
    with pytest.raises(RolemeshError, match=r"^\[RM020\]") as caught:
        call(entry)
    assert says in caught.value.where
    entry.call(reference_executor, torch.ones(2, 3))


def test_a_plain_value_that_a_call_changes_is_named() -> None:
    model = Counter()
    entry = trace(model, torch.ones(2, 3)).entry
    entry.call(reference_executor, torch.ones(2, 3))
    assert model.calls == 1
    with pytest.raises(RolemeshError, match=r"^\[RM020\]") as caught:
        entry.call(reference_executor, torch.ones(2, 3))
    assert caught.value.where == "self.calls == 0"


def test_grad_and_inference_modes_are_those_of_the_trace() -> None:
    entry = trace(Scale(), torch.ones(2, 3)).entry
    with torch.no_grad():
        entry.call(reference_executor, torch.ones(2, 3))
    x = torch.ones(2, 3)
    with torch.inference_mode():
        entry.call(reference_executor, x)


def test_a_reset_of_dynamo_is_named() -> None:
    entry = trace(Scale(), torch.ones(2, 3)).entry
    forget_compiled()
    with pytest.raises(RolemeshError, match=r"torch\._dynamo\.reset\(\) was called"):
        entry.call(reference_executor, torch.ones(2, 3))


def test_many_traces_of_one_model_live_side_by_side() -> None:
    model = Scale()
    entries = [trace(model, torch.ones(rows, 3)).entry for rows in range(1, 13)]
    for rows, entry in enumerate(entries, 1):
        got = entry.call(reference_executor, torch.ones(rows, 3))
        assert isinstance(got, dict)
        assert got["y"].shape == (rows, 3)


def test_an_executors_own_errors_pass() -> None:
    entry = trace(Scale(), torch.ones(2, 3)).entry

    def breaks(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
        torch.compile(lambda x: torch._dynamo.graph_break(), fullgraph=True)(inputs[0])
        return inputs

    with pytest.raises(torch._dynamo.exc.Unsupported):
        entry.call(breaks, torch.ones(2, 3))
    with pytest.raises(TypeError, match="missing 1 required"):
        entry.call(reference_executor)


def graph_break(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x + 1


def bug(x: Tensor) -> Tensor:
    raise ValueError("no such mode")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (graph_break, "Call to `torch._dynamo.graph_break()`"),
        (bug, "no such mode"),
        (lambda x: x @ torch.ones(7, 7), "must have same reduction dim"),
    ],
    ids=["break", "exception", "shapes"],
)
def test_failed_captures_say_why_and_where(function: Callable[[Tensor], Tensor], says: str) -> None:
    with pytest.raises(RolemeshError, match=r"^\[RM023\] .* cannot be captured") as caught:
        trace(function, torch.ones(2, 3))
    assert says in caught.value.why
    assert "test_tracing.py:" in caught.value.where
    assert len(caught.value.why.splitlines()) <= 4


def test_nothing_captured_is_an_error() -> None:
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RolemeshError, match=r"^\[RM023\] .* compiled nothing"),
    ):
        trace(lambda x: x + 1, torch.ones(2))


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("deepseek_v32", {"layers": 2}),
        ("llama", {"layers": 1}),
        ("gpt_oss", {"layers": 2, "attn": "eager"}),
        ("qwen3_moe", {"layers": 1, "experts": "grouped_mm"}),
    ],
)
def test_language_models(model_type: str, options: dict[str, object]) -> None:
    pytest.importorskip("transformers")
    model = tiny_model(tiny_config(model_type, **options))
    case = language_model_case(model, tokens=5, max_len=8)
    expected = case.fresh()
    for phase, (args, kwargs) in case.phases.items():
        before = copy.deepcopy(cache_tensors(kwargs["past_key_values"]))
        traced = trace(model, *args, **kwargs)
        for name, tensor in cache_tensors(kwargs["past_key_values"]).items():
            assert torch.equal(tensor, before[name]), name
        got = traced.entry.call(reference_executor, *args, **kwargs)
        with torch.no_grad():
            want = model(*expected.phases[phase][0], **expected.phases[phase][1])
        assert type(got) is type(want)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
        _check_names(traced.program, model, before)
    caches = [c.phases["decode"][1]["past_key_values"] for c in (case, expected)]
    for got_tensor, want_tensor in zip(
        cache_tensors(caches[0]).values(), cache_tensors(caches[1]).values(), strict=True
    ):
        torch.testing.assert_close(got_tensor, want_tensor, rtol=1e-4, atol=1e-5)


def _check_names(program: Program, model: nn.Module, caches: dict[str, Tensor]) -> None:
    inputs = {entry.name: entry for entry in program.inputs}
    weights = {name for name, entry in inputs.items() if entry.kind is InputKind.PARAMETER}
    assert weights <= {name for name, _ in model.named_parameters()}
    assert any(name.startswith("model.layers.0.self_attn.") for name in weights)
    assert inputs["input_ids"].kind is InputKind.USER
    for path in caches:  # layers.0.keys -> past_key_values.layers[0].keys
        folder, index, name = path.split(".", 2)
        assert inputs[f"past_key_values.{folder}[{index}].{name}"].mutated
    mutated = [program.inputs[o.mutates].name for o in program.outputs if o.mutates is not None]
    assert mutated == [name for name, entry in inputs.items() if entry.mutated]
