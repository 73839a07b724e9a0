"""The engine against the single device: phases, slots, replicas and continuous batching."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch
from tests.compiler.engine.serving import (
    TOLERANCE,
    logits_of,
    model_of,
    plain_tokens,
    prompts_of,
)

import rolemesh
from rolemesh import Engine
from rolemesh.compiler.engine.programs import ProgramKey

pytestmark = pytest.mark.xdist_group("engine")


@functools.cache
def engine_of() -> Engine:
    """An engine of one layer, whose tests leave all slots free."""
    return Engine(model_of("llama", 1), "pd_mixed", {"tp": 2}, slots=8, max_len=32, buckets=[4, 8])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_200_requests_through_8_slots_equal_each_alone() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    dice = random.Random(3)
    prompts = prompts_of(model, [dice.randint(1, 20) for _ in range(200)])
    wanted = [dice.randint(1, 6) for _ in prompts]
    alone = plain_tokens(model, prompts, max(wanted))
    numbers = [
        engine.submit(prompt, count, eos=()) for prompt, count in zip(prompts, wanted, strict=True)
    ]
    found: dict[int, list[int]] = {}
    most = 0
    while engine.busy:
        found |= {done.number: list(done.tokens) for done in engine.step()}
        most = max(most, 8 - engine.free_slots)
    assert most >= 7  # requests really share steps
    assert engine.free_slots == 8
    for number, count, tokens in zip(numbers, wanted, alone, strict=True):
        assert found[number] == tokens[:count]


def test_one_program_serves_all_prompts_and_one_each_bucket() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    engine.generate(prompts_of(model, [3, 1, 9, 7, 2, 5, 11]), 3, eos=())
    keys = {
        ProgramKey("prefill", 1, None, fresh=True, last=True),
        ProgramKey("decode", 4, 1, fresh=True, last=False),
        ProgramKey("decode", 8, 1, fresh=True, last=False),
    }
    before = engine.compiled
    assert keys <= set(before)
    engine.generate(prompts_of(model, [4, 6, 8, 13, 2, 16, 3], seed=1), 2, eos=())
    assert engine.compiled == before


def test_a_stop_token_ends_a_request() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    prompts = prompts_of(model, [5, 9])
    alone = plain_tokens(model, prompts, 6)
    stop = alone[0][2]
    found = engine.generate(prompts, 6, eos=stop)
    for tokens, whole in zip(found, alone, strict=True):
        cut = whole.index(stop) + 1 if stop in whole else len(whole)
        assert tokens == whole[:cut]


def test_ragged_rows_equal_each_alone_whatever_the_side_of_pads() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    prompts = prompts_of(model, [5, 1, 8])
    slots = [engine.acquire() for _ in prompts]
    ids = torch.zeros(3, 8, dtype=torch.long)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = 8 - len(prompt) if row == 0 else 0  # pads in front, or behind
        ids[row, start : start + len(prompt)] = torch.tensor(prompt)
        mask[row, start : start + len(prompt)] = 1
    found = engine.prefill(ids, slots, attention_mask=mask)
    close(found, torch.stack([logits_of(model, prompt)[-1] for prompt in prompts]))
    step = engine.decode([[7], [8], [9]], slots)
    for row, (prompt, token) in enumerate(zip(prompts, (7, 8, 9), strict=True)):
        close(step[row, 0], logits_of(model, [*prompt, token])[-1])
    for slot in slots:
        engine.release(slot)


def test_position_ids_of_the_user_reach_the_model() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    (prompt,) = prompts_of(model, [6])
    positions = torch.tensor([[0, 3, 4, 7, 8, 11]])
    slot = engine.acquire()
    found = engine.prefill(prompt, slot, position_ids=positions)
    with torch.no_grad():
        ids = torch.tensor([[*prompt, 9]])
        after = torch.cat([positions, torch.tensor([[12]])], 1)
        mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
        expected = model(ids, position_ids=after, attention_mask=mask).logits[0]
    close(found[0], expected[5])
    close(engine.decode([[9]], [slot])[0, 0], expected[6])  # counts on from the user's last one
    engine.release(slot)


def test_chunks_and_prefix_hits_equal_one_call() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    (prompt,) = prompts_of(model, [15])
    whole, chunked, hit = (engine.acquire() for _ in range(3))
    expected = engine.prefill(prompt, whole)
    close(expected[0], logits_of(model, prompt)[-1])
    for start, stop in ((0, 4), (4, 5), (5, 15)):
        found = engine.prefill(prompt[start:stop], chunked)
    close(found, expected)
    engine.copy_prefix(whole, hit, 9)
    assert engine.length(hit) == 9
    close(engine.prefill(prompt[9:], hit), expected)
    steps = engine.decode([[3], [3], [3]], [whole, chunked, hit])
    close(steps[1], steps[0])
    close(steps[2], steps[0])
    for slot in (whole, chunked, hit):
        engine.release(slot)


def test_drafts_are_verified_in_one_call_and_forgotten() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    first, second = prompts_of(model, [7, 4])
    slots = [engine.acquire(), engine.acquire()]
    engine.prefill([first, second], slots)
    found = engine.decode([[5, 6, 7], [8, 9, 10]], slots)
    assert found.shape[:2] == (2, 3)
    close(found[0], logits_of(model, [*first, 5, 6, 7])[-3:])
    close(found[1], logits_of(model, [*second, 8, 9, 10])[-3:])
    engine.truncate(slots[0], 8)  # 6 and 7 are refused
    close(engine.decode([[11]], slots[:1])[0, 0], logits_of(model, [*first, 5, 11])[-1])
    for slot in slots:
        engine.release(slot)


def test_requests_see_neither_other_slots_nor_what_was_in_theirs() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    tables = engine.replicas[0].rows.tables
    for table in tables.values():
        table.fill_(math.nan)
    (prompt,) = prompts_of(model, [6])
    slot = engine.acquire()
    found = engine.prefill(prompt, slot)
    step = engine.decode([[4]], [slot])
    engine.release(slot)
    assert all(table.isnan().any() for table in tables.values())
    for table in tables.values():
        table.zero_()
    close(found[0], logits_of(model, prompt)[-1])
    close(step[0, 0], logits_of(model, [*prompt, 4])[-1])


def test_results_own_their_memory() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    slot = engine.acquire()
    first = engine.prefill(prompts_of(model, [3])[0], slot)
    copy = first.clone()
    engine.decode([[1]], [slot])
    engine.release(slot)
    assert torch.equal(first, copy)


def test_sampling_depends_on_the_seed_alone() -> None:
    engine, model = engine_of(), model_of("llama", 1)
    prompts = prompts_of(model, [4, 9, 2])
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "eos": ()}
    together = engine.generate(prompts, 5, seed=11, **options)
    alone = [
        engine.generate([prompt], 5, seed=11 + index, **options)[0]
        for index, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert engine.generate(prompts, 5, seed=12, **options) != together


def test_a_prompt_of_one_token_on_more_ranks_than_tokens() -> None:
    model = model_of("llama", 1)
    engine = Engine(model, "pd_mixed", {"tp": 4}, slots=3, max_len=16)
    prompts = prompts_of(model, [1, 3, 2])
    assert engine.generate(prompts, 3, eos=()) == plain_tokens(model, prompts, 3)
    assert {key.rows for key in engine.compiled if key.phase == "decode"} == {4}


def test_replicas_serve_requests_of_their_own() -> None:
    model = model_of("llama", 1)
    engine = Engine(model, "pd_mixed", {"dp": 2, "tp": 2}, slots=2, max_len=16)
    prompts = prompts_of(model, [2, 7, 4, 9, 1])
    assert len(engine.replicas) == 2
    assert engine.generate(prompts, 3, eos=()) == plain_tokens(model, prompts, 3)
    assert {key.phase for key in engine.compiled} == {"prefill", "decode"}
    for replica in engine.replicas:
        assert all(table[:2].any() for table in replica.rows.tables.values())


def test_a_prefill_node_hands_slots_to_a_decode_node() -> None:
    model = model_of("gemma3_text", 2)
    (prompt,) = prompts_of(model, [13])  # longer than the sliding window
    reader = Engine(model, "prefill", {"tp": 2}, slots=1, max_len=24, prefill_sizes=[8])
    writer = Engine(model, "decode", {"tp": 4}, slots=2, max_len=20)
    slot = reader.acquire()
    logits = reader.prefill(prompt, slot)
    close(logits[0], logits_of(model, prompt)[-1])
    taken = writer.import_slot(reader.export_slot(slot))
    tokens = list(prompt)
    for _ in range(3):
        tokens.append(int(logits[0].argmax()))
        logits = writer.decode([tokens[-1:]], [taken])[:, -1]
        close(logits[0], logits_of(model, tokens)[-1])
    with pytest.raises(rolemesh.RolemeshError, match=r"\[RM004\] role 'prefill' has no phase"):
        reader.decode([[1]], [slot])
    with pytest.raises(rolemesh.RolemeshError, match=r"\[RM004\] role 'decode' has no phase"):
        writer.prefill([1], taken)
    with pytest.raises(rolemesh.RolemeshError, match=r"\[RM004\]"):
        writer.generate([prompt], 2)
