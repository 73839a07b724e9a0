"""Every refusal says what happened and leaves the engine usable."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from tests.compiler.engine.serving import model_of, plain_tokens, prompts_of

from rolemesh import Engine, RolemeshError

pytestmark = pytest.mark.xdist_group("engine")


@functools.cache
def engine_of() -> Engine:
    """An engine with two slots of 12 tokens; slot 0 holds a token."""
    engine = Engine(
        model_of("llama", 1), "pd_mixed", {"tp": 2}, slots=2, max_len=12, prefill_sizes=[4, 12]
    )
    engine.prefill([5], engine.acquire())
    return engine


REFUSED: dict[str, Callable[[Engine], object]] = {
    "the prompt is empty": lambda engine: engine.generate([[]], 2),
    "bad token id 251": lambda engine: engine.generate([[3, 251]], 2),
    "bad token id -1": lambda engine: engine.prefill([-1], 0),
    "a prompt of 9 tokens with 5 new ones cannot be served": lambda engine: engine.submit(
        [1] * 9, 5
    ),
    "a prompt of 1 tokens with 0 new ones cannot be served": lambda engine: engine.submit([1], 0),
    "12 tokens do not fit in slot 0": lambda engine: engine.prefill([1] * 12, 0),
    "unknown slot 1": lambda engine: engine.prefill([1], 1),
    "unknown slot 7": lambda engine: engine.release(7),
    "2 rows of tokens for slots [0]": lambda engine: engine.prefill([[1], [2]], [0]),
    "2 rows of tokens for slots [0, 0]": lambda engine: engine.decode([[1], [2]], [0, 0]),
    "attention_mask and tokens have different shapes": lambda engine: engine.prefill(
        [[1, 2]], [0], attention_mask=torch.ones(1, 3)
    ),
    "slot 0 cannot be cut to 2 tokens": lambda engine: engine.truncate(0, 2),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_requests_are_refused(what: str) -> None:
    engine = engine_of()
    with pytest.raises(RolemeshError) as raised:
        REFUSED[what](engine)
    assert raised.value.code == "RM034"
    assert raised.value.what == what
    assert raised.value.why
    assert raised.value.fix
    assert engine.length(0) == 1
    assert engine.free_slots == 1


def test_slots_run_out_and_come_back() -> None:
    engine = engine_of()
    second = engine.acquire()
    with pytest.raises(RolemeshError, match=r"\[RM034\] all 2 slots are taken"):
        engine.acquire()
    with pytest.raises(RolemeshError, match=r"\[RM034\] slot 1 holds no tokens"):
        engine.decode([[1]], [second])
    with pytest.raises(RolemeshError, match="rows of \\[1, 2\\] tokens in one decode call"):
        engine.decode([[1], [2, 3]], [0, second])
    with pytest.raises(RolemeshError, match="slot 0 has no prefix of 2 tokens"):
        engine.copy_prefix(0, second, 2)
    with pytest.raises(RolemeshError, match="slot 0 already holds 1 tokens"):
        engine.copy_prefix(second, 0, 0)
    engine.release(second)
    model = model_of("llama", 1)
    prompts = prompts_of(model, [4, 9])
    assert engine.generate(prompts, 3, eos=()) == plain_tokens(model, prompts, 3)


BAD_OPTIONS: dict[str, dict[str, object]] = {
    "bad decode buckets []": {"buckets": []},
    "bad decode buckets [2, 3]": {"buckets": [2, 3]},
    "bad decode buckets [2, 0]": {"buckets": [2, 0]},
    "bad decode buckets [4, 4]": {"buckets": [4, 4]},
    "bad prefill sizes []": {"prefill_sizes": []},
    "bad prefill sizes [4, 99]": {"prefill_sizes": [4, 99]},
    "slots is 0": {"slots": 0},
    "max_len is 1000": {"max_len": 1000},
    "a model and a checkpoint are given": {"checkpoint": "somewhere"},
}


@pytest.mark.parametrize("what", BAD_OPTIONS)
def test_bad_options_are_refused(what: str) -> None:
    options = {"max_len": 16, "slots": 4, **BAD_OPTIONS[what]}
    with pytest.raises(RolemeshError) as raised:
        Engine(model_of("llama", 1), "pd_mixed", {"tp": 2}, **options)
    assert raised.value.code == "RM018"
    assert raised.value.what == what


def test_a_bucket_error_says_what_it_must_be_a_multiple_of() -> None:
    with pytest.raises(RolemeshError, match="3 is not a multiple of 2, the ranks that share"):
        Engine(model_of("llama", 1), "pd_mixed", {"tp": 2}, buckets=[3], max_len=16)


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p"])
def test_sampling_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(RolemeshError, match=rf"\[RM018\] {name} is -1"):
        engine_of().generate([[1]], 1, **{name: -1})


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gpt_neo", "logits of a tiny model differ from those of plain calls by"),
        ("bart", "RuntimeError: The size of tensor"),
    ],
)
def test_architectures_that_slots_cannot_serve_are_refused(model_type: str, why: str) -> None:
    with pytest.raises(RolemeshError, match=r"\[RM007\] models of type .* cannot be served") as bad:
        Engine(model_of(model_type), "pd_mixed", {"tp": 2}, max_len=16)
    assert bad.value.why.startswith(why)


def test_attention_without_prepared_masks_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config._attn_implementation = "flex_attention"
    with pytest.raises(RolemeshError, match=r"\[RM018\] the engine cannot mask .*'flex_attention'"):
        Engine(LlamaForCausalLM(config), "pd_mixed", {"tp": 2}, max_len=16)
