"""One prefill program for any number of tokens, and a prompt in any chunks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch._inductor.config
from tests.models import forget_compiled
from torch._dynamo.utils import counters

import rolemesh
from rolemesh.compiler.api import Sharded
from rolemesh.compiler.backend import observing
from rolemesh.compiler.command.compare import named_tensors
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.models.cases import Case, load_case
from rolemesh.runtime.launch import run_processes

TOLERANCE = 2e-5  # fp32; logits and caches are of order one

CASES = [
    pytest.param(name, role, marks=pytest.mark.xdist_group(f"tokens-{name}"))
    for name, role in (
        ("llama", "prefill"),
        ("qwen3_moe", "pd_mixed"),
        ("deepseek_v32", "pd_mixed"),
    )
]


def ids(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, 200, (2, tokens), generator=generator)


def tiny_case(name: str, layers: int = 1) -> Case:
    return load_case(f"hf:{name}", tokens=13, batch=2, max_len=40, layers=layers)


@functools.cache
def setup(name: str, role: str) -> tuple[Case, Sharded]:
    """A case, and its prefill Program with a symbolic number of tokens."""
    case = tiny_case(name, 2 if name == "deepseek_v32" else 1)
    (example,), kwargs = case.fresh().phases["prefill"]
    assert isinstance(example, torch.Tensor)
    torch._dynamo.mark_dynamic(example, 1)
    with torch.no_grad():
        traced = rolemesh.trace(case.model, example, **kwargs)
        return case, rolemesh.shard(traced, {"tp": 4}, role, phase="prefill")


def run_equal(sharded: Sharded, case: Case, chunks: Sequence[torch.Tensor]) -> None:
    """Run a prompt chunk by chunk on all ranks and at once on one device, and compare."""
    kwargs, expected = (case.fresh().phases["prefill"][1] for _ in range(2))
    with torch.no_grad():
        want = case.model(torch.cat(list(chunks), 1), **expected).logits
        got = [
            rolemesh.lockstep(sharded, chunk, poison=True, check=True, **kwargs).logits  # type: ignore[attr-defined]
            for chunk in chunks
        ]
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=0, atol=TOLERANCE)
    states, wanted = named_tensors(kwargs), named_tensors(expected)
    assert states.keys() == wanted.keys()
    for name, state in states.items():
        torch.testing.assert_close(state, wanted[name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "role"), CASES)
def test_one_program_serves_every_token_count(name: str, role: str) -> None:
    case, sharded = setup(name, role)
    scope = sharded.program.scope
    assert scope is not None
    assert [str(symbol) for symbol in scope.hints] == ["T"]
    assert not scope.assumptions  # it fits every count: no pass decided by the traced one
    for tokens in (2, 7, 16):  # fewer than ranks, uneven, even
        run_equal(sharded, case, [ids(tokens)])


@pytest.mark.parametrize(("name", "role"), CASES)
def test_chunked_prefill_is_one_shot_prefill(name: str, role: str) -> None:
    case, sharded = setup(name, role)
    run_equal(sharded, case, [ids(9), ids(3), ids(11)])


@pytest.mark.xdist_group("tokens-llama")
def test_sizes_print_as_formulas() -> None:
    _, sharded = setup("llama", "prefill")
    assert "f32[2, T@tp, 72]" in sharded.as_text()


def compile_and_run(target: str) -> list[tuple[int, int, float]]:
    """After each prompt: Dynamo's graphs, our programs, and the largest error of the logits."""
    torch._inductor.config.compile_threads = 1  # a fork has no use for its parent's workers
    forget_compiled()  # nor for what it compiled, which counts towards Dynamo's limits
    counters.clear()
    case = tiny_case("llama")
    plain = copy.deepcopy(case.model)
    start = case.fresh()
    options = {"role": "pd_mixed", "mesh": {"tp": 2}, "phase": "prefill", "target": target}
    compiled = torch.compile(case.model, backend="rolemesh", options=options)
    seen: dict[int, Program] = {}

    def observe(program: Program, run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        seen[id(program)] = program
        return run()

    found = []
    with torch.no_grad(), observing(observe):
        for tokens in (13, 16, 7):
            kwargs, expected = (start.fresh().phases["prefill"][1] for _ in range(2))
            got = compiled(ids(tokens), **kwargs).logits
            error = (got - plain(ids(tokens), **expected).logits).abs().max().item()
            found.append((counters["stats"]["unique_graphs"], len(seen), error))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_torch_compile_recompiles_once(target: str) -> None:
    for found in run_processes(compile_and_run, 2, (target,), fork=True, timeout=240):
        assert isinstance(found, list)
        # The first prompt's length is taken as it is; the second makes it a symbol, for good.
        assert [graphs for graphs, _, _ in found] == [1, 2, 2]
        assert [programs for _, programs, _ in found] == [1, 2, 2]
        assert max(error for _, _, error in found) < TOLERANCE
