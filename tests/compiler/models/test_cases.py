"""Cases and tiny models: sizes, weights, caches, MODEL arguments and every error's text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tests.models import forget_compiled
from transformers import StaticCache

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.cases import (
    Case,
    cache_tensors,
    language_model_case,
    load_case,
    static_cache,
)
from rolemesh.compiler.models.families import CAUSAL_LM, FAMILIES
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.compiler.models.tiny_overrides import CURATED, OVERRIDES

# One of each kind of layer, cache and configuration that the shrinker has to cope with.
SAMPLED = (
    "bert",
    "bart",
    "falcon",
    "gemma3",
    "glm_moe_dsa",
    "gpt2",
    "jamba",
    "llama4",
    "mamba2",
    "minimax_m3_vl_text",
    "nemotron_h",
    "phi3",
    "qwen3_5",
    "zamba2",
)
CACHED = ("deepseek_v32", "deepseek_v3", "gpt_oss", "llama")

FORMS = (
    "MODEL is hf:TYPE, hf:encoder/TYPE, hf:vision/TYPE, any of them with :config.json, "
    "or FILE.py:FUNCTION"
)


def cache_of(case: Case) -> StaticCache:
    keywords = case.phases["prefill"][1]
    (cache,) = (value for value in keywords.values() if isinstance(value, StaticCache))
    return cache


def with_cache(case: Case, cache: StaticCache) -> Case:
    """The same calls over another cache."""
    phases = {
        name: (
            args,
            {k: cache if isinstance(v, StaticCache) else v for k, v in keywords.items()},
        )
        for name, (args, keywords) in case.phases.items()
    }
    return Case(case.model, phases, case.has_logits)


def run(case: Case) -> list[torch.Tensor]:
    with torch.no_grad():
        return [case.model(*args, **keywords).logits for args, keywords in case.phases.values()]


def lengths(cache: StaticCache) -> list[dict[str, object]]:
    """Everything that the layers remember besides tensors of states, as plain values."""
    return [
        {
            name: value.tolist() if isinstance(value, torch.Tensor) else value or 0
            for name, value in vars(layer).items()
            if "length" in name or "previous" in name
        }
        for layer in cache.layers
    ]


# ---- configurations ------------------------------------------------------------------------------


def test_deepseek_v32_has_the_seven_layers_of_the_roles_document() -> None:
    config = tiny_config("deepseek_v32")
    assert (config.hidden_size, config.num_attention_heads, config.vocab_size) == (112, 16, 251)
    assert (config.q_lora_rank, config.kv_lora_rank) == (48, 32)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (16, 8, 16)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (8, 20, 8)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_group) == (16, 2, 4)
    assert (config.n_shared_experts, config.moe_intermediate_size) == (1, 36)
    assert config.intermediate_size == 68
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 6


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_no_two_dims_of_a_curated_model_are_equal(model_type: str) -> None:
    config = tiny_config(model_type)
    heads = config.num_attention_heads
    if model_type == "deepseek_v3":
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        dims = [heads, nope, rope, value, nope + rope, nope + value, config.q_lora_rank]
        dims += [config.kv_lora_rank, config.kv_lora_rank + rope, heads * (nope + rope)]
        dims += [heads * value, heads * (nope + value)]
    else:
        shared = config.num_key_value_heads
        dims = [heads, shared, config.head_dim, heads * config.head_dim, shared * config.head_dim]
    dims += [config.hidden_size, config.intermediate_size, config.vocab_size]
    for name in ("n_routed_experts", "num_local_experts", "num_experts", "moe_intermediate_size"):
        dims += [value for value in [CURATED[model_type].get(name)] if value is not None]
    assert len(set(dims)) == len(dims), sorted(dims)


def test_layers_sets_the_count_and_repeats_the_kinds_of_layer() -> None:
    assert tiny_config("llama", layers=3).num_hidden_layers == 3
    assert tiny_config("deepseek_v32", layers=2).mlp_layer_types == ["dense", "sparse"]
    sliding, full = "sliding_attention", "full_attention"
    assert tiny_config("gpt_oss", layers=3).layer_types == [sliding, full, sliding]
    gemma = tiny_config("gemma3_text", layers=5)
    assert gemma.layer_types == [sliding] * 4 + [full]
    assert tiny_config("gemma3_text").layer_types == [sliding, full]


def test_implementations_and_overrides_reach_the_configuration() -> None:
    config = tiny_config("mixtral", attn="eager", experts="grouped_mm", hidden_size=80)
    assert config._attn_implementation == "eager"
    assert config._experts_implementation == "grouped_mm"
    assert config.hidden_size == 80
    nested = tiny_config("gemma3", text_config={"hidden_size": 64}).text_config
    assert (nested.hidden_size, nested.vocab_size) == (64, 251)


def test_sdpa_is_used_where_the_architecture_has_it() -> None:
    assert tiny_model("llama").config._attn_implementation == "sdpa"


def test_special_tokens_fall_inside_the_tiny_vocabulary() -> None:
    config = tiny_config("gemma3")
    special = [config.image_token_id, config.boi_token_index, config.eoi_token_index]
    assert len(set(special)) == 3
    assert all(0 <= token < config.text_config.vocab_size for token in special)


def test_the_tables_name_only_types_that_exist() -> None:
    types = {name for family in FAMILIES.values() for name in family.types()}
    assert set(CURATED) | set(OVERRIDES) <= types


# ---- models --------------------------------------------------------------------------------------


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(7)
    first = tiny_model("llama", seed=3).state_dict()
    drawn = torch.rand(())
    torch.manual_seed(8)
    second = tiny_model("llama", seed=3).state_dict()
    other = tiny_model("llama", seed=4).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items())
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(())), "building a model must not draw from the generator"


@pytest.mark.parametrize(
    ("model_type", "ending"),
    [("deepseek_v3", "e_score_correction_bias"), ("gpt_oss", "sinks"), ("gpt_oss", "q_proj.bias")],
)
def test_biases_are_not_left_at_zero(model_type: str, ending: str) -> None:
    model = tiny_model(model_type)
    tensors = [value for name, value in model.state_dict().items() if name.endswith(ending)]
    assert tensors
    assert all(value.abs().min() > 0 for value in tensors)


def test_greedy_tokens_vary() -> None:
    for model_type in CACHED:
        case = language_model_case(tiny_model(model_type))
        assert run(case)[0].argmax(-1).unique().numel() >= 8


def test_dtype_eval_and_gradients() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    cache = static_cache(model, 2, 16)
    assert {tensor.dtype for tensor in cache_tensors(cache).values()} == {torch.bfloat16}


# ---- caches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CACHED + SAMPLED)
def test_an_early_cache_equals_a_lazy_one(model_type: str) -> None:
    case = language_model_case(tiny_model(model_type), decode_steps=3)
    early = cache_of(case)
    lazy = StaticCache(config=case.model.config, max_cache_len=32)
    assert lengths(early) == lengths(lazy)
    addresses = {name: tensor.data_ptr() for name, tensor in cache_tensors(early).items()}
    assert all(not tensor.any() for tensor in cache_tensors(early).values())

    for actual, expected in zip(run(case), run(with_cache(case, lazy)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    states, lazy_states = cache_tensors(early), cache_tensors(lazy)
    assert list(states) == list(lazy_states)
    for name, state in states.items():
        torch.testing.assert_close(state, lazy_states[name], rtol=0, atol=0)
        assert state.data_ptr() == addresses[name], f"{name} was allocated again"
    assert lengths(early) == lengths(lazy)


def test_the_cache_has_what_each_architecture_keeps() -> None:
    sparse = cache_tensors(static_cache(tiny_model("deepseek_v32"), 3, 20))
    assert len(sparse) == 7 * 3
    assert sparse["layers.6.keys"].shape == (3, 1, 20, 32)
    assert sparse["layers.6.values"].shape == (3, 1, 20, 8)
    assert sparse["layers.6.indexer_keys"].shape == (3, 20, 20)
    sliding = cache_tensors(static_cache(tiny_model("gpt_oss"), 3, 20))
    assert sliding["layers.0.keys"].shape == (3, 4, 10, 12)
    assert sliding["layers.1.keys"].shape == (3, 4, 20, 12)
    recurrent = cache_tensors(static_cache(tiny_model("mamba2"), 3, 20))
    assert sorted(recurrent) == [
        f"layers.{layer}.{kind}_states.0" for layer in (0, 1) for kind in ("conv", "recurrent")
    ]


def test_a_captured_graph_mutates_the_cache_instead_of_returning_it() -> None:
    case = language_model_case(tiny_model(tiny_config("deepseek_v32", layers=1)))
    inputs: list[set[int]] = []

    def backend(
        module: torch.fx.GraphModule, arguments: list[torch.Tensor]
    ) -> Callable[..., object]:
        inputs.append({argument.data_ptr() for argument in arguments})
        return module.forward

    states = cache_tensors(cache_of(case))
    forget_compiled()
    compiled = torch.compile(case.model, backend=backend, fullgraph=True, dynamic=False)
    run(Case(compiled, case.phases, case.has_logits))
    assert len(inputs) == 2
    assert {tensor.data_ptr() for tensor in states.values()} <= inputs[0] & inputs[1]
    assert all(
        state is now
        for state, now in zip(states.values(), cache_tensors(cache_of(case)).values(), strict=True)
    )


# ---- cases ---------------------------------------------------------------------------------------


def test_phases_share_one_cache_and_take_text_tokens() -> None:
    model = tiny_model(tiny_config("llama", bos_token_id=1, eos_token_id=2, pad_token_id=0))
    case = language_model_case(model, tokens=20, batch=4, decode_steps=2)
    assert list(case.phases) == ["prefill", "decode", "decode_2"]
    assert len({id(keywords["past_key_values"]) for _, keywords in case.phases.values()}) == 1
    shapes = [args[0].shape for args, _ in case.phases.values()]
    assert shapes == [(4, 20), (4, 1), (4, 1)]
    assert all(args[0].min() > 2 and args[0].max() < 251 for args, _ in case.phases.values())
    assert case.has_logits


def test_fresh_copies_the_state_once_and_keeps_the_model() -> None:
    case = language_model_case(tiny_model("llama"))
    again = case.fresh()
    assert again.model is case.model
    assert cache_of(again) is not cache_of(case)
    assert again.phases["prefill"][1]["past_key_values"] is cache_of(again)
    assert again.phases["decode"][1]["past_key_values"] is cache_of(again)
    for actual, expected in zip(run(case), run(again), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_case_longer_than_its_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"32 \+ 1 tokens do not fit in a cache of 32"):
        language_model_case(tiny_model("llama"), tokens=32)


# ---- MODEL arguments -----------------------------------------------------------------------------


def test_load_case_builds_a_type_with_its_options() -> None:
    case = load_case(
        "hf:qwen3_moe", tokens=40, batch=3, dtype=torch.bfloat16, attn="eager", layers=1
    )
    config = case.model.config
    assert (config._attn_implementation, config.num_hidden_layers) == ("eager", 1)
    assert case.phases["prefill"][0][0].shape == (3, 40)
    assert cache_of(case).layers[0].keys.shape[2] == 48
    assert case.model.dtype == torch.bfloat16


def test_load_case_reads_overrides_and_full_configurations(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 80}), encoding="utf-8")
    assert load_case(f"hf:llama:{path}").model.config.hidden_size == 80

    full = tiny_config("gpt_oss", layers=4).to_dict()
    path.write_text(json.dumps({**full, "vocab_size": 77}), encoding="utf-8")
    config = load_case(f"hf:gpt_oss:{path}", layers=3).model.config
    assert (config.vocab_size, config.num_hidden_layers, len(config.layer_types)) == (77, 3, 3)


SOURCE = """
import dataclasses
import torch
from rolemesh.compiler.models.cases import Case

@dataclasses.dataclass
class Sizes:
    width: int = 4

def build_case(tokens):
    model = torch.nn.Linear(Sizes().width, 3)
    return Case(model, {"forward": ((torch.zeros(tokens, 4),), {})})

def build_number():
    return 3
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_load_case_calls_a_function_with_the_options_it_takes(source: Path) -> None:
    case = load_case(f"{source}:build_case", tokens=5)
    (tokens,), _ = case.phases["forward"]
    assert case.model(tokens).shape == (5, 3)
    assert not case.has_logits


# ---- errors --------------------------------------------------------------------------------------


def message(call: Callable[[], object], code: str = "RM019") -> list[str]:
    with pytest.raises(RolemeshError) as caught:
        call()
    assert caught.value.code == code
    return [line.strip() for line in str(caught.value).splitlines()]


def test_unknown_type() -> None:
    listing = (
        f"rolemesh.compiler.models.families.FAMILIES[''].types() lists all {len(CAUSAL_LM.types())}"
    )
    assert message(lambda: load_case("hf:deepseek_v23")) == [
        "[RM019] unknown causal-LM type 'deepseek_v23'",
        "where: model type 'deepseek_v23'",
        "why: transformers has no such type",
        "fix: did you mean 'deepseek_v3' or 'deepseek_v2' or 'deepseek_v32'? " + listing,
    ]
    assert message(lambda: tiny_config("vit"))[2] == (
        "why: transformers has this type, but no causal-LM model of it"
    )


def test_unknown_family() -> None:
    assert message(lambda: load_case("hf:encoders/bert")) == [
        "[RM019] there are no models of kind 'encoders'",
        "where: MODEL hf:encoders/bert",
        f"why: {FORMS}",
        "fix: did you mean 'encoder'? write for example hf:encoder/bert",
    ]
    assert message(lambda: load_case("hf:encoder/bart2"))[0] == (
        "[RM019] unknown encoder type 'bart2'"
    )


def test_unknown_field() -> None:
    assert message(lambda: tiny_config("llama", hiden_size=64)) == [
        "[RM019] unknown configuration field 'hiden_size'",
        "where: model type 'llama'",
        "why: LlamaConfig does not have it, so it would change nothing",
        "fix: did you mean 'hidden_size'? if not, remove the field",
    ]
    assert message(lambda: tiny_config("llama", zzzz=1))[3] == "fix: remove the field"


def test_rejected_configuration() -> None:
    lines = message(lambda: tiny_config("gemma2", hidden_size=65))
    assert lines[:2] == [
        "[RM019] transformers rejects this configuration",
        "where: model type 'gemma2'",
    ]
    assert lines[2].startswith("why: StrictDataclassClassValidationError: ")
    assert lines[-1] == "fix: correct the configuration fields or the number of layers"


@pytest.mark.parametrize(
    ("spec", "fix"),
    [
        ("llama", "fix: write hf:llama"),
        ("lama", "fix: did you mean 'llama' or 'mllama' or 'llama4'? for example hf:llama"),
        ("model.py", "fix: name the function that returns the Case: model.py:FUNCTION"),
        ("model.py:", "fix: name the function that returns the Case: model.py:FUNCTION"),
    ],
)
def test_unreadable_argument(spec: str, fix: str) -> None:
    assert message(lambda: load_case(spec)) == [
        f"[RM019] cannot read the MODEL argument {spec!r}",
        f"why: {FORMS}",
        fix,
    ]


def test_missing_files(source: Path) -> None:
    wrong = source.with_name("model.py")
    assert message(lambda: load_case(f"{wrong}:build_case")) == [
        f"[RM019] there is no file {str(wrong)!r}",
        f"where: MODEL {wrong}:build_case",
        f"why: {FORMS}",
        "fix: did you mean 'models.py'? give the path of a file that exists",
    ]
    assert message(lambda: load_case("hf:llama:nowhere/config.json"))[0] == (
        "[RM019] there is no file 'nowhere/config.json'"
    )


def test_missing_function(source: Path) -> None:
    assert message(lambda: load_case(f"{source}:bild_case")) == [
        f"[RM019] {source} has no function 'bild_case'",
        f"where: MODEL {source}:bild_case",
        "why: its functions are build_case, build_number",
        "fix: did you mean 'build_case'? name a function that returns a Case",
    ]


def test_function_that_returns_another_type(source: Path) -> None:
    assert message(lambda: load_case(f"{source}:build_number")) == [
        "[RM019] build_number() returned int, not a Case",
        f"where: MODEL {source}:build_number",
        "why: a case is a model and the calls of its phases",
        "fix: return rolemesh.compiler.models.cases.Case(model, phases)",
    ]


def test_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{hidden", encoding="utf-8")
    spec = f"hf:llama:{path}"
    lines = message(lambda: load_case(spec))
    assert lines[:2] == [f"[RM019] {path} is not valid JSON", f"where: MODEL {spec}"]
    assert lines[2].startswith("why: Expecting property name enclosed in double quotes: line 1")
    assert lines[3] == "fix: correct the file"
    path.write_text("[1]", encoding="utf-8")
    assert message(lambda: load_case(spec)) == [
        f"[RM019] {path} holds a JSON list, not an object",
        f"where: MODEL {spec}",
        "why: a configuration is an object of field names and values",
        'fix: write for example {"hidden_size": 64}',
    ]
    path.write_text('{"model_type": "qwen3"}', encoding="utf-8")
    assert message(lambda: load_case(spec)) == [
        f"[RM019] {path} is a configuration of type 'qwen3', not 'llama'",
        f"where: MODEL {spec}",
        f"fix: write hf:qwen3:{path}",
    ]


def test_missing_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines = message(lambda: load_case("hf:llama"))
    assert lines[:2] == [
        "[RM019] this model needs the transformers library, which cannot be imported",
        "where: model type 'llama'",
    ]
    assert lines[-1] == "fix: pip install rolemesh[transformers]"


class Forgetful(torch.nn.Module):
    """A model that takes a cache and does not use it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = tiny_config("llama")
        self.embedding = torch.nn.Embedding(251, 4)

    def forward(
        self, tokens: torch.Tensor, past_key_values: StaticCache, use_cache: bool
    ) -> torch.Tensor:
        return self.embedding(tokens)


def test_models_without_a_static_cache() -> None:
    fix = "write a function that returns a Case and pass it as FILE.py:FUNCTION"
    lines = message(lambda: load_case("hf:openai-gpt"), "RM007")
    assert lines[:2] == [
        "[RM007] OpenAIGPTLMHeadModel.forward takes no cache",
        "where: static_cache",
    ]
    assert lines[2].startswith("why: its arguments are input_ids, ")
    assert lines[3].endswith(fix)

    lines = message(lambda: load_case("hf:minimax"), "RM007")
    assert lines[0] == "[RM007] MiniMaxForCausalLM does not run with a static cache"
    assert lines[2].startswith("why: ValueError: MiniMax uses cache of its own")
    assert lines[3] == f"fix: {fix}"

    assert message(lambda: static_cache(Forgetful(), 1, 8), "RM007") == [
        "[RM007] Forgetful writes nothing to the cache it is given",
        "where: static_cache",
        "why: decoding needs the keys and values of the tokens before",
        "fix: use a decoder model, or set is_decoder in its configuration",
    ]


def test_model_whose_own_ops_fail_is_reported_as_such() -> None:
    model = tiny_model(tiny_config("deepseek_v32", layers=2), dtype=torch.bfloat16)
    lines = message(lambda: static_cache(model, 1, 8), "RM019")
    assert lines[0] == "[RM019] DeepseekV32ForCausalLM itself fails on one token"
    assert any("multiple of 16 bytes" in line for line in lines)
    assert any("--experts batched_mm" in line for line in lines)
