"""Repeated layers, traced by Dynamo once.

A deep model is a few layers many times. `repeated_layers` finds those that are alike
(`rolemesh.compiler.capture.alike`) and marks them, so that Dynamo traces one of each kind, as a
*region* (`torch.compiler.nested_compile_region`), and sees a single op where another one is called.
`rolemesh.compiler.capture.outline` and `.bodies` put the ops of the traced layer in place of such
an op, with the weights of the layer that is called.

* The first call of a layer of a kind is traced. Other calls must have the same plain values, and
  tensors of the same shapes, dtypes and strides; if they do not, the layers are traced one by one.
* A layer's index differs from layer to layer. While a model is marked, attributes that hold it are
  one object, `_OWN`, in all layers. Whatever looks at it (compares it, indexes a list with it)
  raises, and the model is then traced layer by layer. Only the cache knows it: a layer gets a view
  of the cache with its own part alone, at `_OWN`.
* Tensors of a layer's part of the cache are arguments of its call, taken from the cache that the
  model was given: Dynamo binds them anew in every call of what it compiles.

A marked model is restored when the trace is done. What Dynamo compiled does not refer to the marks:
guards on them are dropped (`concerns_marks`).
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rolemesh.compiler.capture.alike import (
    INDEX_NAMES,
    NotAlikeError,
    groups_alike,
    held_by,
    layer_lists,
)
from rolemesh.compiler.capture.calls import (
    LayerCall,
    Result,
    another_call,
    noting_calls,
    traced_call,
)
from rolemesh.compiler.capture.entry import Weight

__all__ = ["Marks", "concerns_marks", "repeated_layers"]

_MARK = "rolemesh_mark"
_GUARDED = re.compile(rf"\.({_MARK}|forward)\b|\.({'|'.join(INDEX_NAMES)})$")


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


class _Mark(nn.Module):
    """What a marked layer knows of itself: its place, and its view of the cache.

    Attributes:
        index: Which layer of its list it is.
        number: Which marked layer it is.
        region: Calls the layer's own forward, as a region.
        follows: Whether another layer of its kind was traced.
        argument: Place or name of the argument that is the cache; None for none. Known then.
        changes: Attributes that the other layer set in its part of the cache, a length it counts,
            with their new values. Known then too.
        held: Names of the tensors in its part of the cache.
        kind: The cache's type.
        part: Its part of the cache.
        cache: The view.
    """

    def __init__(
        self, cache: object, index: int, number: int, region: Callable[..., Result]
    ) -> None:
        super().__init__()
        self.region = region
        self.index = index
        self.number = number
        self.follows = False
        self.argument: int | str | None = None
        self.changes: tuple[tuple[str, object], ...] = ()
        self.held: tuple[str, ...] = ()
        self.kind: type = _OwnIndex  # no argument is one
        self.part: object = None
        self.cache: object = None
        if cache is not None:
            self.part = part = cache.layers[index]  # type: ignore[attr-defined]
            self.held = tuple(n for n, v in vars(part).items() if isinstance(v, Tensor))
            self.kind = type(cache)
            view = copy.copy(cache)
            view.layers = _OnlyLayer(part)  # type: ignore[attr-defined]
            self.cache = view


def concerns_marks(guard: str) -> bool:
    """Whether a guard is on something that only a marked model has.

    Args:
        guard: Dynamo's expression for what is guarded.
    """
    return _GUARDED.search(guard) is not None


@contextmanager
def repeated_layers(
    model: object,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    refused: Set[nn.Module] = frozenset(),
) -> Iterator[Marks]:
    """Mark the repeated layers of a model inside the block.

    Args:
        model: What is about to be traced. Only a module has layers.
        args: Arguments of the call.
        kwargs: Keyword arguments of the call; one of them may be a cache with `layers`.
        refused: First layers of the kinds that are left as they are.

    Yields:
        The marks; false if there are none.
    """
    cache = next((value for value in (*args, *kwargs.values()) if _is_cache(value)), None)
    marks = Marks(cache)
    try:
        if isinstance(model, nn.Module):
            for path, layers in layer_lists(model):
                for group, compared in groups_alike(layers, cache):
                    if group[0][1] not in refused:
                        marks.add(path, group, compared)
        with noting_calls(marks.note_traced, marks.result_of):
            yield marks
    finally:
        marks.remove()


def _is_cache(value: object) -> bool:
    return isinstance(getattr(value, "layers", None), list) and not isinstance(value, nn.Module)


class Marks:
    """What was changed in a model, and how to undo it.

    Args:
        cache: The cache that the layers share; None without one.
    """

    def __init__(self, cache: object) -> None:
        self.refused: set[nn.Module] = set()
        """First layers of the kinds that a trace found not to be alike."""
        self._compared: list[set[int]] = []
        self._cache = cache
        self._undo: list[tuple[nn.Module, str, object]] = []
        self._kinds: list[list[_Mark]] = []
        self.firsts: list[nn.Module] = []
        """The first layer of each kind."""
        self._kind_of: list[int] = []
        self._owned: list[list[Weight]] = []
        self._traced: dict[int, tuple[LayerCall, Result]] = {}
        self._called: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._undo)

    def add(self, path: str, group: Sequence[tuple[int, nn.Module]], compared: set[int]) -> None:
        """Mark layers that are alike.

        Args:
            path: Of the list that they are in.
            group: Each with its index.
            compared: Identities of what they were compared by. A trace must not change any of it.
        """
        self._compared.append(compared)
        self.firsts.append(group[0][1])
        region = _region(len(self._kinds))
        marks = []
        for index, layer in group:
            self._owned.append(held_by(f"{path}.{index}", layer))
            for module in layer.modules():
                for name in INDEX_NAMES:
                    if type(vars(module).get(name)) is int and vars(module)[name] == index:
                        self._set(module, name, _OWN)
            mark = _Mark(self._cache, index, len(self._kind_of), region)
            self._kind_of.append(len(self._kinds))
            marks.append(mark)
            self._set(layer, _MARK, mark)
            self._set(layer, "forward", types.MethodType(_forward, layer))
        self._kinds.append(marks)

    def owned(self, number: int) -> list[Weight]:
        """What a marked layer holds; those of layers alike correspond one to one."""
        return self._owned[number]

    def first(self, number: int) -> int:
        """The marked layer that was traced for a call of another one."""
        return self._traced[self._kind_of[number]][0].number

    def note_traced(self, call: LayerCall, argument: int | str | None, result: Result) -> None:
        """Let other layers of its kind be called as one that is traced.

        Args:
            call: Its call.
            argument: Place or name of the argument that is the cache; None for none.
            result: What it gave.
        """
        kind = self._kind_of[call.number]
        self._traced[kind] = call, result
        self._called.add(call.number)
        (first,) = (mark for mark in self._kinds[kind] if mark.number == call.number)
        changes = _changes(first.part)
        for mark in self._kinds[kind]:
            mark.follows, mark.argument, mark.changes = True, argument, changes

    def result_of(self, call: LayerCall) -> Result:
        """What a layer gives that is not traced itself.

        Raises:
            NotAlikeError: If it is not called as the layer that was traced.
        """
        kind = self._kind_of[call.number]
        traced, result = self._traced[kind]
        counts = bool(self._kinds[kind][0].changes)
        if call.facts != traced.facts or (counts and call.number in self._called):
            self.refused.add(self.firsts[kind])
            raise NotAlikeError(f"layer {call.number} is not called as layer {traced.number} is")
        self._called.add(call.number)
        return result

    def check(self) -> None:
        """Check that the trace changes no attribute that layers were compared by.

        For use in a backend.

        Raises:
            NotAlikeError: If it does.
        """
        effects = _side_effects()
        changed = {i for i, v in effects.id_to_variable.items() if effects.is_modified(v)}
        for kind, (first, compared) in enumerate(zip(self.firsts, self._compared, strict=True)):
            alike = {
                id(mark.part)
                for mark in self._kinds[kind]
                if mark.changes and mark.changes == _changes(mark.part)
            }
            if not (changed - alike).isdisjoint(compared):
                self.refused.add(first)
        if self.refused:
            raise NotAlikeError("the model changes attributes of a layer")

    def compares(self, value: object) -> bool:
        """Whether layers were compared by an object."""
        return any(id(value) in compared for compared in self._compared)

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


def _side_effects() -> Any:  # Dynamo's SideEffects
    """What the trace under way has changed of Python's objects. For use inside of one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output.side_effects


def _changes(part: object) -> tuple[tuple[str, object], ...]:
    """The attributes that the trace under way has set in a part of a cache, in order.

    None of them, if one is no plain value: another layer would get one of its own.
    """
    effects = _side_effects()
    stored = effects.store_attr_mutations.get(effects.id_to_variable.get(id(part)), {})
    if not all(value.is_python_constant() for value in stored.values()):
        return ()
    return tuple((name, value.as_python_constant()) for name, value in sorted(stored.items()))


def _forward(self: nn.Module, *args: object, **kwargs: object) -> object:
    """What a marked layer runs instead of its forward.

    Dynamo runs this once a layer. A region takes tensors one by one, so tuples are spread; the
    cache stays out, and the tensors of the layer's part of it come along: Dynamo then knows them as
    those of the cache that the call was given, rather than those of the mark.
    """
    mark: _Mark = self.rolemesh_mark  # type: ignore[assignment]
    state: list[torch.Tensor] = []
    if mark.follows:
        if mark.argument is not None:
            if isinstance(mark.argument, int):
                cache = args[mark.argument]
                args = (*args[: mark.argument], None, *args[mark.argument + 1 :])
            else:
                cache = kwargs[mark.argument]
                kwargs[mark.argument] = None
            part = cache.layers[mark.index]  # type: ignore[attr-defined]
            state = [getattr(part, held) for held in mark.held]
            for name, value in mark.changes:
                setattr(part, name, value)
        return another_call(mark.number, args, kwargs, state)
    names = ""
    argument: int | str | None = None
    plain: list[object] = []
    leaves: list[object] = []
    given: tuple[tuple[int | str, object], ...] = (*enumerate(args), *kwargs.items())
    for key, value in given:
        if isinstance(value, tuple):
            names += f"{key}={len(value)},"
            leaves.extend(value)
        elif isinstance(value, torch.Tensor):
            names += f"{key}=tensor,"
            leaves.append(value)
        elif isinstance(value, mark.kind):
            names += f"{key}=cache,"
            argument = key
            part = value.layers[mark.index]  # type: ignore[attr-defined]
            state = [getattr(part, held) for held in mark.held]
        else:
            names += f"{key}=plain,"
            plain.append(value)
    result = mark.region(self, mark, names, *plain, *leaves, *state)
    if isinstance(argument, int):
        args = (*args[:argument], None, *args[argument + 1 :])
    elif argument is not None:
        kwargs[argument] = None
    traced_call(mark.number, args, kwargs, state, argument, result)
    return result


@functools.cache
def _region(number: int) -> Callable[..., Result]:
    """The region of a kind of layers: Dynamo tells regions apart by their code objects.

    They stay: Dynamo drops what it compiled when a code object that it saw goes away.
    """
    code = _call_layer.__code__.replace()
    function = types.FunctionType(code, _call_layer.__globals__, "layer")
    mark: Callable[..., Callable[..., Result]] = torch.compiler.nested_compile_region
    return mark(function)


def _call_layer(layer: nn.Module, mark: _Mark, names: str, *given: object) -> object:
    """Call a layer's own forward with arguments that `_forward` took apart."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    plain = 0
    leaf = names.count("=plain,")
    for entry in names.split(",")[:-1]:
        name, kind = entry.split("=")
        if kind == "cache":
            value: object = mark.cache
        elif kind == "plain":
            value, plain = given[plain], plain + 1
        elif kind == "tensor":
            value, leaf = given[leaf], leaf + 1
        else:
            value, leaf = given[leaf : leaf + int(kind)], leaf + int(kind)
        if name.isdigit():
            args.append(value)
        else:
            kwargs[name] = value
    return type(layer).forward(layer, *args, **kwargs)
