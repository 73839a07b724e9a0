"""GE graphs for any number of tokens: whole models, in one process and as ranks of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("transformers")

from tests.lowering.ge.symbolic_mixer import ANNOTATIONS, mixer, mixer_input
from tests.models import forget_compiled

import rolemesh
from rolemesh.compiler.backend import observing
from rolemesh.compiler.command.compare import named_tensors
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.models.cases import load_case
from rolemesh.runtime.launch import run_processes

TOLERANCE = 2e-5  # fp32; logits and caches are of order one


def ids(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(3, 200, (2, tokens), generator=generator)


@pytest.mark.parametrize(
    ("name", "role", "ranks"), [("llama", "pd_mixed", 3), ("qwen3_moe", "prefill", 2)]
)
def test_one_graph_a_rank_serves_every_token_count(name: str, role: str, ranks: int) -> None:
    case = load_case(f"hf:{name}", tokens=13, batch=2, max_len=24, layers=1)
    start = case.fresh()
    example = ids(13)
    torch._dynamo.mark_dynamic(example, 1)
    with torch.no_grad():
        traced = rolemesh.trace(case.model, example, **start.fresh().phases["prefill"][1])
        sharded = rolemesh.shard(traced, {"tp": ranks}, role, phase="prefill")
        run = rolemesh.lower(sharded, "ge").lockstep()
        for tokens in (13, 16, 7, 4):  # 16 and 4 are numbers of heads, experts or rows as well
            given, wanted = (start.fresh().phases["prefill"][1] for _ in range(2))
            want = case.model(ids(tokens), **wanted).logits
            got = run(ids(tokens), poison=True, **given).logits  # type: ignore[attr-defined]
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
            states, expected = named_tensors(given), named_tensors(wanted)
            assert states.keys() == expected.keys()
            for key, state in states.items():
                torch.testing.assert_close(state, expected[key], rtol=0, atol=TOLERANCE)
    assert len(run.programs) == 1


def compile_and_run() -> list[tuple[int, int, float]]:
    """For each target: Dynamo's graphs, our programs, and the largest error."""
    warnings.simplefilter("ignore")
    seen: dict[int, Program] = {}

    def observe(program: Program, run: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        seen[id(program)] = program
        return run()

    found = []
    for target, target_options in (("ge", {"device": "npu"}), ("npugraph_ex", {})):
        forget_compiled()
        counters.clear()
        options = {
            "mesh": {"tp": 2},
            "annotations": ANNOTATIONS,
            "target": target,
            "target_options": target_options,
        }
        compiled, plain = torch.compile(mixer(), backend="rolemesh", options=options), mixer()
        error, before = 0.0, len(seen)
        with torch.no_grad(), observing(observe):
            for batch, tokens in ((2, 13), (3, 6), (5, 7), (3, 6), (4, 2)):
                x = mixer_input(batch, tokens, dynamic=True)
                for got, want in zip(compiled(x), plain(x), strict=True):
                    error = max(error, (got - want).abs().max().item())
        found.append((counters["stats"]["unique_graphs"], len(seen) - before, error))
    return found


@pytest.mark.processes
def test_torch_compile_makes_one_program_and_one_for_single_tokens() -> None:
    for found in run_processes(f"{__file__}:compile_and_run", 2):
        assert [counts for *counts, _ in found] == [[1, 2], [1, 2]]  # type: ignore[attr-defined]
        assert max(error for *_, error in found) < TOLERANCE  # type: ignore[attr-defined]
