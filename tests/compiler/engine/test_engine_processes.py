"""Ranks as processes: a checkpoint is loaded shard by shard and served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.compiler.engine.serving import model_of, plain_tokens, prompts_of

import rolemesh
from rolemesh import Engine
from rolemesh.compiler.engine.rows import SlotState
from rolemesh.compiler.models.tiny_models import tiny_config
from rolemesh.runtime.launch import run_processes

NEW_TOKENS = 4


def serve(checkpoint: str, prompts: list[list[int]]) -> tuple[list[list[int]], int, int, int, bool]:
    """One rank's part: tokens, programs, bytes of weights and caches, whether a slot is kept."""
    config = tiny_config("llama", layers=1)
    made = {"checkpoint": checkpoint, "dtype": torch.float32, "slots": 2, "max_len": 24}
    engine = Engine(config, "pd_mixed", {"tp": 2}, prefill_sizes=[8], **made)
    tokens = engine.generate(prompts, NEW_TOKENS, eos=())
    weights, caches = engine.bytes_on_this_rank
    decoder = Engine(config, "decode", {"tp": 2}, **made)
    generator = torch.Generator().manual_seed(2)
    state = SlotState(
        5,
        5,
        {name: torch.randn(4, 5, 12, generator=generator) for name in decoder.plan.tensors},
    )
    found = decoder.export_slot(decoder.import_slot(state))
    same = all(torch.equal(found.tensors[name], value) for name, value in state.tensors.items())
    halved = decoder.bytes_on_this_rank[1] * 2 == caches
    return tokens, len(engine.compiled), weights, caches, same and halved


@pytest.mark.processes
def test_two_processes_serve_a_checkpoint(tmp_path: Path) -> None:
    model = model_of("llama", 1)
    model.save_pretrained(tmp_path)
    prompts = prompts_of(model, [3, 11, 1, 6])
    ranks = run_processes(serve, 2, (str(tmp_path), prompts), timeout=240, fork=True)
    expected = plain_tokens(model, prompts, NEW_TOKENS)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    split = ("o_proj", "mlp", "embed_tokens", "lm_head")
    for served in ranks:
        assert isinstance(served, tuple)
        tokens, compiled, weights, caches, round_trip = served
        assert tokens == expected
        assert compiled == 2
        assert round_trip
        # Half of what is split, where 251 rows are padded to 252, and all of the rest.
        halves = sum(size for name, size in sizes.items() if any(part in name for part in split))
        pads = 2 * model.config.hidden_size * 4 // 2
        whole = sum(sizes.values()) - halves
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        assert weights == whole + halves // 2 + pads + buffers
        assert caches == 3 * 2 * 4 * 24 * 12 * 4


def serve_own(checkpoint: str, prompts: list[list[int]]) -> list[list[int]]:
    """One rank's tokens, from files of ranks."""
    config = tiny_config("llama", layers=1)
    made = {"checkpoint": checkpoint, "dtype": torch.float32, "slots": 2, "max_len": 16}
    engine = Engine(config, "pd_mixed", {"tp": 2}, prefill_sizes=[8], **made)
    return engine.generate(prompts, 2, eos=())


@pytest.mark.processes
def test_ranks_serve_files_of_their_own(tmp_path: Path) -> None:
    """Another program of the model says where weights lie; its engine finds them there."""
    model = model_of("llama", 1)
    model.save_pretrained(tmp_path / "hub")
    with torch.no_grad():
        traced = rolemesh.trace(model, torch.arange(16).reshape(2, 8))
    sharded = rolemesh.shard(traced, {"tp": 2}, role="pd_mixed", phase="prefill")
    rolemesh.reshard(tmp_path / "hub", rolemesh.manifest(sharded, model), tmp_path / "ranks")
    prompts = prompts_of(model, [3, 6])
    expected = plain_tokens(model, prompts, 2)
    ranks = run_processes(serve_own, 2, (str(tmp_path / "ranks"), prompts), timeout=240, fork=True)
    assert ranks == [expected, expected]
