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

from tests.models import State

from rolemesh.compiler.api import Sharded, lockstep, shard
from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.ir.program import tensor_type
from rolemesh.compiler.models.cases import cache_argument, static_cache
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model

pytestmark = pytest.mark.xdist_group("role_models")

BATCH, PROMPT, CAPACITY = 3, 5, 16


class Decoded:
    """A tiny model, its state behind a prompt, and its next decode step."""

    def __init__(self, name: str, **fields: object) -> None:
        self.model = tiny_model(tiny_config(name, **fields))  # type: ignore[arg-type]
        self.sharded: dict[int, Sharded] = {}
        cache = static_cache(self.model, BATCH, CAPACITY)
        ids = torch.randint(3, 90, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits = self.call(ids, cache)
            self.before = State(copy.deepcopy(cache), logits)
            self.traced: Traced = trace(
                self.model, self.before.tokens, **self.arguments(copy.deepcopy(cache))
            )
            after = copy.deepcopy(cache)
            self.after = State(after, self.call(self.before.tokens, after))

    def call(self, ids: torch.Tensor, cache: object) -> torch.Tensor:
        return self.model(ids, **self.arguments(cache)).logits

    def arguments(self, cache: object) -> dict[str, object]:
        return {cache_argument(self.model, "decode"): cache, "use_cache": True}

    def decode(self, ranks: int) -> Sharded:
        if ranks not in self.sharded:
            found = shard(self.traced, {"tp": ranks}, "decode", phase="decode")
            self.sharded[ranks] = found
        return self.sharded[ranks]


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
    arguments = case.arguments(cache)
    output = lockstep(case.decode(ranks), case.before.tokens, poison=True, check=True, **arguments)
    found = State(cache, output.logits)  # type: ignore[attr-defined]
    torch.testing.assert_close(found.logits, case.after.logits, rtol=1e-4, atol=2e-5)
    for name, tensor in case.after.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=2e-5)


# ---- bytes of weights ----------------------------------------------------------------------------

WHOLE: Mapping[str, tuple[str, ...]] = {
    "deepseek_v3": ("*norm*", "*q_a_proj*", "*kv_a_proj*", "*mlp.gate.*"),
    "deepseek_v32": ("*norm*", "*q_a_proj*", "*kv_a_proj*", "*mlp.gate.*", "*indexer*"),
    "falcon_h1": ("*norm*",),
    "gemma2": ("*norm*",),
    "gpt2": ("*.ln_*", "*bias"),
    "gpt_oss": ("*norm*", "*bias", "*router*", "*sinks"),
    "mamba": ("*norm*",),
    "mamba2": ("*layers.?.norm.*", "*norm_f*"),
    "phi3": ("*norm*",),
    "qwen2_moe": ("*norm*", "*bias", "*mlp.gate.*", "*shared_expert_gate*"),
    "qwen3_next": ("*norm*", "*mlp.gate.*", "*shared_expert_gate*"),
}
"""Weights of each model that every rank holds; all others are split over all ranks.

These are norms, biases, routers, and what is small because it leads to a latent.
"""

UNITS = {"*embed_tokens*": 0, "*.embeddings.*": 0, "*lm_head*": 0, "*wte*": 0, "*wpe*": 0}
"""Dims cut row by row, so padded to a multiple of the ranks; others are cut in even parts."""


GROUPS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "falcon_h1": {"*mamba.in_proj*": (1, 24), "*conv1d*": (1, 24), "*mup_vector": (1, 24)},
    "mamba2": {"*in_proj*": (2, 48), "*conv1d*": (2, 48), "*mixer.norm*": (2, 256)},
    "qwen3_next": {"*k_proj*": (2, 32), "*v_proj*": (2, 32)},
}
"""How many groups of heads some rows of a weight belong to, and the rows: no rank has less of them
than one group."""


def per_rank(case: Decoded, name: str, ranks: int) -> int:
    """Bytes of weights on one rank, by the role's formula."""
    total = 0
    parameters = dict(case.model.named_parameters())
    if name == "falcon_h1":
        parameters |= {n: b for n, b in case.model.named_buffers() if n.endswith("mup_vector")}
    for weight, tensor in parameters.items():
        shape = list(tensor.shape)
        for pattern, (groups, rows) in GROUPS.get(name, {}).items():
            if fnmatchcase(weight, pattern):
                extent = max(shape[0], shape[-1]) if "vector" in weight else shape[0]
                shared = tensor.nbytes // extent * rows
                total += shared // min(groups, ranks) - shared // ranks
        if not any(fnmatchcase(weight, pattern) for pattern in WHOLE[name]):
            rows = any(fnmatchcase(weight, pattern) for pattern in UNITS)
            shape[0] = -(-shape[0] // ranks) if rows else shape[0]
            total += math.prod(shape) * tensor.itemsize // (1 if rows else ranks)
        else:
            total += tensor.nbytes
    buffers = (b for b in case.traced.program.inputs if b.kind.value in ("buffer", "constant"))
    names = {entry.name for entry in buffers if not entry.mutated} - parameters.keys()
    nodes = zip(case.traced.program.placeholders, case.traced.program.inputs, strict=True)
    return total + sum(tensor_type(node).nbytes for node, e in nodes if e.name in names)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_weights_per_rank_are_the_formula(name: str, ranks: int) -> None:
    case = decoded(name, (("layers", 2),))
    assert case.decode(ranks).memory_analysis().weights == per_rank(case, name, ranks)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_oss", "qwen2_moe", "mamba", "qwen3_next"])
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
SUMS_SIDE_BY_SIDE = ["all_reduce"] * 2 + ["all_gather"]
"""The same where attention and MLP read one value, so that their sums are one bundle."""


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
    assert moved(sharded) == (SUMS_SIDE_BY_SIDE if name == "gpt_neox" else SUMS)
    check_step(case, 4)


# ---- recurrent states ----------------------------------------------------------------------------

MIXERS = {
    ("falcon_h1", 4): {
        "mamba.in_proj.weight": "f32[(8@tp x 32) + (8@tp x 32) + 12 + 12 + 8@tp, 128]",
        "mamba.conv1d.weight": "f32[(8@tp x 32) + 12 + 12, 1, 4]",
        "mamba.conv1d.bias": "f32[(8@tp x 32) + 12 + 12]",
        "mamba.A_log": "f32[8@tp]",
        "mamba.out_proj.weight": "f32[128, (8@tp x 32)]",
        "conv_states[0]": "f32[3, (8@tp x 32) + 12 + 12, 4]",
        "recurrent_states[0]": "f32[3, 8@tp, 32, 12]",
    },
    ("mamba2", 2): {
        "conv_states[0]": "f32[3, (16@tp x 16) + (2@tp x 12) + (2@tp x 12), 4]",
        "mixer.norm.weight": "f32[(2@tp x 128)]",
    },
    ("mamba2", 4): {
        "conv1d.weight": "f32[(16@tp x 16) + (2@tp/2 x 12) + (2@tp/2 x 12), 1, 4]",
        "mixer.norm.weight": "f32[(2@tp/2 x 128)]",
    },
    ("mamba", 4): {
        "in_proj.weight": "f32[(2 x 256@tp), 128]",
        "x_proj.weight": "f32[28, 256@tp]",
        "dt_proj.weight": "f32[256@tp, 4]",
        "A_log": "f32[256@tp, 12]",
        "conv_states[0]": "f32[3, 256@tp, 4]",
    },
    ("qwen3_next", 4): {
        "in_proj_qkvz.weight": "f32[(4@tp x 96), 128]",
        "conv1d.weight": "f32[(4@tp x 16) + (4@tp x 16) + (8@tp x 16), 1, 4]",
        "dt_bias": "f32[8@tp]",
        "recurrent_states[0]": "f32[3, 8@tp, 16, 16]",
    },
}
SUMS_OF_STATES = {
    # per layer: the mixer and the MLP, if there is one; a norm over fewer groups than ranks gathers
    ("falcon_h1", 4): ["all_reduce"] * 2,
    ("mamba2", 2): ["all_reduce"],
    ("mamba2", 4): ["all_gather", "all_reduce"],
    ("mamba", 4): ["all_reduce"] * 2,  # the step size and what it weights, and the output
    ("qwen3_next", 4): ["all_reduce"] * 2,
}


@pytest.mark.parametrize(("name", "ranks"), sorted(MIXERS))
def test_weights_lie_as_the_state_that_they_lead_to(name: str, ranks: int) -> None:
    sharded = decoded(name, (("layers", 2),)).decode(ranks)
    found = stored(sharded)
    for part, text in MIXERS[name, ranks].items():
        layouts = {layout for tensor, layout in found.items() if tensor.endswith(part)}
        assert layouts == {text}, part
    assert moved(sharded) == ["all_reduce", *SUMS_OF_STATES[name, ranks] * 2, "all_gather"]


@pytest.mark.parametrize(("name", "ranks"), [("falcon_h1", 3), ("mamba2", 4)])
def test_a_step_of_a_state_by_heads_is_exact(name: str, ranks: int) -> None:
    check_step(decoded(name, (("layers", 2),)), ranks)


# ---- tied embeddings -----------------------------------------------------------------------------


def test_tied_embeddings_are_stored_once() -> None:
    case = decoded("gemma2", (("layers", 1),))
    found = stored(case.decode(4))
    assert found["model.embed_tokens.weight"] == "f32[251@tp, 128]"
    assert "lm_head.weight" not in found
    check_step(case, 4)
