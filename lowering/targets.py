"""The table of lowering targets: what turns one rank's bound graph into a callable."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch
from torch import fx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.eager import lower_eager
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.ge.target import lower_ge
from rolemesh.lowering.inductor import InductorOptions, lower_inductor, reload_inductor
from rolemesh.lowering.npugraph.options import NpuGraphOptions
from rolemesh.lowering.npugraph.target import lower_npugraph
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example

__all__ = ["TARGETS", "Lower", "NoOptions", "Reload", "Runnable", "Target", "target"]

Runnable = Callable[..., tuple[torch.Tensor | None, ...]]
"""Takes the local tensor of every input, and the value of every symbol of its sizes; returns the
local tensor of every output.

An output that is the new value of an input may be that input itself, updated in place.
"""

Lower = Callable[[fx.GraphModule, Sequence[Example], Signature, object], Runnable]
"""Takes a bound graph, example inputs (fake or real), its signature and the target's options."""

Reload = Callable[[Mapping[str, object], Sequence[Example], Signature], Runnable | None]
"""Takes the `saved` of what another process lowered, example inputs and the signature; returns what
lowering the same graph would, from the target's own files; None if they are gone."""


@dataclass(frozen=True)
class NoOptions:
    """Options of a target that has none."""


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: What users call it.
        lower: Lowers a graph.
        options: A dataclass of its options, with defaults; it checks their values.
        pooled: Whether prefetched weights go into buffers that the runtime owns.
        routes: Whether rows move by their routes: whether it runs ops that read sizes of exchanges
            from data. Else all rows move.
        reload: Loads what another process lowered; None if the target keeps nothing. What `lower`
            returns then has an attribute `saved`: plain data for it, or None.
    """

    name: str
    lower: Lower
    options: type = NoOptions
    pooled: bool = False
    routes: bool = False
    reload: Reload | None = None

    def parse(self, given: Mapping[str, object] | None) -> object:
        """The options given by a user, checked.

        Raises:
            RolemeshError: RM018 for an option that the target does not have, or a bad value.
        """
        known = [field.name for field in fields(self.options)]
        for name in given or {}:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                raise RolemeshError(
                    "RM018",
                    what=f"target {self.name!r} has no option {name!r}",
                    where="option target_options",
                    why=f"its options are {', '.join(known) or 'none'}",
                    fix=f"did you mean {close[0]!r}?" if close else "drop it",
                )
        return self.options(**(given or {}))


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            Target("eager", lower_eager, pooled=True, routes=True),
            Target(
                "inductor", lower_inductor, InductorOptions, routes=True, reload=reload_inductor
            ),
            Target("ge", lower_ge, GeOptions),
            Target("npugraph_ex", lower_npugraph, NpuGraphOptions),
        )
    }
)
"""Targets by name."""


def target(name: str) -> Target:
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
