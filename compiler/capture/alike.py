"""Which layers of a model are the same but for their weights and their place.

What a layer computes depends on what its forward can read: the modules, attributes and hooks that
hang off it. `Alike` walks two layers side by side and compares all of it. It takes no two objects
for the same that it cannot look into, so a layer that it finds alike may be taken for the other
one; a layer that it does not is another kind, at worst without need.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rolemesh.compiler.capture.entry import Weight

__all__ = ["INDEX_NAMES", "Alike", "NotAlikeError", "groups_alike", "held_by", "layer_lists"]

_LEAST = 4
"""Layers alike from which on it pays to trace one of them."""

INDEX_NAMES = ("layer_idx", "layer_id", "layer_index")
"""Attributes that hold a layer's place."""

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_SHARED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_NOTHING = object()
_DEFINED_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE


class NotAlikeError(TypeError):
    """Layers that look alike are not, in the call that is traced."""


class Alike:
    """Compares what hangs off one layer with what hangs off others.

    Args:
        index: Place of the layer that the others are compared with.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._other = index
        self._partners: dict[int, object] = {}
        self._taken: set[int] = set()
        self.seen: set[int] = set()
        """Identities of all objects that were compared."""

    def holds(self, index: int, firsts: Sequence[object], others: Sequence[object]) -> bool:
        """Whether another layer is the first one but for its weights and its place.

        Tensors are partners if they agree in all but their data. What the first layer holds twice,
        the other one must hold twice too.

        Args:
            index: Place of the other layer.
            firsts: What belongs to the first layer.
            others: What belongs to the other one, in the same order.
        """
        self._other = index
        self._partners.clear()
        self._taken.clear()
        found = all(self._same(a, b) for a, b in zip(firsts, others, strict=True))
        self.seen.update(self._partners)
        self.seen.update(self._taken)
        return found

    def _same(self, a: object, b: object) -> bool:
        if isinstance(a, _VALUES):
            return type(a) is type(b) and (a == b or (a != a and b != b))
        if type(a) is not type(b):
            return False
        if isinstance(a, _SHARED):
            return a is b
        partner = self._partners.get(id(a), _NOTHING)
        if partner is not _NOTHING:
            return partner is b
        if id(b) in self._taken:
            return False
        self._partners[id(a)] = b
        self._taken.add(id(b))
        return a is b or self._same_inside(a, b)

    def _same_inside(self, a: object, b: object) -> bool:
        match a, b:
            case Tensor(), Tensor():
                return _same_tensor(a, b)
            case dict(), dict():
                return self._same_mapping(a, b)
            case (list() | tuple(), list() | tuple()):
                return len(a) == len(b) and all(map(self._same, a, b))
            case (set() | frozenset(), set() | frozenset()):
                return all(isinstance(item, _VALUES) for item in a) and a == b
            case types.MethodType(), types.MethodType():
                return a.__func__ is b.__func__ and self._same(a.__self__, b.__self__)
            case functools.partial(), functools.partial():
                return (
                    self._same(a.func, b.func)
                    and self._same(a.args, b.args)
                    and self._same(a.keywords, b.keywords)
                )
        inside, other = getattr(a, "__dict__", None), getattr(b, "__dict__", None)
        if inside is None or other is None or not (isinstance(a, nn.Module) or _is_plain(type(a))):
            return False
        return self._same_mapping(inside, other)

    def _same_mapping(self, a: Mapping[object, object], b: Mapping[object, object]) -> bool:
        if len(a) != len(b):
            return False
        for (key, value), (other_key, other) in zip(a.items(), b.items(), strict=True):
            if not (isinstance(key, _VALUES) and key == other_key):
                return False
            places = value == self._index and other == self._other if key in INDEX_NAMES else False
            if not places and not self._same(value, other):
                return False
        return True


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return (
        (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
        and (a.dtype, a.device, a.layout) == (b.dtype, b.device, b.layout)
        and (a.requires_grad, a.is_inference()) == (b.requires_grad, b.is_inference())
    )


def _is_plain(kind: type) -> bool:
    """Whether all state of a class's objects is in their `__dict__`."""
    return all(
        base.__flags__ & _DEFINED_IN_PYTHON and not vars(base).get("__slots__")
        for base in kind.__mro__[:-1]
    )


def layer_lists(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules that are not inside one another, each with its path."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from layer_lists(child, f"{prefix}{name}.")


def groups_alike(
    layers: nn.ModuleList, cache: object
) -> Iterator[tuple[list[tuple[int, nn.Module]], set[int]]]:
    """Layers that are alike and share no tensor, each with its index, and what was compared."""
    parts = list(getattr(cache, "layers", ()))
    found: list[tuple[Alike, list[tuple[int, nn.Module]]]] = []
    for index, layer in enumerate(layers):
        if "forward" in vars(layer) or (cache is not None and index >= len(parts)):
            continue
        state = parts[index : index + 1]
        for alike, group in found:
            first, other = group[0]
            if type(other) is type(layer) and alike.holds(
                index, [other, *parts[first : first + 1]], [layer, *state]
            ):
                group.append((index, layer))
                break
        else:
            found.append((Alike(index), [(index, layer)]))
    for alike, group in found:
        owned = [id(tensor) for _, layer in group for tensor in _tensors(layer)]
        if len(group) >= _LEAST and len(owned) == len(set(owned)):
            yield group, alike.seen


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [owned.tensor for owned in held_by("", layer)]


def held_by(path: str, layer: nn.Module) -> list[Weight]:
    """What a layer holds by a name, in a fixed order, each tensor once."""
    found: dict[int, Weight] = {}
    for prefix, module in layer.named_modules():
        start = ".".join(filter(None, (path, prefix)))
        for registry in (module._parameters, module._buffers, vars(module)):
            for key, value in registry.items():
                if isinstance(value, Tensor):
                    found.setdefault(id(value), Weight(f"{start}.{key}", registry, key))
    return list(found.values())
