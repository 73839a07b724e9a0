"""Repeated layers, traced by Dynamo once.

A deep model is a few layers many times. `repeated_layers` makes Dynamo see every layer that has
others like it as a call of a *region* (`torch.compiler.nested_compile_region`): Dynamo traces the
first of them, and takes its graph for another one if all guards of that trace hold for it too. The
guards are what makes this safe; a layer that differs in anything that the trace read is traced by
itself.

Two things that differ from layer to layer would fail the guards without a difference in the graph:

* A layer's index. While a model is marked, attributes that hold it are one object, `_OWN`, in all
  layers. Whatever looks at it (compares it, indexes a list with it) raises, and the model is then
  traced layer by layer. Only the cache knows it:
* A layer's part of the cache. The layer gets a view of the cache with this part alone, at `_OWN`.

A marked model is restored when the trace is done. What Dynamo compiled does not refer to the marks:
cache tensors are arguments of the region, taken from the cache that the call was given, and guards
on marks are dropped (`concerns_marks`).
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import fx, nn

__all__ = ["Marks", "concerns_marks", "repeated_layers"]

_LEAST = 4
"""Layers alike from which on a region pays."""

_DIFFERENT_GRAPHS = 64
"""Graphs that Dynamo may keep of one region before it gives up."""

_SLOT = "rolemesh_slot"
_REGION = "rolemesh_region"
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index")
_MARK = re.compile(rf"\.({_SLOT}|{_REGION}|forward)\b|\.({'|'.join(_INDEX_NAMES)})$")
_PLAIN = (torch.Tensor, bool, int, float, str, type(None))


class _OwnIndex:
    """Stands for the index of whichever layer is traced. It can be handed on, and nothing else."""

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError("a layer of a repeated kind looks at its own index")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mod__ = __floordiv__ = __mul__ = _refuse
    __index__ = __int__ = __bool__ = __hash__ = _refuse


_OWN = _OwnIndex()


class _OnlyLayer:
    """The layers of a cache as one layer sees them: its own."""

    def __init__(self, layer: object) -> None:
        self.layer = layer

    def __getitem__(self, index: object) -> object:
        if index is not _OWN:
            raise TypeError("a layer of a repeated kind reads another layer's cache")
        return self.layer


class _Slot(nn.Module):
    """What a marked layer knows of itself: its place, and its view of the cache.

    Attributes:
        index: Which layer it is.
        held: Names of the tensors in its part of the cache.
        kind: The cache's type.
        cache: The view.
    """

    def __init__(self, cache: object, index: int) -> None:
        super().__init__()
        self.index = index
        self.held: tuple[str, ...] = ()
        self.kind: type = _OwnIndex  # no argument is one
        self.cache: object = None
        self.part: object = None
        if cache is not None:
            part = cache.layers[index]  # type: ignore[attr-defined]
            self.held = tuple(n for n, v in vars(part).items() if isinstance(v, torch.Tensor))
            self.kind = type(cache)
            view = copy.copy(cache)
            view.layers = _OnlyLayer(part)  # type: ignore[attr-defined]
            self.cache = view
            self.part = part

    def tensors(self) -> list[torch.Tensor]:
        """The tensors of the layer's part of the cache."""
        return [getattr(self.part, name) for name in self.held]


def concerns_marks(guard: str) -> bool:
    """Whether a guard is on something that only a marked model has.

    Args:
        guard: Dynamo's expression for what is guarded.
    """
    return _MARK.search(guard) is not None


@contextmanager
def repeated_layers(
    model: object, args: Sequence[object], kwargs: Mapping[str, object]
) -> Iterator[Marks]:
    """Mark the repeated layers of a model inside the block.

    Args:
        model: What is about to be traced. Only a module has layers.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call; one of them may be a cache with `layers`.

    Yields:
        The marks; false if there are none.
    """
    cache = next((value for value in (*args, *kwargs.values()) if _is_cache(value)), None)
    marks = Marks(cache)
    try:
        if isinstance(model, nn.Module):
            for layers in _lists(model):
                for group in _groups(layers, cache):
                    if len(group) >= _LEAST:
                        marks.add(group)
        yield marks
    finally:
        marks.remove()


def _is_cache(value: object) -> bool:
    return isinstance(getattr(value, "layers", None), list) and not isinstance(value, nn.Module)


def _lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists of modules that are not inside one another."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _lists(child)


def _groups(layers: nn.ModuleList, cache: object) -> Iterator[list[tuple[int, nn.Module]]]:
    """Layers with tensors of the same names, shapes and dtypes, each with its index."""
    parts = list(getattr(cache, "layers", ()))
    found: dict[object, list[tuple[int, nn.Module]]] = {}
    for index, layer in enumerate(layers):
        if "forward" in vars(layer) or (cache is not None and index >= len(parts)):
            continue
        key = (
            *((type(module), module.training) for module in layer.modules()),
            *((name, p.shape, p.dtype) for name, p in layer.named_parameters()),
            *((name, b.shape, b.dtype) for name, b in layer.named_buffers()),
            type(parts[index]) if parts else None,
        )
        found.setdefault(key, []).append((index, layer))
    yield from found.values()


class Marks:
    """What was changed in a model, and how to undo it.

    Args:
        cache: The cache that the layers share; None without one.
    """

    def __init__(self, cache: object) -> None:
        self._cache = cache
        self._undo: list[tuple[nn.Module, str, object]] = []
        self._owned: set[int] = set()
        self._groups = 0

    def __bool__(self) -> bool:
        return bool(self._undo)

    def add(self, group: Sequence[tuple[int, nn.Module]]) -> None:
        """Make layers that look alike calls of one region."""
        region = _region(self._groups)
        self._groups += 1
        for index, layer in group:
            for module in layer.modules():
                for name in _INDEX_NAMES:
                    if type(vars(module).get(name)) is int and vars(module)[name] == index:
                        self._set(module, name, _OWN)
            slot = _Slot(self._cache, index)
            self.own([*layer.parameters(), *layer.buffers(), *slot.tensors()])
            self._set(layer, _SLOT, slot)
            self._set(layer, _REGION, region)
            self._set(layer, "forward", types.MethodType(_forward, layer))

    def own(self, tensors: Sequence[torch.Tensor]) -> None:
        """Remember the tensors that belong to one layer."""
        self._owned.update(map(id, tensors))

    def hold(self, graph: fx.Graph) -> bool:
        """Whether every call of a region has the tensors of its own layer.

        Dynamo renames what a trace reads by where the region's arguments come from. What it does
        not know to belong to an argument stays that of the first layer.

        Args:
            graph: Dynamo's graph.
        """
        region = torch.ops.higher_order.invoke_subgraph
        for node in graph.find_nodes(op="placeholder"):
            calls = sum(user.target is region for user in node.users)
            if calls > 1 and id(node.meta["grapharg"].example) in self._owned:
                return False
        return True

    def remove(self) -> None:
        """Restore the model."""
        while self._undo:
            module, name, old = self._undo.pop()
            del vars(module)[name]
            if old is not None:
                vars(module)[name] = old

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        self._undo.append((module, name, vars(module).get(name)))
        vars(module)[name] = value


def _forward(self: nn.Module, *args: object, **kwargs: object) -> object:
    """What a marked layer runs instead of its forward.

    A region takes tensors and plain values one by one, so tuples are spread, and the cache stays
    out. The tensors of the layer's part of the cache come along: Dynamo then knows them as those
    of the cache that the call was given, rather than those of the mark.
    """
    slot: _Slot = self.rolemesh_slot  # type: ignore[assignment]
    names = ""
    leaves: list[object] = []
    state: list[object] = []
    for name, value in (*(("", value) for value in args), *kwargs.items()):
        if isinstance(value, slot.kind):
            names += f"{name}=cache,"
            part = value.layers[slot.index]  # type: ignore[attr-defined]
            state = [getattr(part, held) for held in slot.held]
        elif isinstance(value, tuple):
            names += f"{name}={len(value)},"
            leaves.extend(value)
        elif isinstance(value, _PLAIN):
            names += f"{name}=,"
            leaves.append(value)
        else:
            return type(self).forward(self, *args, **kwargs)
    return self.rolemesh_region(self, slot, names, *leaves, *state)  # type: ignore[operator]


@functools.cache
def _region(number: int) -> Callable[..., object]:
    """The region of a group of layers: Dynamo tells regions apart by their code objects.

    They stay: Dynamo drops what it compiled when a code object that it saw goes away.
    """
    code = _call_layer.__code__.replace()
    function = types.FunctionType(code, _call_layer.__globals__, "layer")
    mark: Callable[..., Callable[..., object]] = torch.compiler.nested_compile_region
    return mark(function, max_reuse_entries=_DIFFERENT_GRAPHS)


def _call_layer(layer: nn.Module, slot: _Slot, names: str, *leaves: object) -> object:
    """Call a layer's own forward with arguments that `_forward` took apart."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    at = 0
    for entry in names.split(",")[:-1]:
        name, form = entry.split("=")
        if form == "cache":
            value: object = slot.cache
        elif form:
            value, at = leaves[at : at + int(form)], at + int(form)
        else:
            value, at = leaves[at], at + 1
        if name:
            kwargs[name] = value
        else:
            args.append(value)
    return type(layer).forward(layer, *args, **kwargs)
