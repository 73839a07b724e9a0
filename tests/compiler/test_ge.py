"""Every role on GE graphs: what the single device computes, and the traffic the Program says.

All ranks' GE graphs are converted by torchair and run in this process. The whole check command runs
for each model and role; the traffic of each collective is compared with the Program's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from tests.models import LAYERS, Prompt, Setup, traced

from rolemesh.compiler.api import lockstep, lower, shard
from rolemesh.compiler.check import check
from rolemesh.compiler.check_options import CheckOptions
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.roles import ROLES
from rolemesh.runtime.ge.communicator import Request, group_ranks

# Relative to the largest magnitude of each tensor, as the check compares.
TOLERANCE = 1e-5


def setups() -> Iterator[tuple[str, str, str | None]]:
    yield "llama", "sdpa", None
    yield "llama", "eager", None
    for model in ("deepseek_v32", "qwen3_moe", "gpt_oss"):
        yield model, "sdpa" if model != "gpt_oss" else "eager", "batched_mm"
        yield model, "eager", "grouped_mm"


def cases() -> Iterator[object]:
    for model, attn, experts in setups():
        group = f"ge-{model}-{attn}-{experts}"
        for role in ROLES:
            yield pytest.param(
                model, attn, experts, role, id=f"{group}-{role}", marks=pytest.mark.xdist_group(group)
            )


def options(model: str, role: str, **given: object) -> CheckOptions:
    settings: dict[str, object] = {
        "target": "ge",
        "tolerance": TOLERANCE,
        "layers": LAYERS[model],
        "decode_steps": 1 if model == "gpt_oss" else 2,
    }
    return CheckOptions(f"hf:{model}", role, Mesh({"tp": 4}), **{**settings, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "attn", "experts", "role"), cases())
def test_the_check_command_passes(model: str, attn: str, experts: str | None, role: str) -> None:
    report = check(options(model, role, attn=attn, experts=experts))
    assert report.ok, report.as_text()
    for phase in report.phases:
        assert phase.collectives


@pytest.mark.parametrize("role", ROLES)
def test_bf16_differs_as_eager_does(role: str) -> None:
    report = check(options("llama", role, dtype="bf16", tolerance=None))
    assert report.ok, report.as_text()


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_that_the_graph_allows_gives_the_same(seed: int) -> None:
    report = check(options("llama", "pd_mixed", target_options=(f"order_seed={seed}",)))
    assert report.ok, report.as_text()


@pytest.mark.parametrize("model", ["deepseek_v32", "qwen3_moe"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("step", [None, 0])
def test_the_graph_moves_what_the_program_says(model: str, role: str, step: int | None) -> None:
    phase = "prefill" if step is None else "decode"
    if phase not in ROLES[role].phases:
        pytest.skip(f"{role} does not run {phase}")
    setup = Setup(model, "sdpa", "batched_mm")
    found = traced(setup, Prompt(3, 13), step)
    sharded = shard(found, {"tp": 4}, role, phase=phase)
    said: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    moved: list[Counter[tuple[str, tuple[int, ...], int]]] = [Counter() for _ in range(4)]

    def expect(node: object, group: tuple[int, ...], size: int) -> None:
        op = node.target.name.removesuffix("_start")  # type: ignore[attr-defined]
        said[op, group, size] += 1

    def observe(rank: int, request: Request, size: int) -> None:
        moved[rank][request.kind, group_ranks(request.group)[1], size] += 1

    program = sharded.program
    inputs = [[torch.zeros(0)]]
    from rolemesh.compiler.ir.program import tensor_type
    from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs

    whole = [torch.zeros(tensor_type(n).shape, dtype=tensor_type(n).dtype) for n in program.placeholders]
    inputs = scatter_inputs(program, whole)
    run_lockstep(program, inputs, ledger=expect)
    ranks = lower(sharded, "ge").lockstep().ranks
    ranks(scatter_inputs(program, whole), observe)
    assert moved == [said] * 4
