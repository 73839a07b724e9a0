"""Which inputs hold tokens or images is read off the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rolemesh
from rolemesh.passes.canonicalise import Canonicalise
from rolemesh.passes.tokens import sample_inputs, token_inputs


class Parts(nn.Module):
    """What the functions below use."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.norm = nn.LayerNorm(12)
        self.linear = nn.Linear(12, 12)
        self.patches = nn.Conv2d(3, 12, 4, 4)


def ids(parts: Parts, x: Tensor, mask: Tensor) -> Tensor:
    return parts.linear(parts.table(x)) * mask[..., None]


def hidden_states(parts: Parts, x: Tensor, cosine: Tensor) -> Tensor:
    queries = (parts.linear(parts.norm(x)) * cosine)[:, None]
    return x + nn.functional.scaled_dot_product_attention(queries, queries, queries)[:, 0]


def images(parts: Parts, x: Tensor, scale: Tensor) -> Tensor:
    return parts.linear(parts.patches(x / 255).flatten(2).transpose(1, 2)) * scale


def image_of_a_prompt(parts: Parts, ids: Tensor, pixels: Tensor, features: Tensor) -> Tensor:
    """Pixels through the tower; features that are there already go where ids say."""
    text = parts.table(ids)
    text = text.masked_scatter((ids == 3)[..., None], features)
    return parts.linear(text) + parts.patches(pixels).mean((2, 3))[:, None]


def whole(parts: Parts, mask: Tensor, other: Tensor) -> Tensor:
    return mask + other


X = torch.zeros(2, 5, 12)
IDS = torch.zeros(2, 5, dtype=torch.long)
PIXELS = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("function", "inputs", "tokens", "samples"),
    [
        (ids, (IDS, torch.ones(2, 5)), {"x"}, set()),
        (hidden_states, (X, X + 1), {"x"}, set()),
        (images, (PIXELS, torch.ones(1, 1, 12)), set(), {"x"}),
        (image_of_a_prompt, (IDS, PIXELS, torch.zeros(10, 12)), {"ids"}, {"pixels"}),
        (whole, (torch.ones(2, 5), torch.ones(2, 5)), set(), set()),
    ],
)
def test_inputs(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tokens: set[str], samples: set[str]
) -> None:
    parts = Parts().requires_grad_(False)
    traced = rolemesh.trace(lambda *args: function(parts, *args), *inputs)
    program = Canonicalise().apply(traced.program)
    names = dict(zip(program.placeholders, (e.name for e in program.inputs), strict=True))
    order = list(function.__code__.co_varnames[1 : 1 + len(inputs)])
    users = [e.name for e in program.inputs if not e.is_state]
    assert len(users) == len(order)
    renamed = {name: order[int(name.split("[")[1].rstrip("]"))] for name in users}
    assert {renamed[names[node]] for node in token_inputs(program)} == tokens
    assert {renamed[names[node]] for node in sample_inputs(program)} == samples
