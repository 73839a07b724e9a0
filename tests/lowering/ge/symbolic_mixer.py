"""A small program with two symbolic sizes: a batch of sequences whose tokens meet each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rolemesh.compiler.api import Sharded, shard
from rolemesh.compiler.capture.tracing import trace
from rolemesh.compiler.ir.spec import P

__all__ = ["ANNOTATIONS", "Mixer", "mixer", "mixer_input", "sharded_mixer"]

ANNOTATIONS = {"x": P(None, "tp"), "up.weight": P("tp")}
"""Every rank gets a part of the tokens."""


class Mixer(nn.Module):
    """Tokens attend to each other; their number is a value of the result, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, 6]` to `[B, T, 6]` and `[T]`."""
        mixed = torch.softmax(x @ x.mT, -1) @ x
        count = x.shape[1]
        return self.down(torch.relu(self.up(mixed))), torch.arange(count) + count


def mixer() -> Mixer:
    """The model, with the same weights in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixer().requires_grad_(False)


def mixer_input(batch: int, tokens: int, *, dynamic: bool = False) -> Tensor:
    """Its input; `dynamic` makes both sizes symbols of a trace."""
    x = torch.randn(batch, tokens, 6, generator=torch.Generator().manual_seed(tokens))
    if dynamic:
        torch._dynamo.mark_dynamic(x, [0, 1])
    return x


def sharded_mixer(
    ranks: int, batch: int = 2, tokens: int = 13, *, split: bool = True
) -> tuple[Sharded, Mixer]:
    """The model for any batch and number of tokens, traced at these.

    Args:
        ranks: Number of ranks.
        batch: Sequences in the traced example.
        tokens: Tokens in the traced example.
        split: Whether ranks get a part of the tokens each; else every rank gets all.
    """
    model = mixer()
    annotations = ANNOTATIONS if split else {"up.weight": P("tp")}
    traced = trace(model, mixer_input(batch, tokens, dynamic=True))
    return shard(traced, {"tp": ranks}, annotations=annotations), model
