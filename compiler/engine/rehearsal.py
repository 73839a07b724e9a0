"""Whether an architecture can be served from slots, found out by serving a tiny model of it.

Some models place tokens by the length of the cache rather than by their position ids, keep states
outside of it, or ignore a state unless tokens come one by one. None of that shows in a
configuration, and all of it gives wrong tokens. So before a model is served, a tiny random one of
its type runs ragged prompts in chunks and decodes them, on one device and uncompiled, and its
logits are compared with those of plain calls.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from rolemesh.compiler.engine.cache import Batch, Tables
from rolemesh.compiler.engine.masks import configuration
from rolemesh.compiler.engine.replica import Replica, Runs
from rolemesh.compiler.engine.rows import CacheRows
from rolemesh.compiler.engine.serving import ServingModel
from rolemesh.compiler.engine.sizes import Sizes, prefill_lengths
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.families import CAUSAL_LM
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.compiler.roles import role_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["rehearse"]

_PROMPTS = (13, 3, 6)
_CHUNKS = (1, 2, 8)
_MAX_LEN = 32
_ALLOWED = 1e-3
"""Largest difference of fp32 logits, as a part of the largest logit."""


def rehearse(served: torch.nn.Module) -> bool | None:
    """Serve a tiny model of the type of another one, with the same implementations of its ops.

    Args:
        served: The other one.

    Returns:
        Whether a call of several tokens may go on from a state; None if there is no tiny model of
        the type, so that nothing is known.

    Raises:
        RolemeshError: RM007 if the type cannot be served from slots.
    """
    whole: PreTrainedConfig = served.config
    model_type = whole.model_type
    if model_type not in CAUSAL_LM.types():
        return None
    text = configuration(served)
    experts = getattr(text, "_experts_implementation", None)
    config = tiny_config(model_type, attn=text._attn_implementation or "sdpa", experts=experts)
    model = tiny_model(config)
    difference = 0.0
    for continues in (True, False):
        try:
            difference = _difference(model, continues=continues)
        except Exception as error:  # whatever a model's code raises for our cache
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise _not_served(model_type, reason) from error
        if difference <= _ALLOWED:
            return continues
    reason = f"logits of a tiny model differ from those of plain calls by {difference:.0%}"
    raise _not_served(model_type, reason)


def _not_served(model_type: str, why: str) -> RolemeshError:
    return RolemeshError(
        "RM007",
        f"models of type {model_type!r} cannot be served from slots",
        where="rolemesh.Engine",
        why=why,
        fix="serve another architecture; docs/engine.md says what a model must do",
    )


def _uncompiled(serving: ServingModel) -> Runs:
    """Runs the serving model itself."""

    def run(phase: str, batch: Batch, tables: Tables, *, fresh: bool, last: bool) -> torch.Tensor:
        return serving(*batch, tables, fresh, last)

    return run


@torch.no_grad()
def _difference(model: torch.nn.Module, *, continues: bool) -> float:
    """The largest difference of logits, as a part of the largest logit."""
    from rolemesh.compiler.engine.view import plan_cache

    plan = plan_cache(model, len(_PROMPTS), _MAX_LEN, compiled=False)
    exact = plan.has_states
    lengths = prefill_lengths(_CHUNKS, _MAX_LEN, exact)
    sizes = Sizes((4,), lengths, lengths[-1], exact, continues)
    cpu = torch.device("cpu")
    vocabulary = configuration(model).vocab_size
    rows = CacheRows(plan, cpu, None, "")
    runs = _uncompiled(ServingModel(model, _MAX_LEN))
    replica = Replica(runs, rows, sizes, role_named("pd_mixed"), vocabulary, cpu)
    dice = random.Random(0)
    prompts = [[dice.randrange(vocabulary) for _ in range(length)] for length in _PROMPTS]
    slots = [replica.acquire() for _ in prompts]
    worst = 0.0
    logits = replica.prefill(prompts, slots)
    for _ in range(2):
        for prompt, row in zip(prompts, logits, strict=True):
            plain = model(torch.tensor([prompt])).logits[0, -1]
            worst = max(worst, float((row - plain).abs().max() / plain.abs().max()))
            prompt.append(int(plain.argmax()))
        logits = replica.decode([prompt[-1:] for prompt in prompts], slots)[:, -1]
    return worst if worst == worst else float("inf")
