"""Encoders without a cache: text over its sequence, images over the batch."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from rolemesh.compiler.api import Sharded, shard, trace
from rolemesh.compiler.command.check import check
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Owner
from rolemesh.compiler.models.cases import load_case

RANKS = 4


def sharded(model: str, role: str, *, batch: int = 2, ranks: int = RANKS) -> Sharded:
    case = load_case(f"hf:encoder/{model}", batch=batch)
    args, kwargs = case.phases["prefill"]
    return shard(trace(case.model, *args, **kwargs), {"tp": ranks}, role, phase="prefill")


def local_shapes(program: Sharded, op: str) -> set[tuple[int, ...]]:
    """What a rank has of the first operand of every op of one name."""
    decided = program.stages.decided
    return {
        decided.layout(operand).local_shape(operand.meta["type"].shape, decided.the_mesh)
        for node in decided.ops
        if op in str(node.target)
        for operand in node.all_input_nodes[:1]
    }


def stored_shapes(program: Sharded) -> dict[str, tuple[int, ...]]:
    found = program.program
    return {
        entry.name: found.layout(node).local_shape(node.meta["type"].shape, found.the_mesh)
        for entry, node in zip(found.inputs, found.placeholders, strict=True)
        if entry.is_state
    }


@pytest.mark.parametrize("model", ["bert", "t5", "vit"])
def test_encoders_equal_the_single_device(model: str) -> None:
    """An encoder, the encoder of an encoder-decoder, and one of images."""
    report = check(CheckOptions(f"hf:encoder/{model}", "prefill", Mesh({"tp": RANKS})))
    assert report.ok, report.all_problems
    assert [phase.phase for phase in report.phases] == ["prefill"]


def test_prefill_of_bert_splits_the_sequence_and_owns_attention_weights() -> None:
    prefill = sharded("bert", "prefill")
    # 13 tokens over 4 ranks: 4 queries on each, of all 8 heads.
    assert local_shapes(prefill, "scaled_dot_product") == {(2, 8, 4, 16)}
    alone = sharded("bert", "prefill", ranks=1)
    assert prefill.cost_analysis().flops < 0.4 * alone.cost_analysis().flops
    owners = {
        entry.name: prefill.program.layout(node).placements[0]
        for entry, node in zip(prefill.program.inputs, prefill.program.placeholders, strict=True)
        if "attention" in entry.name and entry.name.endswith((".query.weight", "dense.weight"))
    }
    assert len(owners) == 4
    for name, placement in owners.items():
        assert placement == Owner(int(name.split(".")[2]) % RANKS)


def test_pd_mixed_splits_the_weights_of_bert() -> None:
    shapes = stored_shapes(sharded("bert", "pd_mixed"))
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        assert shapes[f"{layer}.attention.output.dense.weight"] == (128, 32)  # 2 heads of 16
        assert shapes[f"{layer}.intermediate.dense.weight"] == (34, 128)
        assert shapes[f"{layer}.output.dense.weight"] == (128, 34)


def test_images_split_over_the_batch() -> None:
    vit = sharded("vit", "prefill", batch=5)
    assert local_shapes(vit, "convolution") == {(2, 3, 32, 32)}
    assert local_shapes(vit, "scaled_dot_product") == {(2, 8, 17, 16)}
