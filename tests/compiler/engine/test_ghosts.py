"""A model without storage is the model, but for its bytes."""

from __future__ import annotations

import pytest
import torch
from tests.compiler.engine.serving import model_of

from rolemesh.compiler.engine.ghosts import build_model
from rolemesh.compiler.models.tiny_models import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ["gemma3_text", "gpt_oss", "mamba2", "deepseek_v32"])
def test_parameters_have_no_bytes_and_buffers_their_values(model_type: str) -> None:
    model = model_of(model_type)
    found = build_model(tiny_config(model_type), torch.float32, CPU, ghosts=True)
    expected = dict(model.named_parameters())
    parameters = dict(found.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.shape == expected[name].shape
        assert parameter.dtype == torch.float32
        assert parameter.device == CPU
        assert parameter.untyped_storage().nbytes() == 0
        with pytest.raises(RuntimeError):
            parameter.data.zero_()
    buffers = dict(found.named_buffers(remove_duplicate=False))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if not name.endswith("_bias"):  # loaded, not computed; tiny models have random ones
            assert torch.equal(buffers[name], buffer)


def test_tied_parameters_stay_one() -> None:
    config = tiny_config("llama", tie_word_embeddings=True, dtype="bfloat16")
    found = build_model(config, None, CPU, ghosts=True)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.lm_head.weight.dtype == torch.bfloat16  # the configuration's own


def test_without_ghosts_parameters_have_memory() -> None:
    found = build_model(tiny_config("llama"), torch.bfloat16, CPU, ghosts=False)
    for parameter in found.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 2
        assert not parameter.requires_grad
