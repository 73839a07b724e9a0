"""What each role must produce on the small DeepSeek-V3.2: storage, collectives and their bytes.

The sizes are those of the small model of docs/roles.md: hidden 112, 16 heads of v 16, latent 32,
rope 8, index keys 20; of its 7 layers 5 are enough. Names of modules and parameters appear in this
file only: the compiler works from the graph.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("transformers")

from tests.models import PipelineStage, Prompt, Setup, sharded_once, traced

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.dialect import ALL_GATHER, BROADCAST_START, STARTS, is_bundle
from rolemesh.compiler.ir.placement import Owner
from rolemesh.compiler.ir.program import origin, tensor_type, tensor_types
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.classify import StorageClass, classify
from rolemesh.passes.cost import CostTable

pytestmark = pytest.mark.xdist_group("roles")

DSA = Setup("deepseek_v32", "sdpa", "batched_mm", layers=5)
ONE_LAYER = Setup("deepseek_v32", "sdpa", "batched_mm", layers=1)
LAYERS = range(5)
HIDDEN, LATENT, ROPE, INDEX = 112, 32, 8, 20
K = 16 * 16  # heads x v
QUERY_UP = 384 * 48 * 4  # bytes of q_b_proj
OUTPUT = HIDDEN * K * 4  # bytes of o_proj
BATCH = 8

Moved = list[tuple[str, int]]


def prompt(tokens: int) -> Prompt:
    return Prompt(1, tokens, tokens + 8)


def prefill(ranks: int, role: str = "prefill", tokens: int = 32) -> Sharded:
    return sharded_once(DSA, prompt(tokens), ranks, role)


def decode(ranks: int, role: str = "decode") -> Sharded:
    return sharded_once(DSA, Prompt(BATCH, 16), ranks, role, 0)


def moved(sharded: Sharded, module: str) -> Moved:
    """Collectives of one module in the order of their starts, with the bytes a rank receives."""
    return [
        (entry.op, entry.bytes_received)
        for entry in sharded.collectives
        if entry.module == module or entry.module.startswith(f"{module}.")
    ]


def attention(sharded: Sharded, layer: int) -> Moved:
    return moved(sharded, f"model.layers.{layer}.self_attn")


def f(ranks: int, whole: int) -> int:
    """The part of `whole` bytes that a rank does not have yet: whole * (p - 1) / p."""
    assert whole * (ranks - 1) % ranks == 0
    return whole * (ranks - 1) // ranks


def key_values(ranks: int, tokens: int) -> tuple[str, int]:
    """The gather of latents, rope keys and index keys: one bundle, f * T * (32 + 8 + 20) * 4."""
    return "all_gather", f(ranks, tokens * (LATENT + ROPE + INDEX) * 4)


def key_bundles(sharded: Sharded) -> list[list[int]]:
    """The features of what each bundle of the attentions' keys gathers."""
    attentions = [f"model.layers.{layer}.self_attn" for layer in LAYERS]
    return [
        [kind.shape[-1] for kind in tensor_types(node)]
        for node in sharded.program.ops
        if node.target in (ALL_GATHER, STARTS[ALL_GATHER])
        and is_bundle(node)
        and origin(node).module in attentions
    ]


def storage(sharded: Sharded) -> dict[str, str]:
    program = sharded.program
    return {
        entry.name: program.layout(node).text(tensor_type(node), program.the_mesh)
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
        if entry.is_state
    }


# ---- storage -------------------------------------------------------------------------------------

REPLICATED = {
    "self_attn.q_a_proj.weight": "f32[48, 112]",
    "self_attn.kv_a_proj_with_mqa.weight": "f32[40, 112]",
    "self_attn.indexer.wq_b.weight": "f32[160, 48]",
    "self_attn.indexer.wk.weight": "f32[20, 112]",
    "self_attn.indexer.weights_proj.weight": "f32[8, 112]",
    "input_layernorm.weight": "f32[112]",
    "mlp.gate.weight": "f32[16, 112]",
}
EXPERTS = {
    "mlp.experts.gate_up_proj": "f32[16@tp, 72, 112]",
    "mlp.experts.down_proj": "f32[16@tp, 112, 36]",
}
SPLIT_SHARED_EXPERTS = {
    "mlp.shared_experts.gate_proj.weight": "f32[36@tp, 112]",
    "mlp.shared_experts.down_proj.weight": "f32[112, 36@tp]",
}
STORAGE = {
    "prefill": {
        **REPLICATED,
        **EXPERTS,
        "self_attn.q_b_proj.weight": "f32[384, 48] owner(0)@tp",
        "self_attn.kv_b_proj.weight": "f32[512, 32]",
        "self_attn.o_proj.weight": "f32[112, 256] owner(0)@tp",
        "mlp.shared_experts.gate_proj.weight": "f32[36, 112]",
        "mlp.shared_experts.down_proj.weight": "f32[112, 36]",
    },
    "pd_mixed": {
        **REPLICATED,
        **EXPERTS,
        **SPLIT_SHARED_EXPERTS,
        "self_attn.q_b_proj.weight": "f32[384, 48]",
        "self_attn.kv_b_proj.weight": "f32[512, 32]",
        "self_attn.o_proj.weight": "f32[112, (16@tp x 16)]",
    },
    "decode": {
        **REPLICATED,
        **EXPERTS,
        **SPLIT_SHARED_EXPERTS,
        "self_attn.q_b_proj.weight": "f32[(16@tp x 24), 48]",
        "self_attn.kv_b_proj.weight": "f32[(16@tp x 32), 32]",
        "self_attn.o_proj.weight": "f32[112, (16@tp x 16)]",
    },
}


@pytest.mark.parametrize(
    ("role", "phase"),
    [("prefill", "prefill"), ("pd_mixed", "prefill"), ("pd_mixed", "decode"), ("decode", "decode")],
)
def test_weights_are_stored_as_the_table_says(role: str, phase: str) -> None:
    found = storage((prefill if phase == "prefill" else decode)(4, role))
    prefix = "model.layers.4."
    assert {name: found[prefix + name] for name in STORAGE[role]} == STORAGE[role]
    dense = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"
    vocabulary = "f32[251, 112]" if role == "prefill" else "f32[251@tp, 112]"
    assert [found[name] for name in dense] == (
        ["f32[68, 112]", "f32[112, 68]"]
        if role == "prefill"
        else ["f32[68@tp, 112]", "f32[112, 68@tp]"]
    )
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == vocabulary
    caches = [text for name, text in found.items() if name.startswith("past_key_values")]
    assert len(caches) == 5 * len(LAYERS)
    assert not any("@" in text for text in caches)


def test_both_phases_of_pd_mixed_have_one_storage() -> None:
    first, then = storage(prefill(4, "pd_mixed", 512)), storage(decode(4, "pd_mixed"))
    weights = {name for name in first if not name.startswith("past_key_values")}
    assert {name: first[name] for name in weights} == {name: then[name] for name in weights}


@pytest.mark.parametrize("ranks", [2, 4])
def test_layer_sharded_weights_lie_on_rank_layer_modulo_ranks(ranks: int) -> None:
    found = storage(prefill(ranks))
    for layer in LAYERS:  # 5 layers: the last turn is not full
        for name in ("q_b_proj", "o_proj"):
            text = found[f"model.layers.{layer}.self_attn.{name}.weight"]
            assert text.endswith(f" owner({layer % ranks})@tp")


def test_owners_count_from_the_layer_number_not_from_the_first_layer() -> None:
    ids = torch.zeros(1, 8, dtype=torch.int64)
    program = shard(trace(PipelineStage(), ids), {"tp": 4}, "prefill").program
    owners = {
        entry.name: program.layout(node).placements[0]
        for node, entry in zip(program.placeholders, program.inputs, strict=True)
    }
    for number in PipelineStage.NUMBERS:
        assert owners[f"layers.{number}.q.weight"] == Owner(number % 4)
        assert owners[f"layers.{number}.o.weight"] == Owner(number % 4)


# ---- collectives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_prefill_gathers_keys_and_broadcasts_the_owned_weights(ranks: int) -> None:
    sharded = prefill(ranks)
    broadcast = [("broadcast", QUERY_UP), ("broadcast", OUTPUT)]
    for layer in LAYERS:
        assert sorted(attention(sharded, layer)) == sorted([key_values(ranks, 32), *broadcast])
    assert key_bundles(sharded) == [[LATENT, ROPE, INDEX]] * len(LAYERS)
    program = sharded.program
    names = dict(zip(program.placeholders, program.inputs, strict=True))
    received = {entry.node: entry.bytes_received for entry in sharded.collectives}
    broadcasts = {
        names[node.args[0]].name: received[node.name]  # type: ignore[index]
        for node in program.ops
        if node.target is BROADCAST_START
    }
    assert broadcasts == {
        f"model.layers.{layer}.self_attn.{name}.weight": size
        for layer in LAYERS
        for name, size in (("q_b_proj", QUERY_UP), ("o_proj", OUTPUT))
    }


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_pd_mixed_prefill_of_few_tokens_moves_activations_to_the_weights(ranks: int) -> None:
    sharded = prefill(ranks, "pd_mixed")
    for layer in LAYERS:
        assert attention(sharded, layer) == [
            key_values(ranks, 32),
            ("all_to_all", f(ranks, 32 // ranks * K * 4)),
            ("reduce_scatter", f(ranks, 32 * HIDDEN * 4)),
        ]
    assert key_bundles(sharded) == [[LATENT, ROPE, INDEX]] * len(LAYERS)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_pd_mixed_prefill_of_many_tokens_gathers_the_weight(ranks: int) -> None:
    sharded = prefill(ranks, "pd_mixed", 512)
    for layer in LAYERS:
        assert attention(sharded, layer) == [
            ("all_gather", f(ranks, OUTPUT)),  # starts early, as it reads no activations
            key_values(ranks, 512),
        ]
    assert key_bundles(sharded) == [[LATENT, ROPE, INDEX]] * len(LAYERS)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_pd_mixed_decode_exchanges_heads_for_tokens_before_the_output_projection(
    ranks: int,
) -> None:
    sharded = decode(ranks, "pd_mixed")
    for layer in LAYERS:
        assert attention(sharded, layer) == [
            key_values(ranks, BATCH),
            ("all_to_all", f(ranks, BATCH // ranks * K * 4)),
            ("reduce_scatter", f(ranks, BATCH * HIDDEN * 4)),
        ]
    assert key_bundles(sharded) == [[LATENT, ROPE, INDEX]] * len(LAYERS)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_decode_sums_once_after_attention_and_once_after_the_mlp(ranks: int) -> None:
    """Routed and shared experts are added while both are partial."""
    sharded = decode(ranks)
    summed = [("all_reduce", 2 * f(ranks, BATCH * HIDDEN * 4))]
    for layer in LAYERS:
        assert attention(sharded, layer) == summed
        assert moved(sharded, f"model.layers.{layer}.mlp") == summed
        assert moved(sharded, f"model.layers.{layer}") == summed * 2


# ---- where the output projection flips -----------------------------------------------------------


def crossover(ranks: int, exchange_price: float = 1.0) -> float:
    """Tokens at which moving activations costs as much as gathering the weight.

    The all_to_all receives f (T / p) K b, the reduce_scatter f T H b, the weight f K H b.
    """
    return K * HIDDEN / (exchange_price * K / ranks + HIDDEN)


def output_program(tokens: int, ranks: int, costs: CostTable) -> list[str]:
    """The collectives of the output projection."""
    one = traced(ONE_LAYER, prompt(tokens))
    sharded = shard(one, {"tp": ranks}, "pd_mixed", phase="prefill", costs=costs)
    return [op for op, _ in moved(sharded, "model.layers.0.self_attn.o_proj")]


MOVES_ACTIVATIONS = ["all_to_all", "reduce_scatter"]
GATHERS_WEIGHT = ["all_gather"]


@pytest.mark.parametrize(
    ("costs", "below", "above"),
    [(CostTable(), 160, 168), (CostTable(all_to_all=4.0), 72, 80)],
    ids=["by-bytes", "all_to_all-4x-dearer"],
)
def test_the_output_projection_flips_where_the_prices_say(
    costs: CostTable, below: int, above: int
) -> None:
    point = crossover(4, costs.all_to_all)
    assert below < point < above
    assert output_program(below, 4, costs) == MOVES_ACTIVATIONS
    assert output_program(above, 4, costs) == GATHERS_WEIGHT


def test_the_flip_moves_with_the_number_of_ranks() -> None:
    assert crossover(8) > 168 > crossover(4)
    assert output_program(168, 8, CostTable()) == MOVES_ACTIVATIONS


# ---- classes of weights --------------------------------------------------------------------------

CLASSES = {
    "embed_tokens.weight": StorageClass.EMBEDDING,
    "lm_head.weight": StorageClass.LM_HEAD,
    "q_a_proj.weight": StorageClass.QUERY_DOWN,
    "q_b_proj.weight": StorageClass.QUERY,
    "q_proj.weight": StorageClass.QUERY,
    "k_proj.weight": StorageClass.KEY_VALUE,
    "v_proj.weight": StorageClass.KEY_VALUE,
    "kv_a_proj_with_mqa.weight": StorageClass.KEY_VALUE,
    "kv_b_proj.weight": StorageClass.KEY_VALUE_UP,
    "o_proj.weight": StorageClass.ATTENTION_OUT,
    "indexer.wq_b.weight": StorageClass.INDEXER,
    "indexer.wk.weight": StorageClass.KEY_VALUE,  # its result is what the index cache holds
    "indexer.weights_proj.weight": StorageClass.INDEXER,
    "gate_proj.weight": StorageClass.MLP_IN,
    "up_proj.weight": StorageClass.MLP_IN,
    "down_proj.weight": StorageClass.MLP_OUT,
    "mlp.gate.weight": StorageClass.ROUTER,
    "mlp.router.weight": StorageClass.ROUTER,
    "experts.gate_up_proj": StorageClass.EXPERTS,
    "experts.down_proj": StorageClass.EXPERTS,
    "keys": StorageClass.CACHE,
    "values": StorageClass.CACHE,
}


def named_class(name: str) -> StorageClass:
    """What a person reads off the name; vectors and scalars are nothing in particular."""
    found = [kind for ending, kind in CLASSES.items() if name.endswith(ending)]
    return found[0] if found else StorageClass.OTHER


@pytest.mark.parametrize(
    ("model", "experts"),
    [
        ("llama", None),
        *itertools.product(
            ("deepseek_v32", "qwen3_moe", "gpt_oss", "deepseek_v3"), ("batched_mm", "grouped_mm")
        ),
    ],
)
def test_the_graph_says_what_each_weight_is(model: str, experts: str | None) -> None:
    trace_of = traced(Setup(model, "sdpa", experts, layers=2), Prompt(1, 5))
    program = Canonicalise().apply(trace_of.program)
    names = dict(zip(program.placeholders, program.inputs, strict=True))
    found = {names[node].name: stored.kind for node, stored in classify(program).items()}
    assert found == {name: named_class(name) for name in found}
    assert len(found) == sum(entry.is_state for entry in program.inputs)
