"""The text of a Program: what has a line, how it is written, and a page of a real model."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Golden
from torch import Tensor, nn

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.text import program_text


class Mlp(nn.Module):
    """Two projections with a bias, and a state that counts calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.up(x).relu()
        return self.down(y * 0.1234567891)


def mlp() -> Sharded:
    column_then_row = {"up.weight": P("tp", None), "up.bias": P("tp"), "down.weight": P(None, "tp")}
    return shard(trace(Mlp(), torch.zeros(4, 6)), {"tp": 4}, annotations=column_then_row)


def test_a_sharded_program_on_one_page(golden: Golden) -> None:
    golden("mlp", mlp().as_text())


def test_a_traced_program_has_no_mesh(golden: Golden) -> None:
    golden("mlp_traced", str(mlp().traced.program))


def test_one_module_with_what_it_reads(golden: Golden) -> None:
    golden("mlp_down", mlp().as_text(module="down"))


def test_every_op_has_a_line_when_nothing_is_folded() -> None:
    program = mlp().program
    text = program_text(program, fold=False)
    for node in program.ops:
        assert f" %{node.name} " in text


class Views(nn.Module):
    """The forms that views, casts and numbers take."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.view(2, 3, 2, 4).transpose(1, 2)  # used twice: has a line
        left, right = heads.split([1, 3], dim=-1)
        even = x[..., 0:8:2][..., 1:3]
        chosen = torch.topk(x, 2).indices
        return left * 2 - right[..., :1] / 3, even.float() ** 2, ~(chosen > 1)


def test_views_read_as_indexing_and_methods() -> None:
    program = trace(Views(), torch.zeros(2, 3, 8, dtype=torch.bfloat16)).program
    body = [line.split("= ", 1)[1] for line in str(program).splitlines() if " = " in line]
    assert body == [
        "x.reshape(2, 3, 2, 4).transpose(1, 2)",
        "topk(x, 2)",
        "%transpose[..., 0:1] * 2 - %transpose[..., 1:2] / 3",
        "f32(x[..., 2:6:2]) ** 2",
        "~(%topk.1 > 1)",
    ]


class Sums(nn.Module):
    """Operators of every strength."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - (b - a)) * -((a + b) ** 2) / (a * b)


def test_parentheses_only_where_they_change_the_meaning() -> None:
    program = trace(Sums(), torch.zeros(2), torch.zeros(2)).program
    assert "= (a - (b - a)) * -(a + b) ** 2 / (a * b)" in str(program)


def test_the_attention_block_of_dsa_fits_a_page(golden: Golden) -> None:
    """Decode of a node that also runs prefill: heads are exchanged for tokens, sums scattered."""
    pytest.importorskip("transformers")
    from tests.models import Prompt, Setup, traced

    setup = Setup("deepseek_v32", "sdpa", "batched_mm", layers=2)
    sharded = shard(traced(setup, Prompt(8, 16), 0), {"tp": 4}, "pd_mixed", phase="decode")
    text = sharded.as_text(module="model.layers.1.self_attn")
    golden("dsa_attention", text)
    lines = text.splitlines()
    assert len(lines) <= 75
    assert max(map(len, lines)) <= 170
