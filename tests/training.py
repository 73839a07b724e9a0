"""Training steps of tiny models, and what one device makes of them: once per test process."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from rolemesh.compiler.api import Sharded, trace_training
from rolemesh.compiler.capture.tracing import Traced
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.compiler.training import lockstep_gradients

__all__ = [
    "LAYERS",
    "TOKENS",
    "Batch",
    "Step",
    "adamw",
    "batch",
    "check",
    "close_gradients",
    "precision",
    "step",
]

LAYERS, TOKENS = 2, 11
EXPERTS = {"qwen3_moe": "batched_mm", "deepseek_v3": "batched_mm"}

Batch = Mapping[str, object]


class Step(NamedTuple):
    """A traced training step, and what one device makes of it."""

    traced: Traced
    model: nn.Module
    args: Batch
    loss: torch.Tensor
    gradients: Mapping[str, torch.Tensor]


def batch(seed: int, rows: int = 4) -> Batch:
    """Arguments of a model."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (rows, TOKENS), generator=generator)
    labels = torch.randint(5, 90, (rows, TOKENS), generator=generator)
    labels[0, :3] = -100  # a mean over other tokens than all, and of other numbers on each rank
    return {"input_ids": ids, "labels": labels, "use_cache": False}


def precision(name: str) -> contextlib.AbstractContextManager[object]:
    """What a step runs under: `autocast` or another name."""
    return torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast")


def step(model: str, rows: int = 4, kind: str = "fp32") -> Step:
    """The step on batch 0 of a model in fp32, in bf16, or in fp32 under `autocast`."""
    return _step(model, rows, kind)


@functools.cache
def _step(model: str, rows: int, kind: str) -> Step:
    layers = LAYERS if kind == "fp32" else 1
    built = tiny_model(
        tiny_config(model, experts=EXPERTS.get(model), layers=layers),
        dtype=torch.bfloat16 if kind == "bf16" else torch.float32,
    )
    built.train().requires_grad_(True)
    args = batch(0, rows)
    with precision(kind):
        loss = built(**args).loss
    loss.backward()
    gradients = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
    built.zero_grad()
    with precision(kind):
        traced = trace_training(built, **args)
    return Step(traced, built, args, loss.detach(), gradients)


def adamw(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """An optimizer whose steps are as far apart as the gradients are.

    With a small eps, the step of a gradient near zero would be the sign of its rounding error.
    """
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4)


def check(given: Step, sharded: Sharded) -> None:
    """Compare loss and gradients with those of one device; fp32."""
    out, found = lockstep_gradients(sharded, **given.args, poison=True, check=True)
    torch.testing.assert_close(out.loss, given.loss)  # type: ignore[attr-defined]
    close_gradients(found, given.gradients)


def close_gradients(found: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> None:
    """Compare gradients with those of one device; fp32."""
    assert found.keys() == want.keys()
    for name, gradient in found.items():
        scale = float(want[name].abs().max())
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-5 * scale, msg=name)
