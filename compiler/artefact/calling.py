"""Calls of a saved program: arguments to inputs, outputs to what the model returns, and checks.

This does what Dynamo's compiled function and AOTAutograd's epilogue do in the process that traced:
check the arguments, read the inputs, copy new values into mutated ones, and make the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rolemesh.compiler.cache.guards import decode_guard
from rolemesh.compiler.capture.convention import (
    Convention,
    Difference,
    Fact,
    Leaf,
    Result,
    bound,
    input_path,
    unlike,
)
from rolemesh.compiler.capture.entry import Captured, Executor, Weight
from rolemesh.compiler.capture.paths import AccessPath, access_path
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import InputKind, Program, tensor_type
from rolemesh.compiler.ir.serial_values import Json, decode_argument

__all__ = ["SavedEntry", "decode_convention", "encode_convention", "weights_of"]

_MOST_SHOWN = 4


def encode_convention(convention: Convention) -> dict[str, Json]:
    """A calling convention as JSON."""
    return {
        "arguments": [*convention.arguments],
        "facts": [[*fact] for fact in convention.facts],
        "guards": [*convention.guards],
        "result": {
            "spec": convention.result.spec,
            "leaves": [[*leaf] for leaf in convention.result.leaves],
        },
        "model": {**convention.model},
        "model_facts": [[*fact] for fact in convention.model_facts],
        "sources": {**convention.sources},
        "aliases": {name: [*names] for name, names in convention.aliases.items()},
        "settings": {**convention.settings},
        "devices": [*convention.devices],
    }


def decode_convention(data: Mapping[str, Any]) -> Convention:
    """The inverse of `encode_convention`."""
    leaves = tuple(Leaf(*leaf) for leaf in data["result"]["leaves"])
    return Convention(
        arguments=tuple(data["arguments"]),
        facts=tuple(Fact(*fact) for fact in data["facts"]),
        guards=tuple(data["guards"]),
        result=Result(data["result"]["spec"], leaves),
        model=data["model"],
        model_facts=tuple(Fact(*fact) for fact in data["model_facts"]),
        sources=data["sources"],
        aliases={name: tuple(names) for name, names in data["aliases"].items()},
        settings=data["settings"],
        devices=tuple(data["devices"]),
    )


def weights_of(
    programs: Sequence[Program], model: nn.Module, devices: Collection[str]
) -> tuple[dict[str, Weight], list[Difference]]:
    """The parameters and buffers that captured Programs read, of a model.

    Args:
        programs: The Programs.
        model: The model.
        devices: Types of the devices that they may be on.

    Returns:
        The weights by name, and those that are not in the model, or are otherwise.
    """
    weights: dict[str, Weight] = {}
    found = []
    for program in programs:
        for entry, node in zip(program.inputs, program.placeholders, strict=True):
            if entry.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
                continue
            kind, has = tensor_type(node), "absent"
            try:
                weight = weights.get(entry.name) or _weight(model, entry.name)
            except LookupError:
                found.append(Difference(entry.name, _type_text(kind.shape, kind.dtype), has))
                continue
            tensor = weight.tensor
            if (*tensor.shape, tensor.dtype) != (*kind.shape, kind.dtype):
                has = _type_text(tensor.shape, tensor.dtype)
                found.append(Difference(entry.name, _type_text(kind.shape, kind.dtype), has))
            elif tensor.device.type not in devices:
                found.append(_device_difference(entry.name, tensor, devices))
            weights[entry.name] = weight
    return weights, found


class SavedEntry:
    """Stands for Dynamo's compiled function in a process that has traced nothing.

    Args:
        model: The model.
        weights: Its weights, which were found to fit, by name.
        captured: The captured graph.
        convention: How the model is called.

    Attributes:
        captured: The captured graph.

    Raises:
        ValueError: If the convention is not one for the graph, or has a type that is unknown here.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Weight],
        captured: Captured,
        convention: Convention,
    ) -> None:
        self.captured = captured
        self._convention = convention
        self._signature = inspect.signature(model.forward)
        self._facts = [(fact, _path(fact.name)) for fact in convention.facts]
        try:
            self._spec = pytree.treespec_loads(convention.result.spec)
        except (NotImplementedError, KeyError) as error:
            raise ValueError(f"the result has a type that is unknown here: {error}") from error
        self._constants = [
            decode_argument(leaf.value, {}, None) if leaf.kind == "value" else None
            for leaf in convention.result.leaves
        ]
        program = captured.program
        self._inputs: list[AccessPath | Weight | Tensor] = []
        constants = iter(captured.constants)
        for entry in program.inputs:
            match entry.kind:
                case InputKind.USER:
                    self._inputs.append(input_path(entry))
                case InputKind.CONSTANT:
                    self._inputs.append(next(constants))
                case _:
                    self._inputs.append(weights[entry.name])
        self._types = [tensor_type(node) for node in program.placeholders]
        self._arguments = [i for i, e in enumerate(program.inputs) if e.kind is InputKind.USER]
        self._mutated = [
            (index, output.mutates)
            for index, output in enumerate(program.outputs)
            if output.mutates is not None
        ]
        scope = program.scope
        guards = () if scope is None else convention.guards
        self._guards = [(text, decode_guard(text, cast(Any, scope))) for text in guards]

    def call(self, executor: Executor, *args: object, **kwargs: object) -> object:
        """Call the saved model with `executor` in place of its ops; see `Entry.call`.

        Raises:
            RolemeshError: RM020, if the arguments differ from the traced ones in anything that the
                Program depends on: shapes, dtypes, or plain values.
        """
        arguments, inputs, found = self._prepared(args, kwargs)
        if found:
            raise unlike_traced(found)
        with torch.no_grad():
            results = executor(self.captured, inputs)
            for index, position in self._mutated:
                if results[index] is not inputs[position]:
                    inputs[position].copy_(results[index])
        leaves = [
            results[cast(int, leaf.value)]
            if leaf.kind == "output"
            else arguments[str(leaf.value)]
            if leaf.kind == "argument"
            else constant
            for leaf, constant in zip(self._convention.result.leaves, self._constants, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self._spec)

    def differences(self, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Difference]:
        """What arguments have otherwise than those that were traced."""
        return self._prepared(args, kwargs)[2]

    def _prepared(
        self, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> tuple[dict[str, object], list[Tensor], list[Difference]]:
        try:
            arguments = bound(self._signature, args, kwargs)
        except TypeError as error:
            return {}, [], [Difference("the arguments", self._given, str(error))]
        names = tuple(sorted(arguments))
        if names != self._convention.arguments:
            return {}, [], [Difference("the arguments", self._given, ", ".join(names))]
        found = list(unlike(self._facts, arguments))
        inputs = []
        for place, entry in zip(self._inputs, self.captured.program.inputs, strict=True):
            value: object = place
            if isinstance(place, Weight):
                value = place.tensor
            elif isinstance(place, AccessPath):
                try:
                    value = place.read(arguments)
                except LookupError:
                    found.append(Difference(entry.name, "a tensor", "absent"))
                    continue
            if isinstance(value, int):
                value = torch.tensor(value)
            if isinstance(value, Tensor):
                inputs.append(value)
            else:
                found.append(Difference(entry.name, "a tensor", f"{value!r}"))
        if len(inputs) == len(self._inputs):
            found += self._unlike_tensors(inputs)
        return arguments, inputs, found

    @property
    def _given(self) -> str:
        return ", ".join(self._convention.arguments)

    def _unlike_tensors(self, inputs: Sequence[Tensor]) -> list[Difference]:
        """What tensors of the arguments have otherwise: types, devices, shared memory."""
        program, found = self.captured.program, []
        for index in self._arguments:
            kind, tensor, name = self._types[index], inputs[index], program.inputs[index].name
            same = len(kind.shape) == tensor.ndim and kind.dtype == tensor.dtype
            if not same or any(
                type(size) is int and size != extent
                for size, extent in zip(kind.shape, tensor.shape, strict=True)
            ):
                wanted = _type_text(kind.shape, kind.dtype)
                found.append(Difference(name, wanted, _type_text(tensor.shape, tensor.dtype)))
            elif tensor.device.type not in self._convention.devices:
                found.append(_device_difference(name, tensor, self._convention.devices))
        if found:
            return found
        return [*self._unlike_sizes(inputs), *self._shared(inputs)]

    def _unlike_sizes(self, inputs: Sequence[Tensor]) -> list[Difference]:
        program, scope = self.captured.program, self.captured.program.scope
        if scope is None:
            return []
        values = program.values(inputs)
        found = [
            Difference(str(symbol), f"{scope.ranges[symbol].lower} or more", str(value))
            for symbol, value in values.items()
            if not scope.ranges[symbol].lower <= value <= scope.ranges[symbol].upper
        ]
        for index in self._arguments:
            kind, tensor = self._types[index], inputs[index]
            shape = [
                size if type(size) is int else scope.value(cast(Any, size).formula, values)
                for size in kind.shape
            ]
            if shape != list(tensor.shape):
                wanted, has = (_type_text(s, kind.dtype) for s in (kind.shape, tensor.shape))
                found.append(Difference(program.inputs[index].name, wanted, has))
        given = ", ".join(f"{symbol} = {value}" for symbol, value in values.items())
        return found + [
            Difference("the sizes", text, given)
            for text, guard in self._guards
            if guard.subs(values) != True  # noqa: E712 - sympy's own truth
        ]

    def _shared(self, inputs: Sequence[Tensor]) -> list[Difference]:
        """Arguments that share memory with one that is written, as the traced ones do not."""
        written = {position for _, position in self._mutated}
        owners: dict[int, int] = {}
        names = self.captured.program.inputs
        found = []
        for index in self._arguments:
            storage = inputs[index].untyped_storage()._cdata
            other = owners.setdefault(storage, index)
            if other != index and (other in written or index in written):
                is_one = f"shares memory with {names[other].name}"
                found.append(Difference(names[index].name, "has memory of its own", is_one))
        return found


def unlike_traced(found: Sequence[Difference]) -> RolemeshError:
    """The error for arguments that a saved program does not take."""
    lines = [f"{d.name}: {d.saved} when it was saved, {d.here} now" for d in found[:_MOST_SHOWN]]
    more = len(found) - len(lines)
    return RolemeshError(
        "RM020",
        "the arguments differ from those that were traced",
        where="\n".join(lines + ([f"and {more} more"] if more else [])),
        why="a Program has fixed shapes, dtypes and plain values",
        fix="call it with arguments like the traced ones, or save a program for these too",
    )


def _path(name: str) -> AccessPath:
    path = access_path(name)
    if path is None:
        raise ValueError(f"{name!r} is no access path")
    return path


def _weight(model: nn.Module, name: str) -> Weight:
    """A parameter or buffer.

    Raises:
        LookupError: If the model has no tensor of that name.
    """
    *parents, key = name.split(".")
    module: Any = model
    for step in parents:
        module = getattr(module, step, None)
    registries: list[Mapping[str, object]] = [getattr(module, "__dict__", {})]
    if isinstance(module, nn.Module):
        registries += [cast(Any, module._parameters), cast(Any, module._buffers)]
    for registry in registries:
        if isinstance(registry.get(key), Tensor):
            return Weight(name, registry, key)
    raise LookupError(f"there is no {name}")


def _device_difference(name: str, tensor: Tensor, devices: Collection[str]) -> Difference:
    return Difference(f"{name}.device", ", ".join(devices), tensor.device.type)


def _type_text(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} [{', '.join(map(str, shape))}]"
