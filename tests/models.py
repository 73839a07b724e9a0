"""Tiny models, their traces and single-device results, made once per test process.

Capturing a model takes seconds and sharding its Program milliseconds, so tests share what is here
and shard it for many meshes and roles. Tests of one model carry one `xdist_group` mark: with
`--dist loadgroup` they run in one worker and its traces are made once.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rolemesh.compiler.api import Sharded, lockstep, shard
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.models.cases import cache_tensors, static_cache
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model

__all__ = [
    "LAYERS",
    "PipelineStage",
    "Prompt",
    "Setup",
    "State",
    "forget_compiled",
    "in_fp32",
    "model_of",
    "reference",
    "run_sharded",
    "sharded_once",
    "start",
    "traced",
]

LAYERS = {"deepseek_v32": 2, "llama": 2, "qwen3_moe": 2, "gpt_oss": 2}
"""Layers of each model: for DeepSeek one dense and one with experts; others have two in a row."""

CAPACITY = 40
"""Tokens that a cache holds."""


class Setup(NamedTuple):
    """One model as a library user would configure it."""

    model: str
    attn: str = "sdpa"
    experts: str | None = None
    dtype: torch.dtype = torch.float32
    layers: int | None = None


class Prompt(NamedTuple):
    """Sizes of one call of prefill."""

    batch: int
    tokens: int
    capacity: int = CAPACITY


@dataclass(frozen=True)
class State:
    """What a request leaves behind: the cache, and the logits of its last call."""

    cache: object
    logits: Tensor

    @property
    def tokens(self) -> Tensor:
        """The greedy next token of every sequence, `[batch, 1]`."""
        return self.logits[:, -1:].argmax(-1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The cache's tensors by name."""
        return cache_tensors(self.cache)  # type: ignore[arg-type]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())  # type: ignore[attr-defined]


@functools.cache
def model_of(setup: Setup) -> torch.nn.Module:
    """The model. A setup without `layers` has those of `LAYERS`."""
    layers = setup.layers or LAYERS.get(setup.model)
    config = tiny_config(setup.model, layers=layers, attn=setup.attn, experts=setup.experts)
    return tiny_model(config, dtype=setup.dtype)


@functools.cache
def in_fp32(setup: Setup) -> torch.nn.Module:
    """The model with the same weights, computing in fp32."""
    exact = copy.deepcopy(model_of(setup._replace(dtype=torch.float32)))
    exact.load_state_dict(model_of(setup).state_dict())
    return exact


@functools.cache
def _empty(setup: Setup, batch: int, capacity: int) -> object:
    return static_cache(model_of(setup), batch, capacity)


def start(setup: Setup, prompt: Prompt) -> tuple[Tensor, object]:
    """The prompt's ids and an empty cache."""
    generator = torch.Generator().manual_seed(prompt.tokens)
    ids = torch.randint(3, 240, (prompt.batch, prompt.tokens), generator=generator)
    return ids, copy.deepcopy(_empty(setup, prompt.batch, prompt.capacity))


@functools.cache
def reference(setup: Setup, prompt: Prompt, steps: int) -> tuple[State, ...]:
    """The single device's state after prefill and after each of `steps` greedy decode steps."""
    ids, cache = start(setup, prompt)
    states = []
    with torch.no_grad():
        for _ in range(steps + 1):
            logits = model_of(setup)(ids, past_key_values=cache, use_cache=True).logits
            states.append(State(copy.deepcopy(cache), logits))
            ids = states[-1].tokens
    return tuple(states)


@functools.cache
def traced(setup: Setup, prompt: Prompt, step: int | None = None) -> Traced:
    """The trace of prefill, or of the decode step after `step` other ones.

    Args:
        setup: The model.
        prompt: Sizes of the prompt; a decode step is traced behind it.
        step: None for prefill.
    """
    if step is None:
        ids, cache = start(setup, prompt)
    else:
        state = reference(setup, prompt, step)[step]
        ids, cache = state.tokens, copy.deepcopy(state.cache)
    with torch.no_grad():
        return trace(model_of(setup), ids, past_key_values=cache, use_cache=True)


@functools.cache
def sharded_once(
    setup: Setup, prompt: Prompt, ranks: int, role: str, step: int | None = None
) -> Sharded:
    """The trace, sharded for a role; for tests that only read the Program.

    Args:
        setup: The model.
        prompt: Sizes of the prompt.
        ranks: Size of the one mesh axis, `tp`.
        role: The role.
        step: None for prefill, else the decode step.
    """
    phase = "prefill" if step is None else "decode"
    return shard(traced(setup, prompt, step), {"tp": ranks}, role, phase=phase)


def forget_compiled() -> None:
    """Make Dynamo forget what it compiled, and the traces that live in it."""
    torch._dynamo.reset()
    traced.cache_clear()
    sharded_once.cache_clear()


def run_sharded(sharded: Sharded, ids: Tensor, cache: object, poison: bool = True) -> State:
    """One call on all ranks, with NaN in all pads and every local shape checked.

    The cache is updated, as the model would.
    """
    output = lockstep(
        sharded, ids, past_key_values=cache, use_cache=True, poison=poison, check=True
    )
    return State(cache, output.logits)  # type: ignore[attr-defined]


class Block(nn.Module):
    """Causal attention and a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).flatten(-2))


class PipelineStage(nn.Module):
    """A small language model whose first layer has number 3, as in a later pipeline stage.

    Seven layers, numbers 3 to 9: no multiple of 2, 3 or 4 ranks.
    """

    NUMBERS = range(3, 10)
    WIDTH = 24
    VOCABULARY = 31

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(self.VOCABULARY, self.WIDTH)
            self.layers = nn.ModuleDict({str(n): Block(self.WIDTH, 4) for n in self.NUMBERS})
            self.head = nn.Linear(self.WIDTH, self.VOCABULARY, bias=False)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[batch, tokens, vocabulary]`."""
        x = self.embed(ids)
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x)


def assert_step(
    sharded: Sharded, setup: Setup, plain: Setup, prompt: Prompt, step: int | None
) -> None:
    """One call on all ranks gives the logits and the cache of the single device.

    Args:
        sharded: The program of the call.
        setup: The model that was sharded.
        plain: The same model with the library's own implementations.
        prompt: The prompt.
        step: 0 for the first decode step; None for the prompt.
    """
    states = reference(plain, prompt, 1)
    if step is None:
        ids, cache = start(setup, prompt)
        want = states[0]
    else:
        ids, cache = states[0].tokens, copy.deepcopy(states[0].cache)
        want = states[1]
    got = run_sharded(sharded, ids, cache)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
    for name, tensor in want.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, rtol=1e-4, atol=1e-4)
