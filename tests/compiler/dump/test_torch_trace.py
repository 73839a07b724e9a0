"""Stages in torch's structured trace: an artifact per pass, and nothing where none is written."""

from __future__ import annotations

import io
import json
import logging

import pytest
import torch
from torch import nn
from torch._logging import _internal

import rolemesh
from rolemesh.compiler.api import Sharded, Traced
from rolemesh.compiler.dump import torch_trace
from rolemesh.compiler.ir.program import Program

STAGES = [
    "000_capture", "001_canonicalise", "002_seed", "003_absorb", "004_propagate",
    "005_push_back", "006_partition", "007_gather_once", "008_sink", "009_bucket",
    "010_prefetch", "011_schedule", "012_verify",
]  # fmt: skip


class TwoLinears(nn.Module):
    """`[6, 12] -> [6, 8]`; all dims differ."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def traced() -> Traced:
    return rolemesh.trace(TwoLinears().requires_grad_(False), torch.randn(6, 12))


def shard(traced: Traced) -> Sharded:
    return rolemesh.shard(traced, {"tp": 4}, annotations={"up.weight": rolemesh.P("tp")})


def test_every_stage_is_an_artifact(traced: Traced) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(_internal.TorchLogsFormatter(trace=True))  # as torch does for TORCH_TRACE
    _internal.trace_log.addHandler(handler)
    try:
        sharded = shard(traced)
    finally:
        _internal.trace_log.removeHandler(handler)
    records = [
        record.replace("\t", "\n").split("\n", 1)
        for record in written.getvalue().replace("\n\t", "\t").splitlines()
    ]
    artifacts = [json.loads(head[head.index("] ") + 2 :])["artifact"] for head, _ in records]
    program = sharded.stages.partitioned.name
    assert artifacts == [{"name": f"{program}.{stage}", "encoding": "string"} for stage in STAGES]
    assert records[-1][1] == sharded.as_text()
    assert "all_reduce" in records[-1][1]
    assert "all_reduce" not in records[STAGES.index("005_push_back")][1]


def test_no_text_is_made_where_no_trace_is_written(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: Program) -> str:
        raise AssertionError("made for nobody")

    monkeypatch.setattr(torch_trace, "program_text", fail)
    monkeypatch.setattr(_internal.trace_log, "handlers", [])
    shard(traced)
