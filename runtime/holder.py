"""Where the parameters of a model are kept, so that others can be put in their place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Holder", "holders_of"]


@dataclass(frozen=True, eq=False)
class Holder:
    """Where modules keep one parameter.

    Attributes:
        name: Its qualified name in the model.
        places: The modules that have it, each with its name there.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter as it is now."""
        module, key = self.places[0]
        found = module._parameters[key]
        assert found is not None
        return found

    def replace(self, tensor: nn.Parameter) -> None:
        """Put another parameter in its place, everywhere."""
        for module, key in self.places:
            module._parameters[key] = tensor


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
    found: dict[int, list[tuple[nn.Module, str]]] = {id(tensor): [] for _, tensor in tensors}
    seen: set[int] = set()
    for root in roots:
        for module in root.modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            for key, parameter in module._parameters.items():
                if id(parameter) in found:
                    found[id(parameter)].append((module, key))
    holders = []
    for name, tensor in tensors:
        if not found[id(tensor)]:
            raise KeyError(name)
        holders.append(Holder(name, tuple(found[id(tensor)])))
    return holders
