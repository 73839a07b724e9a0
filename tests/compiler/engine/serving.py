"""What the tests of the engine share: tiny models, prompts and single-device results."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import torch

from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model

__all__ = ["TOLERANCE", "logits_of", "model_of", "plain_tokens", "prompts_of"]

TOLERANCE = 1e-4
"""Absolute, on fp32 logits of about 1: sums are taken in another order on each mesh."""


@functools.cache
def model_of(model_type: str, layers: int | None = None) -> torch.nn.Module:
    """A tiny random model in fp32."""
    experts = "batched_mm" if model_type == "deepseek_v32" else None
    return tiny_model(tiny_config(model_type, layers=layers, experts=experts))


def prompts_of(model: torch.nn.Module, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts."""
    dice = random.Random(seed)
    vocabulary = model.config.get_text_config().vocab_size
    return [[dice.randrange(vocabulary) for _ in range(length)] for length in lengths]


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of a plain call on one device, without a cache."""
    return model(torch.tensor([list(tokens)])).logits[0]


@torch.no_grad()
def plain_tokens(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[list[int]]:
    """Greedy tokens of each prompt alone, on one device.

    Prompts of one length share a call: rows of a batch without pads do not see each other.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        rows = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([list(prompts[index]) for index in rows])
        for _ in range(new_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        for index, row in zip(rows, ids[:, length:].tolist(), strict=True):
            found[index] = row
    return found
