"""A small model with a cache, called with plain values and nested arguments; a nested result."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rolemesh
from rolemesh.compiler.api import Lowered
from rolemesh.compiler.ir.spec import P

ANNOTATIONS = {"up.weight": P("tp"), "down.weight": P(None, "tp"), "state.cache": P(None, "tp")}


class State:
    """An object with a tensor, as caches are."""

    def __init__(self) -> None:
        self.cache = torch.zeros(9, 14)
        self.scale = 2.0


class Scaled(nn.Module):
    """Multiplies by a number of its own."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Model(nn.Module):
    """Two linear layers, one of which writes what it sees to a cache."""

    def __init__(self, width: int = 6, factor: float = 0.5) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up = nn.Linear(width, 14, bias=False)
            self.down = nn.Linear(14, width, bias=False)
        self.scaled = Scaled(factor)
        self.requires_grad_(False)

    def forward(
        self, x: Tensor, state: State, at: Mapping[str, Tensor], flag: bool = True, **more: Tensor
    ) -> dict[str, object]:
        inner = torch.nn.functional.silu(self.up(x))
        state.cache.index_copy_(0, at["rows"], inner)
        y = self.scaled(x + self.down(inner + state.cache.sum(0) * state.scale))
        if flag:
            y = y + more["bias"]
        return {"y": y, "pair": (y.sum(0), None), "state": state, "flag": flag}


class Product(nn.Module):
    """A matrix product, which inductor needs no compiler for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(35.0).reshape(5, 7), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Call(NamedTuple):
    """The arguments of a call."""

    x: Tensor
    state: State
    at: dict[str, Tensor]
    bias: Tensor

    def of(self, function: object) -> dict[str, object]:
        """Call a model."""
        with torch.no_grad():
            return function(self.x, self.state, at=self.at, bias=self.bias)  # type: ignore[operator]


def call(tokens: int = 5) -> Call:
    """A call with the same numbers each time."""
    generator = torch.Generator().manual_seed(tokens)
    x, bias = (torch.randn(n, generator=generator) for n in ((tokens, 6), (6,)))
    return Call(x, State(), {"rows": torch.arange(tokens) + 1}, bias)


@functools.cache
def lowered(
    ranks: int = 2,
    symbolic: bool = False,
    target: str = "eager",
    phase: str | None = None,
    **options: object,
) -> Lowered:
    """The model's program, traced and sharded, for a target with options."""
    given = call()
    if symbolic:
        torch._dynamo.mark_dynamic(given.x, 0)
        torch._dynamo.mark_dynamic(given.at["rows"], 0)
    traced = given.of(functools.partial(rolemesh.trace, Model()))
    sharded = rolemesh.shard(traced, {"tp": ranks}, annotations=ANNOTATIONS, phase=phase)  # type: ignore[arg-type]
    return rolemesh.lower(sharded, target, options)


def saved(folder: Path, **options: object) -> Path:
    """An artefact of it."""
    path = folder / "artefact"
    rolemesh.save(lowered(**options), path)  # type: ignore[arg-type]
    return path


def assert_same(got: dict[str, object], want: dict[str, object]) -> None:
    """Two results are equal, and of the same form."""
    assert list(got) == list(want)
    torch.testing.assert_close(got["y"], want["y"])
    assert isinstance(got["pair"], tuple)
    torch.testing.assert_close(got["pair"][0], want["pair"][0])  # type: ignore[index]
    assert got["pair"][1] is None
    assert got["flag"] is want["flag"]
