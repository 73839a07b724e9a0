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


# Every model with every role, and every form of attention and experts. The numbers are those of
# ranks: each role meets each, even and uneven chunks and fewer sequences than ranks. Every rank's
# graph is converted, so most ranks go to the model with the smallest graph.
CASES = (
    ("llama", "sdpa", None, {"prefill": 4, "decode": 4, "pd_mixed": 4}),
    ("deepseek_v32", "sdpa", "batched_mm", {"prefill": 3, "decode": 2, "pd_mixed": 2}),
    ("deepseek_v32", "eager", "grouped_mm", {"decode": 3}),
    ("qwen3_moe", "sdpa", "grouped_mm", {"prefill": 2, "decode": 3, "pd_mixed": 3}),
    ("qwen3_moe", "eager", "batched_mm", {"prefill": 3}),
    ("gpt_oss", "eager", "grouped_mm", {"prefill": 2, "decode": 3, "pd_mixed": 2}),
    ("qwen3_moe", "sdpa", "rolemesh", {"decode": 2}),
)

LAYERS = {"llama": 1, "deepseek_v32": 2, "qwen3_moe": 1, "gpt_oss": 2}
"""One of each kind; what lies between two layers is in the models that have two kinds."""


def cases() -> list[object]:
    return [
        pytest.param(model, attn, experts, role, ranks, id=f"{model}-{attn}-{experts}-{role}")
        for model, attn, experts, roles in CASES
        for role, ranks in roles.items()
    ]


def options(model: str, role: str, ranks: int, **given: object) -> CheckOptions:
    settings: dict[str, object] = {
        "target": "ge",
        "tolerance": TOLERANCE,
        "layers": LAYERS[model],
        "decode_steps": 1 if model == "gpt_oss" else 2,
    }
    return CheckOptions(f"hf:{model}", role, Mesh({"tp": ranks}), **{**settings, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "attn", "experts", "role", "ranks"), cases())
def test_the_check_command_passes(
    model: str, attn: str, experts: str | None, role: str, ranks: int
) -> None:
    report = check(options(model, role, ranks, attn=attn, experts=experts))
    assert report.ok, report.as_text()
    for phase in report.phases:
        assert phase.collectives


@pytest.mark.parametrize("role", ROLES)
def test_bf16_differs_as_eager_does(role: str) -> None:
    report = check(options("llama", role, 2, dtype="bf16", tolerance=None))
    assert report.ok, report.as_text()


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_that_the_graph_allows_gives_the_same(seed: int) -> None:
    report = check(options("llama", "decode", 2, target_options=(f"order_seed={seed}",)))
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
    setup = Setup(model, "sdpa", "batched_mm", layers=1)
    sharded = shard(traced(setup, Prompt(3, 13), step), {"tp": 3}, role, phase=phase)
    program = sharded.program
    said: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    moved: list[Counter[tuple[str, tuple[int, ...], int]]] = [Counter() for _ in range(3)]

    def expect(node: fx.Node, group: tuple[int, ...], size: int) -> None:
        said[str(node.target).removeprefix("mesh.").removesuffix("_start"), group, size] += 1

    def observe(rank: int, request: Request, size: int) -> None:
        moved[rank][request.kind, group_ranks(request.group)[1], size] += 1

    types = [tensor_type(node) for node in program.placeholders]
    whole = [torch.zeros(kind.shape, dtype=kind.dtype) for kind in types]
    run_lockstep(program, scatter_inputs(program, whole), ledger=expect)
    ranks = lower(sharded, "ge").lockstep().programs.at({})
    ranks(scatter_inputs(program, whole), observe)
    assert moved == [said] * 3
    assert sum(said.values()) == len(sharded.collectives)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("model", "role", "ranks"),
    [("llama", "pd_mixed", 2), ("deepseek_v32", "decode", 3), ("gpt_oss", "prefill", 2)],
)
def test_processes_equal_the_single_device(model: str, role: str, ranks: int) -> None:
    layers = 2 if model == "gpt_oss" else 1
    report = check(options(model, role, ranks, processes=True, decode_steps=1, layers=layers))
    assert report.ok, report.as_text()
