"""Images for vision-language models of `transformers`, and their towers run ahead of the model.

`image_inputs` draws what a processor would give: pixels in the form that the model's own signature
asks for. `encode_images` is for towers that PyTorch cannot capture, because sizes come out of
tensors in them: it runs the tower as it is, and gives the arguments with which the rest of the
model is called, and compiled.

Invariant: a model is asked by its signature and its configuration, never by its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "TYPE_ARGUMENTS",
    "encode_images",
    "has_data_dependent_tower",
    "image_inputs",
    "image_token_count",
]

_GRID = "image_grid_thw"
_MASK = "pixel_attention_mask"
TYPE_ARGUMENTS = ("token_type_ids", "mm_token_type_ids")
"""Arguments that say of each token what it is: 0 for text, 1 for an image."""


def has_data_dependent_tower(model: torch.nn.Module) -> bool:
    """Whether a model's tower cannot be captured as one graph of fixed sizes.

    That is so where images of all sizes come packed as rows of patches, with a tensor of their
    sizes.
    """
    return _GRID in _image_arguments(model)


def image_inputs(
    model: torch.nn.Module, batch: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The keyword arguments of one random image for each of `batch` sequences.

    Args:
        model: The model; its `vision_config` has the sizes.
        batch: Number of images.
        generator: Draws the pixels.

    Returns:
        `pixel_values`, `[batch, channels, height, width]`; with a dim of one image a sequence after
        the first where a model takes several; for towers with a grid `[batch * patches, values]`
        and the grid `[batch, 3]`, in patches.
    """
    config: PreTrainedConfig = model.config
    vision: PreTrainedConfig = config.vision_config
    weight = next(model.parameters())
    channels = getattr(vision, "num_channels", None) or vision.in_channels
    if _GRID in _image_arguments(model):
        side = 2 * vision.spatial_merge_size
        values = channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(batch * side * side, values, generator=generator)
        grid = torch.tensor([[1, side, side]] * batch, device=weight.device)
        return {"pixel_values": pixels.to(weight), _GRID: grid}
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    several = (1,) if _MASK in _image_arguments(model) else ()
    pixels = torch.randn(batch, *several, channels, height, width, generator=generator)
    return {"pixel_values": pixels.to(weight)}


def image_token_count(model: PreTrainedModel, images: Mapping[str, torch.Tensor]) -> int:
    """How many tokens stand for all of `images` in the ids: the tower is run to see."""
    with torch.no_grad():
        found = model.get_image_features(**images)
    features = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    parts = features if isinstance(features, list | tuple) else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)


def encode_images(model: PreTrainedModel, inputs: Mapping[str, object]) -> dict[str, object]:
    """Run a model's tower, and give the arguments for the rest of the model.

    Args:
        model: A `transformers` vision-language model whose `forward` takes `mm_encoder_outputs`.
        inputs: Keyword arguments as a processor makes them, such as `input_ids`, `pixel_values` and
            `image_grid_thw`.

    Returns:
        The same without the images. What the tower made of them is in `mm_encoder_outputs`; and
        where positions depend on the sizes of images, they are in `position_ids`, of the shape that
        the model's own `get_rope_index` gives. Each later call needs its `position_ids` too.
    """
    taken = _image_arguments(model)
    given = {name: value for name, value in inputs.items() if name in taken}
    rest = {name: value for name, value in inputs.items() if name not in taken}
    with torch.no_grad():
        rest["mm_encoder_outputs"] = {"image": model.get_image_features(**given)}
        rope_index = getattr(model.base_model, "get_rope_index", None)
        if rope_index is not None and rest.get("position_ids") is None:
            known = inspect.signature(rope_index).parameters
            positions, _ = rope_index(**{k: v for k, v in inputs.items() if k in known})
            rest["position_ids"] = positions
            # They said which tokens are images, and have served.
            for name in TYPE_ARGUMENTS:
                rest.pop(name, None)
    return rest


def _image_arguments(model: torch.nn.Module) -> list[str]:
    """The arguments of the tower by name: the pixels, and what describes them."""
    function = getattr(model, "get_image_features", None)
    if function is None:
        return []
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
