"""Vision-language models: pixels in the captured call, or the tower ahead of it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import rolemesh
from rolemesh.compiler.command.check import check
from rolemesh.compiler.command.check_options import CheckOptions
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.models.cases import load_case
from rolemesh.compiler.models.families import VISION
from rolemesh.compiler.models.images import encode_images, image_inputs
from rolemesh.compiler.models.tiny_models import tiny_model


@pytest.mark.parametrize("model", ["llava", "glm4v"])
def test_an_image_and_text_equal_the_single_device(model: str) -> None:
    report = check(CheckOptions(f"hf:vision/{model}", "pd_mixed", Mesh({"tp": 3})))
    assert report.ok, report.all_problems
    assert [phase.phase for phase in report.phases] == ["prefill", "decode"]


def test_pixels_and_text_are_split_in_one_program() -> None:
    case = load_case("hf:vision/llava", batch=4)
    args, kwargs = case.phases["prefill"]
    traced = rolemesh.trace(case.model, *args, **kwargs)
    program = traced.program
    names = {entry.name for entry in program.inputs}
    assert {"input_ids", "pixel_values"} <= names
    assert any("convolution" in str(node.target) for node in program.ops)
    flops = [
        rolemesh.shard(traced, {"tp": ranks}, "prefill").cost_analysis().flops for ranks in (1, 4)
    ]
    assert flops[1] < 0.35 * flops[0]


def test_images_of_padding_are_dropped_in_one_program() -> None:
    """The number of images depends on data, and so do the sizes of what the model returns."""
    model = tiny_model("smolvlm", family=VISION)
    side, each = model.config.vision_config.image_size, model.model.image_seq_len

    def example(*counts: int) -> dict[str, torch.Tensor]:
        pixels = torch.zeros(2, 3, 3, side, side)
        ids = torch.arange(2 * (2 * each + 3)).view(2, -1) % 100
        for number, count in enumerate(counts):
            pixels[number, 3 - count :] = torch.rand(count, 3, side, side)
            ids[number, 2 : 2 + count * each] = model.config.image_token_id
        return {"input_ids": ids, "pixel_values": pixels}

    with torch.no_grad():
        sharded = rolemesh.shard(
            rolemesh.trace(model, **example(1, 2), use_cache=False), {"tp": 2}, "prefill"
        )
        for counts in ((1, 2), (2, 1), (0, 1)):
            inputs = example(*counts)
            want = model(**inputs, use_cache=False)
            found = rolemesh.lockstep(sharded, **inputs, use_cache=False)
            torch.testing.assert_close(found.logits, want.logits, atol=1e-4, rtol=1e-4)
            pieces = want.image_hidden_states.pooler_output
            assert [len(piece) for piece in pieces] == [count * each for count in counts]
            torch.testing.assert_close(
                found.image_hidden_states.pooler_output, pieces, atol=1e-4, rtol=1e-4
            )


def test_encoded_images_give_what_pixels_give() -> None:
    """A tower that cannot be captured, run ahead: the model's own result does not change."""
    model = tiny_model("qwen2_5_vl", family=VISION)
    images = image_inputs(model, 2, torch.Generator().manual_seed(0))
    marks = torch.full((2, 4), model.config.image_token_id)
    ids = torch.cat([torch.tensor([[7, 8, 9], [4, 5, 6]]), marks, torch.tensor([[3], [2]])], dim=1)
    types = (ids == model.config.image_token_id).long()
    inputs = {"input_ids": ids, "mm_token_type_ids": types, **images}
    encoded = encode_images(model, inputs)
    assert sorted(encoded) == ["input_ids", "mm_encoder_outputs", "position_ids"]
    want = model(**inputs).logits
    assert torch.equal(model(**encoded).logits, want)
    inputs["pixel_values"] = inputs["pixel_values"] + 1
    assert not torch.allclose(model(**encode_images(model, inputs)).logits, want)
