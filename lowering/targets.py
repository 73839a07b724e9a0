"""The table of lowering targets: what turns one rank's bound graph into a callable."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import fx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.eager import lower_eager
from rolemesh.lowering.inductor import lower_inductor

__all__ = ["TARGETS", "Lower", "Runnable", "target"]

Runnable = Callable[..., tuple[torch.Tensor | None, ...]]
"""Takes the local tensor of every input and returns the local tensor of every output."""

Lower = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Runnable]
"""Takes a bound graph and example inputs, fake or real."""

TARGETS: Mapping[str, Lower] = MappingProxyType(
    {
        "eager": lower_eager,
        "inductor": lower_inductor,
    }
)
"""Targets by name."""


def target(name: str) -> Lower:
    """The target called `name`.

    Raises:
        RolemeshError: RM003 if there is none.
    """
    found = TARGETS.get(name)
    if found is None:
        close = difflib.get_close_matches(name, TARGETS, n=1)
        raise RolemeshError(
            "RM003",
            what=f"unknown target {name!r}",
            where="option target",
            why=f"the targets are {', '.join(TARGETS)}",
            fix=f"did you mean {close[0]!r}?" if close else "use one of these targets",
        )
    return found
