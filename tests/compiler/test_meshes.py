"""Roles and annotations on meshes with two axes equal the single device."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch

import rolemesh
from rolemesh import P
from rolemesh.compiler.api import Sharded, Traced
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.cases import Case, language_model_case
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model

TOLERANCE = 1e-4
"""Absolute, on fp32 logits of about 1: sums are taken in another order on each mesh."""

pytestmark = pytest.mark.xdist_group("meshes")

MESHES = [{"dp": 2, "tp": 2}, {"dp": 2, "tp": 4}, {"tp": 2, "dp": 2}]
CACHES_BY_BATCH = {"past_key_values*keys": P("dp"), "past_key_values*values": P("dp")}
ANNOTATIONS: dict[str, Mapping[str, P]] = {
    "role alone": {},
    "batch on dp": {"input_ids": P("dp")},
    "batch and caches on dp": {"input_ids": P("dp"), **CACHES_BY_BATCH},
    "sequence on both": {"input_ids": P(None, ("dp", "tp"))},
    "batch on tp, sequence on dp": {"input_ids": P("tp", "dp")},
}


@functools.cache
def case_of(model_type: str) -> tuple[Case, dict[str, Traced], dict[str, torch.Tensor]]:
    """A case of batch 3 and 13 tokens, its traces, and the single device's logits."""
    experts = "batched_mm" if model_type == "deepseek_v32" else None
    model = tiny_model(tiny_config(model_type, layers=2, attn="sdpa", experts=experts))
    case = language_model_case(model, tokens=13, batch=3)
    run = case.fresh()
    traces, logits = {}, {}
    with torch.no_grad():
        for phase, (args, kwargs) in run.phases.items():
            traces[phase] = rolemesh.trace(model, *args, **kwargs)
            logits[phase] = model(*args, **kwargs).logits
    return case, traces, logits


@pytest.mark.parametrize("annotations", ANNOTATIONS)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model_type", ["deepseek_v32", "llama"])
def test_pd_mixed_on_two_axes(model_type: str, mesh: Mapping[str, int], annotations: str) -> None:
    case, traces, logits = case_of(model_type)
    run = case.fresh()
    with torch.no_grad():
        for phase, (args, kwargs) in run.phases.items():
            given = ANNOTATIONS[annotations]
            if annotations == "sequence on both":  # 13 tokens, or one: uneven, so in mesh order
                given = {"input_ids": P(None, tuple(mesh))}
            sharded = rolemesh.shard(
                traces[phase], mesh, role="pd_mixed", phase=phase, annotations=given
            )
            assert uses_axes(sharded) <= set(mesh)
            output = rolemesh.lockstep(sharded, *args, poison=True, check=True, **kwargs)
            assert (output.logits - logits[phase]).abs().max() < TOLERANCE


def test_both_axes_are_used() -> None:
    _, traces, _ = case_of("llama")
    sharded = rolemesh.shard(
        traces["prefill"], {"dp": 2, "tp": 4}, role="pd_mixed", annotations={"input_ids": P("dp")}
    )
    assert uses_axes(sharded) == {"dp", "tp"}


def test_uneven_chunks_in_another_order_than_the_mesh_are_refused() -> None:
    _, traces, _ = case_of("llama")
    with pytest.raises(RolemeshError) as caught:
        rolemesh.shard(
            traces["prefill"],
            {"tp": 2, "dp": 2},
            role="pd_mixed",
            annotations={"input_ids": P(None, ("dp", "tp"))},
        )
    assert caught.value.code == "RM009"
    assert "list the axes in mesh order (tp, dp)" in str(caught.value)


def uses_axes(sharded: Sharded) -> set[str]:
    """Axes that some collective runs over."""
    return {axis for record in sharded.collectives for axis in record.axes}
