"""Every role on GE graphs: what the single device computes, and the traffic the Program says.

All ranks' GE graphs are converted by torchair and run in this process. The whole check command runs
for each model and role; the traffic of each collective is compared with the Program's own.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import fx

pytest.importorskip("transformers")

from tests.models import Prompt, Setup, traced

from rolemesh.compiler.api import lower, shard
from rolemesh.compiler.command.check import check
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import tensor_type
from rolemesh.compiler.roles import ROLES
from rolemesh.runtime.ge.communicator import Request, group_ranks
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs

# Relative to the largest magnitude of each tensor, as the check compares.
TOLERANCE = 1e-5


# Every model with every role, and every form of attention and experts.
CASES = (
    ("llama", "sdpa", None, tuple(ROLES)),
    ("deepseek_v32", "sdpa", "batched_mm", tuple(ROLES)),
    ("deepseek_v32", "eager", "grouped_mm", ("decode",)),
    ("qwen3_moe", "sdpa", "grouped_mm", tuple(ROLES)),
    ("qwen3_moe", "eager", "batched_mm", ("prefill",)),
    ("gpt_oss", "eager", "grouped_mm", tuple(ROLES)),
)


def cases() -> list[object]:
    return [
        pytest.param(model, attn, experts, role, id=f"{model}-{attn}-{experts}-{role}")
        for model, attn, experts, roles in CASES
        for role in roles
    ]


def options(model: str, role: str, **given: object) -> CheckOptions:
    settings: dict[str, object] = {
        "target": "ge",
        "tolerance": TOLERANCE,
        "layers": 2,
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
    report = check(options("llama", "decode", target_options=(f"order_seed={seed}",)))
    assert report.ok, report.as_text()


@pytest.mark.parametrize(
    ("model", "role", "step"),
    [
        ("deepseek_v32", "prefill", None),
        ("deepseek_v32", "pd_mixed", 0),
        ("qwen3_moe", "decode", 0),
        ("qwen3_moe", "pd_mixed", None),
    ],
)
def test_the_graph_moves_what_the_program_says(model: str, role: str, step: int | None) -> None:
    phase = "prefill" if step is None else "decode"
    found = traced(Setup(model, "sdpa", "batched_mm"), Prompt(3, 13), step)
    sharded = shard(found, {"tp": 4}, role, phase=phase)
    program = sharded.program
    said: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    moved: list[Counter[tuple[str, tuple[int, ...], int]]] = [Counter() for _ in range(4)]

    def expect(node: fx.Node, group: tuple[int, ...], size: int) -> None:
        said[str(node.target).removeprefix("mesh.").removesuffix("_start"), group, size] += 1

    def observe(rank: int, request: Request, size: int) -> None:
        moved[rank][request.kind, group_ranks(request.group)[1], size] += 1

    types = [tensor_type(node) for node in program.placeholders]
    whole = [torch.zeros(kind.shape, dtype=kind.dtype) for kind in types]
    run_lockstep(program, scatter_inputs(program, whole), ledger=expect)
    ranks = lower(sharded, "ge").lockstep().programs.at({})
    ranks(scatter_inputs(program, whole), observe)
    assert moved == [said] * 4
    assert sum(said.values()) == len(sharded.collectives)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model", "role"), [("llama", "pd_mixed"), ("deepseek_v32", "decode"), ("gpt_oss", "prefill")]
)
def test_four_processes_equal_the_single_device(model: str, role: str) -> None:
    report = check(options(model, role, processes=True, decode_steps=1))
    assert report.ok, report.as_text()
