"""What stored tensors are, read off small graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rolemesh.compiler.api import lockstep, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.classify import StorageClass, classify

EXPERTS, HIDDEN, INNER, VOCABULARY = 6, 10, 14, 23


def kinds(model: nn.Module, *inputs: Tensor) -> dict[str, StorageClass]:
    program = Canonicalise().apply(trace(model, *inputs).program)
    found = classify(program)
    return {
        entry.name: found[node].kind
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if node in found
    }


class DenseExperts(nn.Module):
    """Every expert computes every token, by batched products with packed gate and up weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INNER) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 3)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).flatten(0, 1)
        scores = self.router(x).softmax(-1)
        gate, up = torch.bmm(x.expand(EXPERTS, -1, -1), self.gate_up).chunk(2, dim=-1)
        experts = torch.bmm(nn.functional.silu(gate) * up, self.down)
        x = x + (experts * scores.t()[..., None]).sum(0)
        return self.head(x).view(*ids.shape, VOCABULARY)


def test_a_stack_of_mlp_weights_is_one_for_each_expert() -> None:
    found = kinds(DenseExperts(), torch.zeros(2, 5).long())
    assert found["gate_up"] is StorageClass.EXPERTS
    assert found["down"] is StorageClass.EXPERTS


@pytest.mark.parametrize("role", ["prefill", "pd_mixed"])
def test_a_stack_is_split_by_expert(role: str) -> None:
    torch.manual_seed(0)
    model, ids = DenseExperts(), torch.arange(10).view(2, 5)
    sharded = shard(trace(model, ids), {"tp": 2}, role)
    found = lockstep(sharded, ids, poison=True, check=True)
    torch.testing.assert_close(found, model(ids), atol=1e-5, rtol=1e-4)
    shapes = {
        entry.name: sharded.program.layout(node).local_shape(
            tuple(getattr(model, entry.name).shape), sharded.program.the_mesh
        )
        for node, entry in zip(sharded.program.placeholders, sharded.program.inputs, strict=True)
        if entry.name in ("gate_up", "down")
    }
    assert shapes == {"gate_up": (3, HIDDEN, 2 * INNER), "down": (3, INNER, HIDDEN)}


class GatedAttention(nn.Module):
    """One projection gives a query and a gate for what attention gives, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.query = nn.Linear(HIDDEN, 2 * 3 * 4, bias=False)
        self.key = nn.Linear(HIDDEN, 3 * 4, bias=False)
        self.out = nn.Linear(3 * 4, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        query, gate = self.query(x).unflatten(-1, (3, 8)).chunk(2, dim=-1)
        key = self.key(x).unflatten(-1, (3, 4)).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(query.transpose(1, 2), key, key)
        found = (found.transpose(1, 2) * gate.sigmoid()).flatten(2)
        return self.head(x + self.out(found))


class Recurrent(nn.Module):
    """A state of channels that every token decays, and a cache that every token adds a row to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.inner = nn.Linear(HIDDEN, INNER, bias=False)
        self.latent = nn.Linear(HIDDEN, 5, bias=False)
        self.up = nn.Linear(5, INNER, bias=False)
        self.out = nn.Linear(INNER, VOCABULARY, bias=False)
        self.register_buffer("state", torch.zeros(2, INNER, 3))
        self.register_buffer("cache", torch.zeros(2, 7, 5))
        self.requires_grad_(False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        x = self.embed(ids[:, 0])
        self.state.copy_(self.state * 0.5 + self.inner(x).unsqueeze(2))
        self.cache.index_copy_(1, position, self.latent(x).unsqueeze(1))
        read = self.state.sum(2) + self.up(self.cache).sum(1)
        return self.out(read).unsqueeze(1)


def test_a_query_may_gate_what_attention_gives() -> None:
    found = kinds(GatedAttention(), torch.zeros(2, 5).long())
    assert found["query.weight"] is StorageClass.QUERY
    assert found["out.weight"] is StorageClass.ATTENTION_OUT


def test_a_recurrent_state_is_no_cache() -> None:
    found = kinds(Recurrent(), torch.zeros(2, 1).long(), torch.tensor([3]))
    assert found["state"] is StorageClass.STATE
    assert found["cache"] is StorageClass.CACHE
