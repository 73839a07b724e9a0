"""Saved programs are called like the model: same results, same checks, and nothing is traced."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.compiler.artefact.small import Model, assert_same, call, lowered, saved
from tests.models import Prompt, Setup, model_of, reference, run_sharded, start, traced
from torch import Tensor

import rolemesh
from rolemesh.compiler.artefact.load import Loaded, open_artefact
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import tensor_type


@pytest.fixture
def nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything is unpickled, or if Dynamo or AOTAutograd is asked to compile."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("this is not for loading")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (torch, "compile"),
        (torch._dynamo, "optimize"),
        (torch._dynamo.convert_frame, "convert_frame_assert"),
        (torch._functorch.aot_autograd, "aot_module_simplified"),
        (torch._functorch.aot_autograd, "create_aot_dispatcher_function"),
    ):
        monkeypatch.setattr(module, name, refused, raising=name != "create_aot_dispatcher_function")


@pytest.fixture
def nothing_is_traced_after(request):
    """Forbid tracing from the moment it is called."""
    return lambda: request.getfixturevalue("nothing_is_traced")


@pytest.mark.xdist_group("deepseek_v32-sdpa-grouped_mm-B3")  # the traces are test_equality's too
def test_prefill_and_decode_of_a_language_model(tmp_path, nothing_is_traced_after):
    setup, prompt = Setup("deepseek_v32", "sdpa", "grouped_mm"), Prompt(3, 25)
    want = reference(setup, prompt, 3)
    programs = []
    for phase, trace in (
        ("prefill", traced(setup, prompt)),
        ("decode", traced(setup, prompt._replace(tokens=5), 0)),
    ):
        sharded = rolemesh.shard(trace, {"tp": 2}, "pd_mixed", phase=phase)
        programs.append(rolemesh.lower(sharded))
    rolemesh.save(programs, tmp_path / "artefact")
    nothing_is_traced_after()
    prefill, decode = open_artefact(tmp_path / "artefact", copy.deepcopy(model_of(setup)))
    ids, cache = start(setup, prompt)
    for program, given, state in ((prefill, ids, want[0]), (decode, want[0].tokens, want[1])):
        got = run_sharded(program.sharded, given, cache)
        torch.testing.assert_close(got.logits, state.logits, rtol=1e-4, atol=1e-4)
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-4, atol=1e-4)
    for program, made in zip((prefill, decode), programs, strict=True):
        assert program.sharded.as_text() == made.sharded.as_text()
        assert str(program.sharded.traced.program) == str(made.sharded.traced.program)
        signature, captured = program.sharded.captured, made.sharded.traced.program
        assert (signature.inputs, signature.outputs) == (captured.inputs, captured.outputs)
        nodes = zip(signature.placeholders, captured.placeholders, strict=True)
        assert all(tensor_type(mine) == tensor_type(theirs) for mine, theirs in nodes)


@pytest.mark.parametrize("symbolic", [False, True])
def test_results_and_caches_are_the_models(symbolic, tmp_path, nothing_is_traced_after):
    path = saved(tmp_path, symbolic=symbolic)
    nothing_is_traced_after()
    (program,) = open_artefact(path, Model())
    for tokens in (5, 3, 7) if symbolic else (5,):
        mine, other = call(tokens), call(tokens)
        want = other.of(Model())

        def run(*args: object, **kwargs: object) -> object:
            return rolemesh.lockstep(program.sharded, *args, **kwargs)

        got = mine.of(run)
        assert_same(got, want)
        assert got["state"] is mine.state
        torch.testing.assert_close(mine.state.cache, other.state.cache)


def differing(case: str) -> tuple[tuple[object, ...], dict[str, object], str]:
    """Arguments of a call that is not like the traced one, and what says so."""
    given = call()
    args, kwargs = [given.x, given.state], {"at": given.at, "bias": given.bias}
    text = {
        "rank": "x: float32 [5, 6] when it was saved, float32 [5, 6, 1] now",
        "shape": "x: float32 [5, 6] when it was saved, float32 [4, 6] now",
        "dtype": "x: float32 [5, 6] when it was saved, float64 [5, 6] now",
        "value": "state.scale: 2.0 when it was saved, 3.0 now",
        "type": "state: type tests.compiler.artefact.small.State when it was saved, type",
        "absent": "the arguments: at, bias, state, x when it was saved, at, state, x now",
        "more": "the arguments: at, bias, state, x when it was saved, at, bias, flag, state, x now",
        "missing": "missing a required argument: 'at' now",
        "key": "at['rows']: a tensor when it was saved, absent now",
        "device": "bias.device: cpu when it was saved, meta now",
        "memory": "state.cache: has memory of its own when it was saved, shares memory with x now",
    }[case]
    match case:
        case "rank":
            args[0] = given.x[..., None]
        case "shape":
            args[0] = given.x[:4]
        case "dtype":
            args[0] = given.x.double()
        case "value":
            given.state.scale = 3.0
        case "type":
            args[1] = type("Other", (), vars(given.state))()
        case "absent":
            del kwargs["bias"]
        case "more":
            kwargs["flag"] = True
        case "missing":
            del kwargs["at"]
        case "key":
            kwargs["at"] = {"columns": given.at["rows"]}
        case "device":
            kwargs["bias"] = given.bias.to("meta")
        case "memory":
            args[0] = given.state.cache[:5, :6]
    return tuple(args), kwargs, text


@pytest.mark.parametrize(
    "case",
    [
        "rank",
        "shape",
        "dtype",
        "value",
        "type",
        "absent",
        "more",
        "missing",
        "key",
        "device",
        "memory",
    ],
)
def test_other_arguments_are_refused(case, tmp_path):
    (program,) = open_artefact(saved(tmp_path), Model())
    args, kwargs, text = differing(case)
    before = None if case in ("device", "type") else args[1].cache.clone()
    with pytest.raises(RolemeshError) as caught:
        rolemesh.lockstep(program.sharded, *args, **kwargs)
    assert caught.value.code == "RM020"
    assert text in caught.value.where
    if before is not None:
        torch.testing.assert_close(args[1].cache, before, rtol=0, atol=0)


def test_sizes_that_the_symbols_do_not_allow(tmp_path):
    (program,) = open_artefact(saved(tmp_path, symbolic=True), Model())
    given = call(1)
    with pytest.raises(RolemeshError, match=r"2 or more when it was saved, 1 now"):
        given.of(lambda *args, **kwargs: rolemesh.lockstep(program.sharded, *args, **kwargs))
    given = call(4)._replace(at={"rows": torch.arange(3)})
    with pytest.raises(RolemeshError, match=r"at\['rows'\]: int64"):
        given.of(lambda *args, **kwargs: rolemesh.lockstep(program.sharded, *args, **kwargs))


def test_weights_are_read_at_each_call(tmp_path):
    model = Model()
    (program,) = open_artefact(saved(tmp_path), model)
    model.up.weight = torch.nn.Parameter(model.up.weight * 2, requires_grad=False)
    other = call()
    want = other.of(model)
    got = call().of(lambda *args, **kwargs: rolemesh.lockstep(program.sharded, *args, **kwargs))
    assert_same(got, want)


class Changing(torch.nn.Module):
    """Counts its calls in an attribute of an argument."""

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        counts.append(1)
        return x + 1


class Viewing(torch.nn.Module):
    """Returns a view of its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return x[1:]


@pytest.mark.parametrize(
    ("function", "args", "text"),
    [
        (Changing(), (torch.ones(3), []), "it changes counts"),
        (Viewing(), (torch.ones(3),), "outputs share memory with inputs"),
        (torch.sin, (torch.ones(3),), "it is a function"),
    ],
)
def test_what_cannot_be_saved_says_why(function, args, text, tmp_path):
    sharded = rolemesh.shard(rolemesh.trace(function, *args), {"tp": 2})
    with pytest.raises(RolemeshError, match=text) as caught:
        rolemesh.save(rolemesh.lower(sharded), tmp_path / "artefact")
    assert caught.value.code == "RM044"
    assert not any(tmp_path.iterdir())


def test_programs_of_one_artefact_are_lowered_alike(tmp_path):
    with pytest.raises(RolemeshError, match="different meshes, roles, options or targets"):
        rolemesh.save([lowered(), lowered(ranks=3)], tmp_path / "artefact")
    with pytest.raises(RolemeshError, match="there are no programs"):
        rolemesh.save([], tmp_path / "artefact")


def test_a_phase_that_no_program_has():
    with rolemesh.phase("decode"), pytest.raises(RolemeshError, match="no program for phase"):
        Loaded(())()
