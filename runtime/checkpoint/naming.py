"""How the tensors of a checkpoint become the tensors of a model.

A `Naming` turns the names of a checkpoint into `Conversion`s: each takes some tensors of the
checkpoint and gives some of the model, and knows their types before anything is read. The plain
naming below takes every tensor as it is; `rolemesh.runtime.checkpoint.hub` has that of
`transformers`.

Invariants: a tensor of the checkpoint is a source of one conversion at most; conversions move
elements and never compute with them, so dtypes pass unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.runtime.checkpoint.files import Entry

__all__ = ["AsTheyAre", "Conversion", "Converted", "Naming", "Sources"]


Sources = list[tuple[Entry, torch.Tensor]]
"""Tensors of a checkpoint with their values."""


@dataclass(frozen=True)
class Conversion:
    """One step from tensors of the checkpoint to tensors of the model.

    Attributes:
        sources: What it reads.
        results: Type of each tensor of the model that it gives, by name.
        convert: Gives the results from the sources, in their order, and empties the list it is
            given. None if the one source is the one result.
        rows: For a conversion that gives each row (index of dim 0) of its one result from sources
            of its own: the sources of each row. It then also converts the sources of a range of
            rows, in the order of `sources`. Empty if it needs all sources at once.
    """

    sources: tuple[Entry, ...]
    results: Mapping[str, TensorType]
    convert: Callable[[Sources], Mapping[str, torch.Tensor]] | None
    rows: tuple[tuple[Entry, ...], ...] = ()


class Converted(NamedTuple):
    """What a naming makes of a checkpoint.

    Attributes:
        conversions: All conversions.
        extra: Names of the checkpoint that the model has no place for.
        failed: What could not be converted: names of the model, and why.
    """

    conversions: tuple[Conversion, ...]
    extra: tuple[str, ...]
    failed: Mapping[str, str]


class Naming(Protocol):
    """Relates the names of checkpoints to those of one model."""

    def converted(self, entries: Mapping[str, Entry], wanted: Set[str]) -> Converted:
        """The conversions that give the tensors `wanted` from a checkpoint's."""

    def stored_as(self, tensors: Mapping[str, TensorType]) -> Mapping[str, TensorType]:
        """The tensors of a checkpoint, by name, that hold these tensors of the model."""

    def may_lack(self, name: str) -> bool:
        """Whether a checkpoint may leave out a tensor of the model that has a value already."""


class AsTheyAre:
    """The naming of a checkpoint that has the model's own names."""

    def converted(self, entries: Mapping[str, Entry], wanted: Set[str]) -> Converted:
        """One conversion for each tensor that both have."""
        conversions = tuple(
            Conversion((entry,), {name: entry.type}, None)
            for name, entry in entries.items()
            if name in wanted
        )
        return Converted(conversions, tuple(name for name in entries if name not in wanted), {})

    def stored_as(self, tensors: Mapping[str, TensorType]) -> Mapping[str, TensorType]:
        """The tensors themselves."""
        return tensors

    def may_lack(self, name: str) -> bool:
        """Never."""
        return False
