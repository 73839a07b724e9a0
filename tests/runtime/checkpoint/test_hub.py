"""Checkpoints that `transformers` saves fill its models, whatever their form on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.models.tiny_models import tiny_config, tiny_model
from rolemesh.runtime.checkpoint.files import open_checkpoint
from rolemesh.runtime.checkpoint.hub import HubNaming
from rolemesh.runtime.checkpoint.load import fill_from_checkpoint


def build(name: str, seed: int = 0) -> PreTrainedModel:
    kind, _, tied = name.partition(" ")
    overrides = {"tie_word_embeddings": True} if tied else {}
    model = tiny_model(tiny_config(kind, layers=2, **overrides), seed=seed)
    assert isinstance(model, PreTrainedModel)
    return model


def fill(folder: Path, model: PreTrainedModel) -> None:
    tensors = model.state_dict(keep_vars=True)
    fill_from_checkpoint(folder, tensors, naming=HubNaming(model), progress=False)


def saved_by(model: PreTrainedModel, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file that a model is saved to, and what it holds."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    return file, load_file(file)


def refused(folder: Path, model: PreTrainedModel) -> str:
    with pytest.raises(RolemeshError) as caught:
        fill(folder, model)
    assert caught.value.code == "RM033"
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["llama", "llama tied", "gpt_oss", "qwen3_moe", "deepseek_v32", "mixtral", "phi3", "hrm_text"],
)
def test_saved_model_is_loaded(tmp_path: Path, name: str) -> None:
    saved, model = build(name), build(name, seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (
        "tied" in name
    )
    fill(tmp_path, model)
    expected = saved.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_experts_are_converted_one_by_one(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    converted = HubNaming(model).converted(checkpoint.entries, model.state_dict().keys())
    rows = {name: c.rows for c in converted.conversions for name in c.results if c.rows}
    experts = model.config.num_experts
    assert rows.keys() == {
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in range(2)
        for part in ("gate_up_proj", "down_proj")
    }
    third = rows["model.layers.1.mlp.experts.gate_up_proj"][3]
    assert [source.name for source in third] == [
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
    ]
    assert {len(sources) for sources in rows.values()} == {experts}


def test_a_missing_expert_is_named_as_the_hub_names_it(tmp_path: Path) -> None:
    model = build("mixtral")
    file, tensors = saved_by(model, tmp_path)
    lost = [f"model.layers.1.block_sparse_moe.experts.2.w{part}.weight" for part in (1, 2)]
    for name in lost:
        del tensors[name]
    save_file(tensors, file)
    text = refused(tmp_path, model)
    assert "tensors 2 missing" in text
    for name in lost:
        assert f"missing: {name}\n" in text
    assert text.count("missing: ") == 2


def test_a_misshapen_expert_is_named(tmp_path: Path) -> None:
    model = build("mixtral")
    file, tensors = saved_by(model, tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    rows, columns = tensors[name].shape
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
    text = refused(tmp_path, model)
    assert "tensors 1 of another shape" in text
    assert f"{name} is [{rows - 1}, {columns}], the model has [{rows}, {columns}]" in text


def test_an_expert_too_many_is_named(tmp_path: Path) -> None:
    model = build("mixtral")
    file, tensors = saved_by(model, tmp_path)
    form = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    more = form.format(model.config.num_local_experts)
    save_file({**tensors, more: tensors[form.format(0)].clone()}, file)
    text = refused(tmp_path, model)
    assert "does not fit the model: tensors 1 extra\n" in text
    assert f"extra: {more}" in text


def test_a_packed_tensor_of_another_shape(tmp_path: Path) -> None:
    """Its parts are tensors of the model; the message names what is in the checkpoint."""
    model = build("hrm_text")
    file, tensors = saved_by(model, tmp_path)
    name = "model.L_module.layers.0.attn.gqkv_proj.weight"
    rows, columns = tensors[name].shape
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file)
    text = refused(tmp_path, model)
    assert "does not fit the model: tensors 1 of another shape\n" in text
    assert f"{name} is [{rows}, {columns - 1}], the model has [{rows}, {columns}]" in text


def test_parts_that_are_cut_otherwise(tmp_path: Path) -> None:
    """A packed tensor of the right size whose equal parts are not the model's."""
    model = build("hrm_text")
    model.save_pretrained(tmp_path)
    attention = model.model.L_module.layers[0].self_attn
    rows, columns = attention.q_proj.weight.shape
    for module, more in ((attention.q_proj, 2), (attention.k_proj, -2)):
        module.weight = torch.nn.Parameter(torch.zeros(rows + more, columns))
    text = refused(tmp_path, model)
    part = "model.L_module.layers.0.self_attn.q_proj.weight"
    packed = "model.L_module.layers.0.attn.gqkv_proj.weight"
    assert "tensors 2 of another shape" in text
    found = f"[{rows}, {columns}], the model has [{rows + 2}, {columns}]"
    assert f"shape: {part}, made from {packed}, is {found}" in text


def test_checkpoint_of_the_model_without_its_head(tmp_path: Path) -> None:
    untied, tied = build("llama"), build("llama tied", seed=1)
    untied.model.save_pretrained(tmp_path)
    assert "missing: lm_head.weight\n" in refused(tmp_path, untied)
    fill(tmp_path, tied)
    assert torch.equal(tied.lm_head.weight, untied.model.embed_tokens.weight)


def test_a_tensor_that_two_names_give_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    file, tensors = saved_by(model, tmp_path)
    save_file({**tensors, "norm.weight": tensors["model.norm.weight"].clone()}, file)
    text = refused(tmp_path, model)
    assert "several tensors are this one: model.norm.weight, norm.weight" in text


def test_what_the_model_ignores_may_be_extra(tmp_path: Path) -> None:
    model = build("llama")
    file, tensors = saved_by(model, tmp_path)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**tensors, **old}, file)
    fill(tmp_path, build("llama", seed=1))
    save_file({**tensors, "model.layers.7.self_attn.q_proj.weight": torch.zeros(4)}, file)
    text = refused(tmp_path, model)
    assert "tensors 1 extra" in text
    assert "extra: model.layers.7.self_attn.q_proj.weight" in text
