"""Recorded programs next to the Programs themselves, to hold explanations against."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.compiler.recorded import record
from torch import fx

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.debug.explain.chains import Chains
from rolemesh.compiler.debug.explain.decided import Decided
from rolemesh.compiler.debug.explain.moves import Moves
from rolemesh.compiler.dump.reader import RecordedProgram, open_run, open_stage
from rolemesh.compiler.dump.stage_json import StageEncoder
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Program
from rolemesh.passes.partition import Partition
from rolemesh.passes.prefetch import Prefetch

__all__ = ["ALL", "DSA", "Case", "Explained", "explained", "long_prefill"]

Case = tuple[str, str, str, str]
"""Model, role, phase, mesh."""

DSA: tuple[Case, ...] = tuple(
    ("hf:deepseek_v32", role, phase, "tp=4")
    for role, phase in (
        ("prefill", "prefill"),
        ("decode", "decode"),
        ("pd_mixed", "prefill"),
        ("pd_mixed", "long prefill"),
        ("pd_mixed", "decode"),
    )
)
ALL: tuple[Case, ...] = (
    *DSA,
    ("hf:llama", "pd_mixed", "prefill", "dp=2,tp=2"),
    ("hf:llama", "pd_mixed", "decode", "dp=2,tp=2"),
)


@dataclass(frozen=True)
class Explained:
    """One program.

    Attributes:
        record: As recorded.
        decided: The Program with its decisions, as compiled.
        partitioned: The partitioned Program, as compiled.
        facts: What tools read of the record.
        chains: Explains layouts.
        moves: Explains inserted ops.
    """

    record: RecordedProgram
    decided: Program
    partitioned: Program
    facts: Decided
    chains: Chains
    moves: Moves

    @functools.cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Nodes of the decided Program by name."""
        return {node.name: node for node in self.decided.graph.nodes}


@functools.cache
def explained(case: Case) -> Explained:
    """A program; `long prefill` has enough tokens to gather weights instead of moving tokens.

    Its moves are those that partition and prefetch made, before collectives share bundles.
    """
    model, role, phase, mesh = case
    if phase == "long prefill":
        folder, sharded = long_prefill()
        phase = "prefill"
    else:
        folder, phases = record(model, role, mesh)
        sharded = phases[phase]
    found = open_run(folder).program(phase)
    facts = Decided(found)
    chains = Chains(facts)
    stages = sharded.stages
    partitioned = Prefetch().apply(Partition().apply(stages.decided))
    encoder = StageEncoder()
    encoder.encode(stages.decided, "decided", 0)
    text = encoder.encode(partitioned, "prefetch", 1)
    return Explained(
        found,
        stages.decided,
        partitioned,
        facts,
        chains,
        Moves(facts, chains, open_stage(text, "prefetch").program().stage()),
    )


@functools.cache
def long_prefill() -> tuple[Path, Sharded]:
    """`pd_mixed` prefill of 4 prompts of 48 tokens: more than T* of docs/roles.md."""
    folder = record("hf:deepseek_v32", "pd_mixed")[0].with_suffix(".long")
    options = CheckOptions(
        "hf:deepseek_v32", "pd_mixed", Mesh({"tp": 4}), layers=2, tokens=48, batch=4
    )
    case = options.load()
    args, kwargs = case.phases["prefill"]
    with torch.no_grad():
        traced = trace(case.model, *args, **kwargs)
        sharded = shard(traced, options.mesh, "pd_mixed", phase="prefill", dump=str(folder))
    return folder, sharded
