"""Converted graphs as text for people."""

from __future__ import annotations

import operator
from pathlib import Path

import torch
from tests.conftest import Golden
from tests.lowering.ge.small_graphs import (
    RANKS,
    SIGNATURE,
    dynamic_fakes,
    sharded_mlp,
    step_graph,
    step_inputs,
)
from torch import fx, nn

from rolemesh.compiler.api import lower
from rolemesh.compiler.ir.program import Input, InputKind, Output
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.lowering.signature import Signature


def text_of(folder: Path, name: str) -> str:
    return (folder / f"{name}.txt").read_text(encoding="utf-8")


def test_a_graph(tmp_path: Path, golden: Golden) -> None:
    lower_ge(step_graph(), step_inputs(), SIGNATURE, GeOptions(dump=str(tmp_path)))
    golden("ge_graph", text_of(tmp_path, SIGNATURE.name))


def test_collectives(tmp_path: Path, golden: Golden) -> None:
    lower(sharded_mlp()[0], "ge", {"dump": str(tmp_path)}).lockstep()
    golden("ge_graph_of_a_rank", text_of(tmp_path, "Mlp.rank1"))
    for rank in range(RANKS):
        assert f"graph Mlp.rank{rank}:" in text_of(tmp_path, f"Mlp.rank{rank}")


def test_symbolic_sizes_have_names(tmp_path: Path) -> None:
    lower_ge(step_graph(), dynamic_fakes(step_inputs()), SIGNATURE, GeOptions(dump=str(tmp_path)))
    (line,) = (x for x in text_of(tmp_path, SIGNATURE.name).splitlines() if x.endswith("  x"))
    assert "f32[s" in line
    assert line.rpartition("]")[0].endswith(", 8")


def test_a_use_says_which_result_it_reads(tmp_path: Path) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    best = graph.call_function(torch.ops.aten.topk.default, (x, 2))
    graph.output(tuple(graph.call_function(operator.getitem, (best, i)) for i in (0, 1)))
    signature = Signature("best", (Input("scores", InputKind.USER),), (Output(), Output()))
    module = fx.GraphModule(nn.Module(), graph)
    lower_ge(module, [torch.randn(3, 5)], signature, GeOptions(dump=str(tmp_path)))
    text = text_of(tmp_path, "best")
    assert "(f32[3, 2], ?)" in text or "(f32[3, 2], i" in text, text
    assert "= Cast(TopKV2.indices" in text
    assert text.endswith("  results\n    TopKV2.values\n    Cast\n")
