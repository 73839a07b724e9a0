"""The engine serves architectures of all kinds: windows, latents, experts, states."""

from __future__ import annotations

import pytest
import torch
from tests.compiler.engine.serving import TOLERANCE, model_of, plain_tokens, prompts_of

from rolemesh import Engine, RolemeshError

SLIDING = (13, 2, 11)
"""Prompt lengths of which some are longer than the windows of tiny models."""


@pytest.mark.parametrize(
    ("model_type", "layers", "role", "ranks"),
    [
        ("gpt_oss", 2, "pd_mixed", 4),
        ("deepseek_v32", 2, "pd_mixed", 2),
        ("qwen3_moe", 1, "pd_mixed", 2),
    ],
)
def test_attention_of_all_kinds(model_type: str, layers: int, role: str, ranks: int) -> None:
    model = model_of(model_type, layers)
    engine = Engine(model, role, {"tp": ranks}, slots=2, max_len=24, prefill_sizes=[8])
    prompts = prompts_of(model, SLIDING)
    assert engine.generate(prompts, 4, eos=()) == plain_tokens(model, prompts, 4)
    assert len(engine.compiled) == 2


def test_layers_with_states_read_prompts_without_pads() -> None:
    model = model_of("falcon_h1", 1)
    engine = Engine(model, "pd_mixed", {"tp": 2}, slots=2, max_len=16, prefill_sizes=[1, 4])
    assert engine.plan.has_states
    prompts = prompts_of(model, [9, 4, 8])
    assert engine.generate(prompts, 3, eos=()) == plain_tokens(model, prompts, 3)
    assert {(key.phase, key.tokens, key.fresh) for key in engine.compiled} == {
        ("prefill", 4, True),
        ("prefill", 4, False),
        ("prefill", 1, False),
        ("decode", 1, False),
    }
    slots = [engine.acquire(), engine.acquire()]
    engine.prefill(prompts[1], slots[0])
    with pytest.raises(RolemeshError, match=r"\[RM034\] cannot cut a slot of this model"):
        engine.truncate(slots[0], 3)
    with pytest.raises(RolemeshError, match=r"\[RM034\] cannot copy a part of a slot"):
        engine.copy_prefix(slots[0], slots[1], 3)
    engine.copy_prefix(slots[0], slots[1], 4)  # the whole of it is a state that exists
    first, second = engine.decode([[2], [2]], slots)
    torch.testing.assert_close(first, second, atol=TOLERANCE, rtol=0)


def test_a_state_that_is_read_token_by_token_only() -> None:
    model = model_of("mamba", 1)
    engine = Engine(model, "pd_mixed", {"tp": 2}, slots=2, max_len=16, prefill_sizes=[1, 4])
    prompts = prompts_of(model, [9, 4])
    assert engine.generate(prompts, 3, eos=()) == plain_tokens(model, prompts, 3)
    assert ("prefill", 4, False) not in {(k.phase, k.tokens, k.fresh) for k in engine.compiled}
