"""Where the parameters of a model are kept, so that others can be put in their place."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

__all__ = ["Holder", "holders_of"]


@dataclass(frozen=True, eq=False)
class Holder:
    """Where modules keep one parameter.

    Attributes:
        name: Its qualified name in the model.
        places: The registries that it is in, each with its name there.
    """

    name: str
    places: tuple[tuple[MutableMapping[str, torch.Tensor], str], ...]

    @property
    def tensor(self) -> torch.Tensor:
        """The parameter as it is now."""
        registry, key = self.places[0]
        return registry[key]

    def replace(self, tensor: torch.Tensor) -> None:
        """Put another parameter in its place, everywhere."""
        for registry, key in self.places:
            registry[key] = tensor


def holders_of(
    roots: Iterable[nn.Module], tensors: Sequence[tuple[str, torch.Tensor]]
) -> list[Holder]:
    """Where modules keep tensors.

    Args:
        roots: Modules to look in, with all that they contain.
        tensors: The parameters, with their names.

    Raises:
        KeyError: With the name of a parameter that no module has.
    """
    found: dict[int, list[tuple[MutableMapping[str, torch.Tensor], str]]] = {
        id(tensor): [] for _, tensor in tensors
    }
    seen: set[int] = set()
    for root in roots:
        for module in root.modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            registry = cast(MutableMapping[str, torch.Tensor], module._parameters)
            for key, parameter in registry.items():
                if id(parameter) in found:
                    found[id(parameter)].append((registry, key))
    holders = []
    for name, tensor in tensors:
        if not found[id(tensor)]:
            raise KeyError(name)
        holders.append(Holder(name, tuple(found[id(tensor)])))
    return holders
