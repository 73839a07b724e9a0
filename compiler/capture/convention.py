"""How a traced model is called, as plain data: what its arguments are like, and what it returns.

Dynamo's compiled function does both, but cannot leave the process: it is bytecode and guards. What
is noted here is what a saved program needs in their place (`rolemesh.compiler.artefact`):

* inputs of a Program are read by their names: `past_key_values.layers[0].keys` from the arguments,
  `model.norm.weight` from the model. That the names lead to the very tensors was checked;
* facts: values, types and lengths that Dynamo guards on;
* the result: a pytree, whose leaves are outputs of the Program, arguments, or plain values.

A call that does more, such as to set an attribute of an argument, has no convention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rolemesh.compiler.capture.paths import AccessPath, access_path
from rolemesh.compiler.ir.program import Input, InputKind
from rolemesh.compiler.ir.serial_values import Json, encode_argument

__all__ = [
    "Convention",
    "Difference",
    "Fact",
    "Leaf",
    "NotSavableError",
    "Result",
    "bound",
    "input_path",
    "read_input",
    "result_of",
    "type_name",
    "unlike",
]


class NotSavableError(Exception):
    """What a call of the model does cannot be said as plain data."""


FactKind = Literal["value", "type", "length", "keys"]


class Fact(NamedTuple):
    """Something about an argument, or about the model, that the Program depends on.

    Attributes:
        name: Access path of what it is about.
        kind: What about it.
        expected: What that was in the trace.
    """

    name: str
    kind: FactKind
    expected: Json

    def of(self, value: object) -> Json:
        """What this fact says of another value."""
        match self.kind:
            case "type":
                return type_name(type(value))
            case "length":
                return len(value)  # type: ignore[arg-type]
            case "keys":
                return [str(key) for key in value]  # type: ignore[attr-defined]
        if isinstance(value, torch.device):
            return {"device": value.type}  # its number is the rank's
        try:
            return type_name(value) if isinstance(value, type) else encode_argument(value)
        except TypeError:
            return f"a {type_name(type(value))}"


class Difference(NamedTuple):
    """A field that differs, with both sides as text."""

    name: str
    saved: str
    here: str


class Leaf(NamedTuple):
    """A leaf of what the model returns: an output of the Program, an argument, or a plain value."""

    kind: Literal["output", "argument", "value"]
    value: Json


@dataclass(frozen=True)
class Result:
    """What the model returns.

    Attributes:
        spec: The pytree, as `torch.utils._pytree.treespec_dumps` writes it.
        leaves: Its leaves.
    """

    spec: str
    leaves: tuple[Leaf, ...]


@dataclass(frozen=True)
class Convention:
    """How a traced model is called.

    Attributes:
        arguments: Names of the parameters that were given a value.
        facts: Facts about the arguments.
        result: What is returned.
        guards: Relations between symbolic sizes that must hold.
        model: What the model is: its modules, with their classes and numbers, and tied weights.
        model_facts: Facts about the model that Dynamo guards on.
        sources: SHA-256 of the source files that were traced, by name of the module.
        aliases: For each name in the model's state_dict, the tensor's other names.
        settings: Settings of torch that tracing looks at.
        devices: Types of the devices that inputs were on.
    """

    arguments: tuple[str, ...]
    facts: tuple[Fact, ...]
    result: Result
    guards: tuple[str, ...] = ()
    model: Mapping[str, Json] = field(default_factory=dict)
    model_facts: tuple[Fact, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settings: Mapping[str, Json] = field(default_factory=dict)
    devices: tuple[str, ...] = ()


def type_name(kind: type) -> str:
    """The name of a type, with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def bound(
    signature: inspect.Signature, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The values of a call's parameters, by name; those of `**kwargs` by their own names.

    Raises:
        TypeError: If the call does not fit the signature.
    """
    values = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in values:
            values |= values.pop(name)
    return values


def read_input(
    entry: Input, path: AccessPath, model: nn.Module, arguments: Mapping[str, object]
) -> object:
    """What an input of a Program is in a call.

    Raises:
        LookupError: If it is not there.
    """
    if entry.kind is InputKind.USER:
        return path.read(arguments)
    value: object = model
    for key in entry.name.split("."):
        try:
            value = getattr(value, key)
        except AttributeError as error:
            raise LookupError(f"there is no {entry.name}") from error
    return value


def unlike(
    facts: Sequence[tuple[Fact, AccessPath]], variables: Mapping[str, object]
) -> Iterator[Difference]:
    """The facts that are not so for these variables."""
    for fact, path in facts:
        try:
            found = fact.of(path.read(variables))
        except (LookupError, TypeError):
            yield Difference(fact.name, f"{fact.kind} {fact.expected}", "absent")
            continue
        if found != fact.expected or type(found) is not type(fact.expected):
            what = "" if fact.kind == "value" else f"{fact.kind} "
            yield Difference(fact.name, f"{what}{fact.expected}", f"{what}{found}")


def result_of(
    value: object, outputs: Sequence[torch.Tensor], arguments: Mapping[str, object]
) -> Result:
    """How a result is made of a Program's outputs and the arguments.

    Args:
        value: What the model returned.
        outputs: The outputs.
        arguments: Values of the parameters.

    Raises:
        NotSavableError: If a leaf is none of these, or the tree has a type that torch cannot write.
    """
    places = {id(output): Leaf("output", index) for index, output in enumerate(outputs)}
    for name, argument in arguments.items():
        if not isinstance(argument, bool | int | float | str | None):
            places.setdefault(id(argument), Leaf("argument", name))
    leaves, spec = pytree.tree_flatten(value, is_leaf=lambda leaf: id(leaf) in places)
    found = []
    for leaf in leaves:
        try:
            plain = None if id(leaf) in places else encode_argument(leaf)
        except TypeError as error:
            raise NotSavableError(
                f"it returns a {type_name(type(leaf))} that is no output of the program"
            ) from error
        found.append(places.get(id(leaf), Leaf("value", plain)))
    try:
        return Result(pytree.treespec_dumps(spec), tuple(found))
    except (NotImplementedError, TypeError) as error:
        raise NotSavableError(f"what it returns cannot be written: {error}") from error


def input_path(entry: Input) -> AccessPath:
    """The access path that an input's name says.

    Raises:
        NotSavableError: If it says none.
    """
    path = access_path(entry.name)
    if path is None:
        if entry.kind is InputKind.USER:
            raise NotSavableError(f"its input {entry.name} is not read from the arguments")
        return AccessPath(entry.name, ())
    return path
