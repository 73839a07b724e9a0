"""Passes over collectives: none changes a result, and after each of them `verify` holds.

Real tiny models in lock-step with NaN in every pad, all roles and phases: optimised programs give
the very numbers of those that are not, for the exchanges of lock-step sum in rank order whatever
shares a wire.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from tests.models import Prompt, Setup, State, reference, run_sharded, start, traced

from rolemesh.compiler.api import Sharded
from rolemesh.compiler.capture.tracing import Traced
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.pipeline import ShardOptions, shard_program
from rolemesh.compiler.roles import ROLES
from rolemesh.passes.base import Pass
from rolemesh.passes.verify import Verify

COLLECTIVE = ("gather_once", "sink", "bucket", "schedule")
# Sizes that do not divide, and fewer tokens than ranks. Each model has one of them: that whose
# traces test_equality needs too.
ROWS = {
    "llama": (Prompt(3, 25), "sdpa", 3),
    "deepseek_v32": (Prompt(3, 3), "eager", 4),
    "qwen3_moe": (Prompt(3, 25), "sdpa", 3),
    "gpt_oss": (Prompt(3, 3), "eager", 4),
}


def verified(step: Pass, program: Program) -> Program:
    """The Program after a pass, which must hold what every partitioned Program does."""
    program = step.apply(program)
    if "partition" in program.history:
        Verify().apply(program)
    return program


def without(step: Pass, program: Program) -> Program:
    """The Program after a pass, unless it is one of those over collectives."""
    return program if step.name in COLLECTIVE else step.apply(program)


def both(trace: Traced, ranks: int, role: str, phase: str) -> tuple[Sharded, Sharded]:
    """The Program without the passes over collectives, and with them, verified after each pass."""
    options = ShardOptions(Mesh({"tp": ranks}), role)
    stages = [shard_program(trace.program, options, phase, through=t) for t in (without, verified)]
    plain, better = (Sharded(trace, options, found, options.mesh) for found in stages)
    return plain, better


def cases() -> Iterator[object]:
    for model, (prompt, attn, ranks) in ROWS.items():
        setup = Setup(model, attn, None if model == "llama" else "grouped_mm")
        group = f"{model}-{attn}-{setup.experts}-B{prompt.batch}"
        mark = pytest.mark.xdist_group(group)
        yield pytest.param(setup, prompt, ranks, id=f"{group}-T{prompt.tokens}", marks=mark)


@pytest.mark.parametrize(("setup", "prompt", "ranks"), list(cases()))
def test_no_result_changes(setup: Setup, prompt: Prompt, ranks: int) -> None:
    before = reference(setup, prompt, 1)[0]
    for role in ROLES:
        for phase in ROLES[role].phases:
            prefill = phase == "prefill"
            plain, better = both(traced(setup, prompt, None if prefill else 0), ranks, role, phase)
            results = []
            for sharded in (plain, better):
                ids, cache = (
                    start(setup, prompt)
                    if prefill
                    else (before.tokens, copy.deepcopy(before.cache))
                )
                results.append(run_sharded(sharded, ids, cache))
            assert_equal(*results)
            assert len(better.collectives) <= len(plain.collectives)
            assert received(better) <= received(plain)


def received(sharded: Sharded) -> int:
    return sum(record.bytes_received for record in sharded.collectives)


def assert_equal(want: State, got: State) -> None:
    assert torch.equal(want.logits, got.logits)
    assert want.tensors.keys() == got.tensors.keys()
    for name, tensor in want.tensors.items():
        assert torch.equal(tensor, got.tensors[name]), name
