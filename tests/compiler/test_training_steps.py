"""Training over several steps in lock-step: losses and weights of one device after every one.

Every rank keeps its shards, with an optimizer of its own over them. The weights of the next step
are what all shards make up. Shards have pads here, which optimizers step as they step the rest.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from tests.training import Step, adamw, batch, close_gradients, precision, step

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import InputKind
from rolemesh.compiler.training import lockstep_gradients
from rolemesh.lowering import chunks

pytestmark = pytest.mark.xdist_group("training")

STEPS, CLIP = 3, 1.0

Weights = Mapping[str, torch.Tensor]


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def set_weights(model: nn.Module, tensors: Weights) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


@contextmanager
def borrowed(model: nn.Module) -> Iterator[Weights]:
    """A model whose weights are given back."""
    start = weights(model)
    try:
        yield start
    finally:
        set_weights(model, start)


class Run(NamedTuple):
    """What some steps give.

    Attributes:
        losses: The loss of every step.
        first: The gradients of the first one.
        end: The weights after the last one.
    """

    losses: Sequence[float]
    first: Weights
    end: Weights


@functools.cache
def alone(model: str, kind: str) -> Run:
    """Steps on one device."""
    given = step(model, kind=kind)
    built = given.model
    with borrowed(built):
        optimizer, losses = adamw(list(built.parameters())), []
        for seed in range(STEPS):
            with precision(kind):
                loss = built(**batch(seed)).loss
            loss.backward()
            norm = nn.utils.clip_grad_norm_(built.parameters(), CLIP)
            assert norm > CLIP  # else clipping would go untested
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return Run(losses, given.gradients, weights(built))


class Ranks:
    """The shards of all ranks, each with an optimizer."""

    def __init__(self, sharded: Sharded, start: Weights) -> None:
        program = sharded.program
        self.mesh: Mesh = program.the_mesh
        self.layouts: dict[str, Layout] = {
            entry.name: program.layout(node)
            for node, entry in zip(program.placeholders, program.inputs, strict=True)
            if entry.kind is InputKind.PARAMETER
        }
        self.shapes = {name: start[name].shape for name in self.layouts}
        self.shards = self._scattered(start)
        self.optimizers = [adamw(list(mine.values())) for mine in self.shards]

    def step(self, gradients: Weights) -> None:
        scattered = self._scattered(gradients)
        norm = nn.utils.get_total_norm(list(gradients.values()))
        for mine, found, optimizer in zip(self.shards, scattered, self.optimizers, strict=True):
            for name, tensor in mine.items():
                tensor.grad = found[name]
            nn.utils.clip_grads_with_norm_(list(mine.values()), CLIP, norm)
            optimizer.step()

    def whole(self) -> Weights:
        return {
            name: chunks.assemble(
                [mine[name] for mine in self.shards], layout, self.shapes[name], self.mesh
            )
            for name, layout in self.layouts.items()
        }

    def bytes_held(self, rank: int) -> int:
        """Bytes of parameters, gradients and an optimizer's state for them."""
        mine, state = list(self.shards[rank].values()), self.optimizers[rank].state
        gradients = [tensor.grad for tensor in mine if tensor.grad is not None]
        moments = [value for tensor in mine for value in state[tensor].values() if value.ndim]
        return sum(tensor.nbytes for tensor in (*mine, *gradients, *moments))

    def _scattered(self, tensors: Weights) -> list[dict[str, torch.Tensor]]:
        ranks: list[dict[str, torch.Tensor]] = [{} for _ in range(self.mesh.size)]
        for name, layout in self.layouts.items():
            found = chunks.scatter(tensors[name], layout, self.mesh)
            for mine, local in zip(ranks, found, strict=True):
                mine[name] = local.clone()
        return ranks


def sharded_run(given: Step, sharded: Sharded, kind: str) -> tuple[Run, Ranks]:
    with borrowed(given.model) as start:
        ranks, losses, first = Ranks(sharded, start), [], dict[str, torch.Tensor]()
        for seed in range(STEPS):
            checked = not seed  # every shape, and that no pad is read
            with precision(kind):
                out, gradients = lockstep_gradients(
                    sharded, **batch(seed), poison=checked, check=checked
                )
            first = first or dict(gradients)
            losses.append(out.loss.item())  # type: ignore[attr-defined]
            ranks.step(gradients)
            set_weights(given.model, ranks.whole())
        return Run(losses, first, ranks.whole()), ranks


WHOLE_ON_TP = ("norm", ".gate.weight", ".q_a_proj.", ".kv_a_proj_with_mqa.")
"""In the names of weights that all ranks of `tp` use whole."""


def share(shapes: Mapping[str, torch.Size], mesh: Mapping[str, int]) -> int:
    """Elements of all weights on one rank: its share of each, in whole rows."""
    elements = 0
    for name, shape in shapes.items():
        split = not any(part in name for part in WHOLE_ON_TP)
        ranks = mesh.get("fsdp", 1) * (mesh.get("tp", 1) if split else 1)
        elements += -(-shape[0] // ranks) * shape.numel() // shape[0]
    return elements


@pytest.mark.parametrize("mesh", [{"dp": 4}, {"fsdp": 4}, {"tp": 4}, {"fsdp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("model", ["llama", "qwen3_moe", "deepseek_v3"])
def test_steps_are_those_of_one_device(model: str, mesh: dict[str, int]) -> None:
    given, want = step(model), alone(model, "fp32")
    found, ranks = sharded_run(given, shard(given.traced, mesh, "train"), "fp32")
    close_gradients(found.first, want.first)
    torch.testing.assert_close(found.losses, want.losses, rtol=1e-5, atol=1e-6)
    for name, tensor in found.end.items():
        torch.testing.assert_close(tensor, want.end[name], rtol=1e-4, atol=2e-5, msg=name)
    expected = 4 * 4 * share(ranks.shapes, mesh)  # a parameter, its gradient, two moments; fp32
    assert [ranks.bytes_held(rank) for rank in range(4)] == [expected] * 4


def distance(found: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference, in norms of what is wanted."""
    return float((found.detach().float() - want.float()).norm() / want.float().norm())


HALF = [("bf16", {"fsdp": 2, "tp": 2}), ("bf16", {"sp": 3}), ("autocast", {"dp": 2, "sp": 2})]


@pytest.mark.parametrize(("kind", "mesh"), HALF, ids=str)
def test_half_precision_is_as_near_as_it_rounds(kind: str, mesh: dict[str, int]) -> None:
    given, want = step("llama", kind=kind), alone("llama", kind)
    found, _ = sharded_run(given, shard(given.traced, mesh, "train"), kind)
    # Numbers have 8 bits. Sums that are made in parts are rounded some times more.
    rounding = 2.0**-8
    torch.testing.assert_close(found.losses, want.losses, rtol=rounding / 4, atol=0.0)
    for name, start in weights(given.model).items():
        assert found.first[name].dtype == start.dtype
        assert distance(found.first[name], want.first[name]) < 8 * rounding, name
        # Of the way that weights went in three steps.
        went = found.end[name].float() - start, want.end[name].float() - start
        assert distance(*went) < 32 * rounding, name


def test_autocast_gathers_weights_and_scatters_gradients_in_half_precision() -> None:
    given = step("llama", kind="autocast")
    parts = shard(given.traced, {"fsdp": 4}, "train").stages.halves
    assert parts is not None
    received: Counter[str] = Counter()
    for found in collectives(parts.backward):
        received[found.op] += found.bytes_received
    want: Counter[str] = Counter()
    for name, weight in given.model.named_parameters():
        looked_up = "embed" in name  # the backward part does not read it
        part = -(-weight.shape[0] // 4) * weight.numel() // weight.shape[0]
        part *= 2 if weight.ndim == 2 and not looked_up else 4  # what multiplies is cast
        want["reduce_scatter"] += 3 * part
        want["all_gather"] += 3 * part * (not looked_up)
    assert received == want


def test_casts_are_those_of_the_trace() -> None:
    given = step("llama", kind="autocast")
    sharded = shard(given.traced, {"dp": 2}, "train")
    with pytest.raises(RolemeshError, match=r"(?s)RM020.*dispatch key set mismatch.*Autocast"):
        lockstep_gradients(sharded, **given.args)
