"""What role `decode` stores and computes for models that are not DeepSeek-V3.2.

Per rank a weight is `bytes / p` or whole, as the role's table says; the formula below lists what is
whole by name. Names appear in this file only: the compiler works from the graph.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import pytest
import torch

pytest.importorskip("transformers")

from tests.models import State, run_sharded

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.ir.program import tensor_type
from rolemesh.compiler.models.cases import static_cache
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.xdist_group("role_models")

BATCH, PROMPT, CAPACITY = 3, 5, 16


class Decoded:
    """A tiny model, its state behind a prompt, and its next decode step."""

    def __init__(self, name: str, **fields: object) -> None:
        self.model = tiny_model(tiny_config(name, **fields))  # type: ignore[arg-type]
        cache = static_cache(self.model, BATCH, CAPACITY)
        ids = torch.randint(3, 90, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = self.call(ids, cache)
            self.before = State(copy.deepcopy(cache), logits)
            self.traced: Traced = trace(
                self.model, self.before.tokens, past_key_values=copy.deepcopy(cache), use_cache=True
            )
            after = copy.deepcopy(cache)
            self.after = State(after, self.call(self.before.tokens, after))

    def call(self, ids: torch.Tensor, cache: object) -> torch.Tensor:
        return self.model(ids, past_key_values=cache, use_cache=True).logits

    def decode(self, ranks: int) -> Sharded:
        return shard(self.traced, {"tp": ranks}, "decode", phase="decode")


@functools.cache
def decoded(name: str, fields: tuple[tuple[str, object], ...] = ()) -> Decoded:
    return Decoded(name, **dict(fields))


def stored(sharded: Sharded) -> dict[str, str]:
    program = sharded.program
    return {
        entry.name: program.layout(node).text(tensor_type(node), program.the_mesh)
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if entry.is_state
    }


def moved(sharded: Sharded) -> list[str]:
    return [entry.op for entry in sharded.collectives]


def check_step(case: Decoded, ranks: int) -> None:
    """One decode step on all ranks, pads poisoned, gives the model's logits and cache."""
    cache = copy.deepcopy(case.before.cache)
    found = run_sharded(case.decode(ranks), case.before.tokens, cache)
    torch.testing.assert_close(found.logits, case.after.logits, rtol=1e-4, atol=2e-5)
    for name, tensor in case.after.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=2e-5)


# ---- bytes of weights ----------------------------------------------------------------------------

WHOLE: Mapping[str, tuple[str, ...]] = {
    "deepseek_v3": ("*norm*", "*q_a_proj*", "*kv_a_proj*", "*mlp.gate.*"),
    "deepseek_v32": ("*norm*", "*q_a_proj*", "*kv_a_proj*", "*mlp.gate.*", "*indexer*"),
    "gemma2": ("*norm*",),
    "gpt2": ("*.ln_*", "*bias"),
    "gpt_oss": ("*norm*", "*bias", "*router*", "*sinks"),
    "phi3": ("*norm*",),
    "qwen2_moe": ("*norm*", "*bias", "*mlp.gate.*", "*shared_expert_gate*"),
}
"""Weights of each model that every rank holds; all others are split over all ranks.

These are norms, biases, routers, and what is small because it leads to a latent.
"""

UNITS = {"*embed_tokens*": 0, "*lm_head*": 0, "*wte*": 0, "*wpe*": 0}
"""Dims cut row by row, so padded to a multiple of the ranks; others are cut in even parts."""


def per_rank(case: Decoded, name: str, ranks: int) -> int:
    """Bytes of weights on one rank, by the role's formula."""
    total = 0
    for weight, tensor in case.model.named_parameters():
        shape = list(tensor.shape)
        if not any(fnmatchcase(weight, pattern) for pattern in WHOLE[name]):
            rows = any(fnmatchcase(weight, pattern) for pattern in UNITS)
            shape[0] = -(-shape[0] // ranks) if rows else shape[0]
            total += math.prod(shape) * tensor.itemsize // (1 if rows else ranks)
        else:
            total += tensor.nbytes
    buffers = (b for b in case.traced.program.inputs if b.kind.value in ("buffer", "constant"))
    names = {entry.name for entry in buffers if not entry.mutated}
    nodes = zip(case.traced.program.placeholders, case.traced.program.inputs, strict=True)
    return total + sum(tensor_type(node).nbytes for node, e in nodes if e.name in names)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_weights_per_rank_are_the_formula(name: str, ranks: int) -> None:
    case = decoded(name, (("layers", 2),))
    assert case.decode(ranks).memory_analysis().weights == per_rank(case, name, ranks)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_oss", "qwen2_moe"])
def test_a_decode_step_is_exact(name: str) -> None:
    check_step(decoded(name, (("layers", 2),)), 4)


# ---- key and value heads -------------------------------------------------------------------------

GROUPED = {
    # key heads, query heads, ranks: how keys, and then queries, lie
    (1, 8, 2): ("f32[12, 72]", "f32[(8@tp x 12), 72]"),
    (1, 8, 4): ("f32[12, 72]", "f32[(8@tp x 12), 72]"),
    (2, 8, 2): ("f32[(2@tp x 12), 72]", "f32[(2@tp x 48), 72]"),
    (2, 8, 4): ("f32[(2@tp/2 x 12), 72]", "f32[(8@tp x 12), 72]"),
    (2, 8, 8): ("f32[(2@tp/4 x 12), 72]", "f32[(8@tp x 12), 72]"),
    (3, 12, 2): ("f32[(3@tp x 12), 72]", "f32[(3@tp x 48), 72]"),
    (3, 12, 4): ("f32[36, 72]", "f32[(12@tp x 12), 72]"),
}
SUMS = ["all_reduce"] * 3 + ["all_gather"]
"""Embedding, attention and MLP of one layer, and the logits."""


@pytest.mark.parametrize(("heads", "queries", "ranks"), sorted(GROUPED))
def test_key_heads_lie_in_groups_of_ranks(heads: int, queries: int, ranks: int) -> None:
    fields = (("layers", 1), ("num_key_value_heads", heads), ("num_attention_heads", queries))
    case = decoded("llama", fields)
    sharded = case.decode(ranks)
    found = stored(sharded)
    layer = "model.layers.0.self_attn"
    key, query = GROUPED[heads, queries, ranks]
    assert found[f"{layer}.k_proj.weight"] == found[f"{layer}.v_proj.weight"] == key
    assert found[f"{layer}.q_proj.weight"] == query
    held = key[4 : key.index(",")].strip("()").split(" x ")[0].replace("12", "1").replace("36", "3")
    assert found["past_key_values.layers[0].keys"] == f"f32[3, {held}, 16, 12]"
    assert moved(sharded) == SUMS
    check_step(case, ranks)


# ---- packed weights ------------------------------------------------------------------------------

PACKED = {
    ("phi3", 8): {
        "qkv_proj": "f32[(3 x 8@tp x 16), 128]",
        "gate_up_proj": "f32[(2 x 136@tp), 128]",
    },
    ("phi3", 4): {"qkv_proj": "f32[(4@tp x 32) + (4@tp x 16) + (4@tp x 16), 128]"},
    ("phi3", 2): {"qkv_proj": "f32[(8@tp x 16) + (2@tp/2 x 16) + (2@tp/2 x 16), 128]"},
    ("gpt2", 0): {"c_attn": "f32[128, (3 x 8@tp x 16)]"},
    ("bloom", 0): {"query_key_value": "f32[(8@tp x 24), 64]"},
    ("gpt_neox", 0): {"query_key_value": "f32[(8@tp x 48), 128]"},
    ("gpt_bigcode", 0): {"c_attn": "f32[(8@tp x 16) + 16 + 16, 128]"},
}


@pytest.mark.parametrize(("name", "heads"), sorted(PACKED))
def test_a_packed_weight_is_cut_segment_by_segment(name: str, heads: int) -> None:
    fields = (("layers", 1), *((("num_key_value_heads", heads),) if heads else ()))
    case = decoded(name, fields)
    sharded = case.decode(4)
    found = stored(sharded)
    for part, text in PACKED[name, heads].items():
        assert [t for weight, t in found.items() if weight.endswith(f".{part}.weight")] == [text]
    assert moved(sharded) == SUMS
    check_step(case, 4)


# ---- tied embeddings -----------------------------------------------------------------------------


def test_tied_embeddings_are_stored_once() -> None:
    case = decoded("gemma2", (("layers", 1),))
    found = stored(case.decode(4))
    assert found["model.embed_tokens.weight"] == "f32[251@tp, 128]"
    assert "lm_head.weight" not in found
    check_step(case, 4)
