"""The manifest of a sharded Program: its weights, as the store cuts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rolemesh
from rolemesh.compiler.api import Sharded
from rolemesh.compiler.ir.manifest import Part
from rolemesh.compiler.ir.manifest_json import decode_manifest, encode_manifest
from rolemesh.lowering.chunks import holds, scatter_one

VOCABULARY, HIDDEN, INNER = 11, 6, 10


class Model(nn.Module):
    """A tied head, gate and up in one weight, and a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("bias", torch.ones(HIDDEN), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids) * self.scale + self.bias
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        result: torch.Tensor = self.head(hidden + self.down(nn.functional.silu(gate) * up))
        return result


@pytest.fixture(scope="module")
def model() -> Model:
    return Model().eval().requires_grad_(requires_grad=False)


def sharded(model: Model, mesh: dict[str, int], role: str | None = "pd_mixed") -> Sharded:
    ids = torch.arange(10).reshape(2, 5)
    return rolemesh.shard(
        rolemesh.trace(model, ids),
        mesh,
        role,
        phase="prefill" if role else None,
        annotations={
            "*gate_up.weight": rolemesh.P("tp", parts={0: 2}),
            "*down.weight": rolemesh.P(None, "tp"),
            "*embed.weight": rolemesh.P("tp"),
        },
    )


def test_weights_are_listed_as_they_are_stored(model: Model) -> None:
    found = rolemesh.manifest(sharded(model, {"dp": 2, "tp": 3}), model, generation=5)
    assert (found.role, found.generation, str(found.mesh)) == ("pd_mixed", 5, "dp=2,tp=3")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert sorted(found.tensors) == ["down.weight", "embed.weight", "gate_up.weight", "scale"]
    assert found.tensors["embed.weight"].aliases == ("head.weight",)
    assert found.tensors["gate_up.weight"].parts == (
        Part("gate_up.weight#0", 0, 0, INNER),
        Part("gate_up.weight#1", 0, INNER, INNER),
    )
    for name, stored in found.tensors.items():
        layout, value = stored.distribution.layout, tensors[name]
        assert layout is not None
        assert stored.type == (tuple(value.shape), value.dtype)
        for rank, grids in enumerate(stored.distribution.held):
            if not holds(layout, found.mesh, rank):
                assert grids == ()
                continue
            local = scatter_one(value, layout, found.mesh, rank)
            for grid in grids:
                assert grid.shape == local.shape
                take, put = (
                    [
                        torch.cat([torch.arange(r[i], r[i] + r.length) for r in rs])
                        for rs in grid.runs
                    ]
                    for i in (0, 2)
                )
                if take:
                    mine = local[torch.meshgrid(*put, indexing="ij")]
                    assert torch.equal(mine, value[torch.meshgrid(*take, indexing="ij")])
    assert decode_manifest(encode_manifest(found)) == found


def test_without_the_model_all_buffers_are_listed_and_no_aliases(model: Model) -> None:
    found = rolemesh.manifest(sharded(model, {"tp": 2}, role=None))
    assert "bias" in found.tensors
    assert found.role == ""
    assert not any(tensor.aliases for tensor in found.tensors.values())


def test_parts_get_names(model: Model) -> None:
    program = sharded(model, {"tp": 2})
    named = rolemesh.manifest(program, model, parts={"gate_up.weight": ("gate", "up")})
    assert [part.name for part in named.tensors["gate_up.weight"].parts] == ["gate", "up"]
    with pytest.raises(rolemesh.RolemeshError, match="3 names for the 2 parts of gate_up"):
        rolemesh.manifest(program, parts={"gate_up.weight": ("a", "b", "c")})
    with pytest.raises(
        rolemesh.RolemeshError, match=r"RM038(.|\n)*does not cut its features apart"
    ):
        rolemesh.manifest(program, parts={"down.weight": ("a",)})
    with pytest.raises(rolemesh.RolemeshError, match=r"RM038(.|\n)*no weight gate.weight"):
        rolemesh.manifest(program, parts={"gate.weight": ("a", "b")})


def test_programs_of_one_model_reshard(model: Model) -> None:
    source, target = (
        rolemesh.manifest(sharded(model, mesh), model) for mesh in ({"tp": 4}, {"dp": 2, "tp": 3})
    )
    plan = rolemesh.plan_reshard(source, target)
    assert plan.moved_bytes + plan.kept_bytes == sum(target.rank_bytes)
    assert rolemesh.plan_reshard(source, source).moved_bytes == 0
