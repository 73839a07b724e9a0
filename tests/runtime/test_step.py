"""Training steps on real ranks: losses and weights of one device, and torch's own tools at work.

The model is traced before ranks are forked, so each of them only lowers and runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

pytest.importorskip("transformers")

from rolemesh.compiler.api import Sharded, lower, shard, trace_training
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.compiler.training import lockstep_gradients
from rolemesh.runtime.launch import run_processes

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("training-steps")]

# Sizes that two axes of two ranks divide, so that each rank holds its exact share.
SIZES = {"vocab_size": 84, "hidden_size": 72, "intermediate_size": 136}


@functools.cache
def small_model() -> nn.Module:
    config = tiny_config("llama", layers=1, **SIZES)
    return tiny_model(config).train().requires_grad_(True)


def batch(seed: int, tokens: int = 7) -> dict[str, object]:
    ids = torch.randint(5, 80, (4, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # A large eps: the step of a gradient near zero would be the sign of its rounding error.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def train(
    model: nn.Module,
    call: Callable[..., object],
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Mapping[str, object]],
) -> object:
    losses, norms = [], []
    for each in batches:
        loss = call(**each).loss  # type: ignore[attr-defined]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(whole(norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p).detach().clone() for name, p in model.named_parameters()}


def close(found: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)


def local_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(t.to_local().nbytes for t in tensors if isinstance(t, DTensor))


def adamw_steps(sharded: Sharded, model: nn.Module, folder: str) -> None:
    alone = copy.deepcopy(model)
    batches = [batch(seed) for seed in range(3)]
    want = train(alone, alone, adamw(alone), batches)
    optimizer = adamw(model)  # before the parameters are DTensors: it gets them all the same
    with pytest.raises(RolemeshError, match=r"(?s)RM003.*'ge' does not train.*eager, inductor"):
        lower(sharded, "ge").compile()
    step = lower(sharded).compile()
    found = train(model, step, optimizer, batches)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    close(weights(model), weights(alone))

    # Parameters, gradients and both moments: a rank's share of what one device has.
    step(**batch(9)).loss.backward()  # type: ignore[attr-defined]
    parameters = list(model.parameters())
    moments = [m for p in parameters for m in optimizer.state[p].values() if m.ndim]
    share = sum(p.nbytes // (4 if p.ndim > 1 else 2) for p in parameters)  # norms are whole on tp
    assert local_bytes(parameters) == share
    assert local_bytes([p.grad for p in parameters if p.grad is not None]) == share
    assert local_bytes(moments) == 2 * share

    # Two backward passes add up.
    once = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    step(**batch(9)).loss.backward()  # type: ignore[attr-defined]
    close(
        {name: whole(p.grad) for name, p in model.named_parameters()},
        {n: 2 * g for n, g in once.items()},
    )
    optimizer.zero_grad()

    # Without gradients, forward only; logits are there, where they were computed.
    with torch.no_grad():
        out = step(**batch(0))
        assert not out.loss.requires_grad  # type: ignore[attr-defined]
        logits = out.logits  # type: ignore[attr-defined]
        assert isinstance(logits, DTensor)
        torch.testing.assert_close(
            logits.full_tensor(), alone(**batch(0)).logits, rtol=1e-3, atol=1e-4
        )

    # A checkpoint of torch's own goes out and in.
    before = weights(model)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(2)
    dcp.load(model.state_dict(), checkpoint_id=folder)
    close(weights(model), before)

    # What is read by backward is gone when it has run.
    loss = step(**batch(0)).loss  # type: ignore[attr-defined]
    loss.backward(retain_graph=True)
    with pytest.raises(RolemeshError, match=r"(?s)RM017.*has run backward already.*retain_graph"):
        loss.backward()
    with pytest.raises(RolemeshError, match=r"(?s)RM017.*gradients of gradients"):
        step(**batch(0)).loss.backward(create_graph=True)  # type: ignore[attr-defined]


@pytest.mark.timeout(120)
def test_adamw_on_two_axes(tmp_path: Path) -> None:
    model = small_model()
    sharded = shard(trace_training(model, **batch(0)), {"fsdp": 2, "tp": 2}, "train")
    run_processes(adamw_steps, 4, (sharded, model, str(tmp_path)), fork=True)


def compiled_steps(target: str) -> None:
    model = copy.deepcopy(small_model())
    alone = copy.deepcopy(model)
    options = {"role": "train", "mesh": {"dp": 2}, "target": target}
    step = torch.compile(model, backend="rolemesh", options=options)
    optimizer = adamw(model)
    batches = [batch(0), batch(1, tokens=9)]
    torch._dynamo.mark_dynamic(batches[0]["input_ids"], 1)
    want = train(alone, alone, adamw(alone), batches)
    found = train(model, step, optimizer, batches)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    close(weights(model), weights(alone))
    # An optimizer with state for whole parameters cannot go on.
    other = copy.deepcopy(small_model())
    late = adamw(other)
    other(**batch(0)).loss.backward()
    late.step()
    again = torch.compile(other, backend="rolemesh", options=options)
    with pytest.raises(RolemeshError, match=r"(?s)RM024.*AdamW has state.*embed_tokens"):
        again(**batch(0))


@pytest.mark.timeout(120)
def test_the_backend_trains() -> None:
    small_model()
    run_processes(compiled_steps, 2, ("eager",), fork=True)


class Rows(nn.Module):
    """Two projections, and results that tell evaluation from training."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 7, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squares = (self.down(torch.relu(self.up(x))) - y).square()
        return squares.mean() if self.training else squares.sum()


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 6, generator=generator), torch.randn(count, 7, generator=generator)


def course(model: nn.Module, call: Callable[..., torch.Tensor]) -> list[float]:
    """Evaluation before and between steps, and batches of several sizes."""
    optimizer, losses = adamw(model), []

    def train(count: int) -> None:
        model.train()
        loss = call(*rows(count))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    def evaluate(count: int) -> None:
        losses.append(call(*rows(count)).item())

    with torch.inference_mode():
        evaluate(4)
    train(4)
    train(3)
    train(1)
    model.eval()
    with torch.no_grad():
        evaluate(5)
    model.get_parameter("up.bias").requires_grad_(False)
    train(4)
    with torch.autocast("cpu", torch.bfloat16):
        evaluate(4)
    return losses


def graph_after_graph() -> None:
    model = Rows()
    alone = copy.deepcopy(model)
    options = {"role": "train", "mesh": {"fsdp": 2}}
    found = course(model, torch.compile(model, backend="rolemesh", options=options))
    want = course(alone, alone)
    torch.testing.assert_close(found[:-1], want[:-1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[-1], want[-1], rtol=2.0**-10, atol=0.0)  # autocast to bf16
    close(weights(model), weights(alone))
    parameters = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) and p.is_leaf for p in parameters.values())
    # A trace of the model as it is now has the whole parameters, and they have no bytes.
    traced = trace_training(model.train(), *rows(6))
    assert dict(model.named_parameters()) == parameters
    step = lower(shard(traced, {"fsdp": 2}, "train")).compile()
    torch.testing.assert_close(step(*rows(6)), alone.train()(*rows(6)))
    with pytest.raises(RolemeshError, match=r"(?s)RM024.*up.weight.*a DTensor.*compile"):
        lockstep_gradients(shard(traced, {"fsdp": 2}, "train"), *rows(6))
    with pytest.raises(RolemeshError, match=r"(?s)RM024.*up.weight lies otherwise"):
        lower(shard(traced, {"dp": 2}, "train")).compile()
    # What was distributed by others stays theirs.
    other = Rows()
    mesh = parameters["up.weight"].device_mesh  # type: ignore[union-attr]
    other.up.weight = nn.Parameter(distribute_tensor(other.up.weight, mesh, [Replicate()]))
    with pytest.raises(RolemeshError, match=r"(?s)RM020.*was given DTensors.*fully_shard"):
        trace_training(lambda: other.up.weight.square().mean())


@pytest.mark.timeout(120)
def test_other_sizes_and_evaluation_are_steps_over_the_same_parameters() -> None:
    run_processes(graph_after_graph, 2, fork=True)
