"""Layers of module paths."""

from __future__ import annotations

import pytest

from rolemesh.compiler.debug.layers import folded, layer_of
from rolemesh.passes.seed import layer_of as layer_of_weight


@pytest.mark.parametrize(
    ("module", "layer", "alike"),
    [
        ("model.layers.3.self_attn", 3, "model.layers.*.self_attn"),
        ("h.12", 12, "h.*"),
        ("0.proj", 0, "*.proj"),
        ("model.layers.1.mlp.experts.7.up", 1, "model.layers.*.mlp.experts.*.up"),
        ("model.conv1d.norm2", None, "model.conv1d.norm2"),
        ("", None, ""),
    ],
)
def test_layers(module: str, layer: int | None, alike: str) -> None:
    assert layer_of(module) == layer == layer_of_weight(module)
    assert folded(module) == alike
