"""Notes how a traced model is called, while and after it is traced."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

from rolemesh.compiler.cache.guards import decode_guard
from rolemesh.compiler.cache.state import torch_settings
from rolemesh.compiler.cache.text import NotCacheableError
from rolemesh.compiler.capture.convention import (
    Convention,
    Fact,
    FactKind,
    NotSavableError,
    bound,
    input_path,
    read_input,
    result_of,
    type_name,
)
from rolemesh.compiler.capture.entry import Captured, Executor, Size
from rolemesh.compiler.capture.epilogue import simple_epilogue
from rolemesh.compiler.capture.paths import AccessPath, Step, access_path
from rolemesh.compiler.capture.sources import argument_path, current_frame
from rolemesh.compiler.ir.program import InputKind, tensor_type
from rolemesh.compiler.ir.serial_values import Json, encode_argument

__all__ = ["MODEL", "Notes", "describe_model", "record", "take_notes"]

MODEL = "model"
"""Root of the access paths of facts about the model."""

_KINDS: Mapping[str, FactKind] = {
    "CONSTANT_MATCH": "value",
    "EQUALS_MATCH": "value",
    "NONE_MATCH": "value",
    "BOOL_MATCH": "value",
    "TYPE_MATCH": "type",
    "SEQUENCE_LENGTH": "length",
    "LIST_LENGTH": "length",
    "DICT_KEYS_MATCH": "keys",
}
"""Dynamo's guards that become facts. Those on tensors are the Program's own types; those on hooks
and modules are in `describe_model`; those on code are in the digests of sources."""

_NOT_THE_MODELS = (str(PurePath(torch.__file__).parent), str(PurePath(__file__).parents[2]))
"""Folders whose code has a version of its own in every key: torch and rolemesh."""


@dataclass
class Notes:
    """What is only known while Dynamo compiles.

    Attributes:
        guarded: Paths that are guarded on, and how; from the arguments, or from `MODEL`.
        codes: The code objects that were traced.
        guards: Relations between symbolic sizes.
        problem: Why the call cannot be saved; empty if it can.
    """

    guarded: dict[tuple[AccessPath, FactKind], None] = field(default_factory=dict)
    codes: Sequence[CodeType] = ()
    guards: tuple[str, ...] = ()
    problem: str = ""


def take_notes(captured: Captured, inputs: Sequence[object]) -> Notes:
    """What Dynamo knows of the call that it compiles. For use in a backend, after the capture.

    Args:
        captured: The captured graph.
        inputs: Dynamo's flat inputs.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    notes = Notes()
    output = InstructionTranslator.current_tx().output
    context = TracingContext.get()
    notes.codes = list(context.traced_code)
    frame = current_frame()
    for guard in output.guards:
        kind = _KINDS.get(guard.create_fn_name())
        path = None if kind is None else access_path(guard.name)
        if path is None or kind is None or not guard.name.startswith("L["):
            continue
        root, steps = path
        variable = frame.variables.get(root)
        if isinstance(getattr(variable, "__self__", None), nn.Module) and steps:
            variable, steps = getattr(variable, "__self__", None), steps[1:]
        if isinstance(variable, nn.Module):
            notes.guarded[AccessPath(MODEL, steps), kind] = None
        elif root not in (frame.varargs, frame.varkw) or steps:
            notes.guarded[argument_path(path, frame), kind] = None
    try:
        changed = _changed_state(output.side_effects)
        if changed:
            raise NotSavableError(f"it changes {changed}, which is no tensor of an argument")
        if simple_epilogue(context, captured) is None:
            raise NotSavableError("outputs share memory with inputs, or it has other effects")
        notes.guards = _size_guards(context, captured, inputs)
    except NotSavableError as error:
        notes.problem = str(error)
    return notes


def _changed_state(effects: Any) -> str:
    """What Python state that was there before the call changes: of arguments, or of the model."""
    for variable in effects._get_modified_vars():
        try:
            name = variable.source.name
        except (AttributeError, NotImplementedError):
            continue  # it was made during the call
        if name.startswith("L["):
            return str(access_path(name) or name)
    return ""


def _size_guards(
    context: TracingContext, captured: Captured, inputs: Sequence[object]
) -> tuple[str, ...]:
    scope = captured.program.scope
    mode = context.fake_mode
    if scope is None or mode is None or mode.shape_env is None:
        return ()
    renamed = {}
    for symbol, (index, dim) in scope.sources.items():
        place = captured.tensor_inputs[index]
        value: Any = inputs[place] if isinstance(place, int) else None
        size = value.shape[dim] if isinstance(value, Tensor) and dim is not None else value
        if isinstance(size, torch.SymInt):
            renamed[size.node.expr] = symbol
    found = []
    for guard in mode.shape_env.guards:
        relation = mode.shape_env.replace(guard.expr).xreplace(renamed)
        if relation == True:  # noqa: E712 - sympy's own truth; types of inputs say equal sizes
            continue
        text = str(relation)
        try:
            same = decode_guard(text, scope) == relation
        except (ValueError, NotCacheableError):
            same = False
        if not same:
            raise NotSavableError(f"tracing guards on {guard.expr}")
        found.append(text)
    return tuple(dict.fromkeys(found))


def record(
    model: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    notes: Notes,
    call: Callable[[Executor], object],
) -> Convention:
    """How a model was called.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        notes: What was noted while it was traced.
        call: Calls the traced function with an executor. Nothing is computed and nothing written.

    Raises:
        NotSavableError: If that cannot be said as plain data.
    """
    if notes.problem:
        raise NotSavableError(notes.problem)
    if not isinstance(model, nn.Module):
        raise NotSavableError("it is a function, which has no weights with names")
    arguments = bound(inspect.signature(model.forward), args, kwargs)
    given: list[Tensor] = []
    devices: set[str] = set()

    def nothing(captured: Captured, inputs: list[Tensor]) -> list[Tensor]:
        _check_inputs(captured, inputs, model, arguments)
        devices.update(tensor.device.type for tensor in inputs)
        for output, node in zip(captured.program.outputs, captured.program.results, strict=True):
            if output.mutates is not None:
                given.append(inputs[output.mutates])
            else:
                kind = tensor_type(node)  # type: ignore[arg-type]
                shape = [int(size) for size in kind.shape]
                given.append(torch.empty(shape, dtype=kind.dtype, device="meta"))
        if any(isinstance(slot, Size) for slot in captured.slots):
            raise NotSavableError("it returns a size, or computes one outside of the program")
        return given

    try:
        result = result_of(call(nothing), given, arguments)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise NotSavableError(f"its result cannot be taken apart: {error}") from error
    facts = _facts(notes, {MODEL: model, **arguments})
    return Convention(
        tuple(sorted(arguments)),
        tuple(fact for path, fact in facts if path.root != MODEL),
        result,
        notes.guards,
        describe_model(model),
        tuple(fact for path, fact in facts if path.root == MODEL),
        _digests(notes.codes),
        _aliases(model),
        torch_settings(),
        tuple(sorted(devices)),
    )


def _check_inputs(
    captured: Captured, inputs: Sequence[Tensor], model: nn.Module, arguments: Mapping[str, object]
) -> None:
    """Make sure that the names of a Program's inputs lead to its inputs."""
    for entry, tensor in zip(captured.program.inputs, inputs, strict=True):
        if entry.kind is InputKind.CONSTANT:
            continue
        try:
            found = read_input(entry, input_path(entry), model, arguments)
        except LookupError as error:
            raise NotSavableError(f"its input {entry.name} has no such path") from error
        if found is not tensor and not (isinstance(found, int) and found == tensor):
            raise NotSavableError(f"its input {entry.name} is another tensor than that path says")
    passed = [
        found
        for entry, found in zip(captured.program.inputs, inputs, strict=True)
        if entry.kind is InputKind.USER
    ]
    for index, tensor in enumerate(passed):
        if any(tensor is other for other in passed[:index]):
            raise NotSavableError("one tensor is passed twice")


def _facts(notes: Notes, variables: Mapping[str, object]) -> list[tuple[AccessPath, Fact]]:
    found = []
    for path, kind in notes.guarded:
        try:
            value = path.read(variables)
            said = Fact(str(path), kind, None).of(value)
        except (LookupError, TypeError):
            continue  # a guard on what is not there: an attribute that the class has
        if isinstance(value, Tensor | nn.Module | torch.SymInt) and path.root != MODEL:
            continue
        if path.root != MODEL or not _is_described(path, kind, value):
            found.append((path, Fact(str(path), kind, said)))
    return found


def _is_described(path: AccessPath, kind: FactKind, value: object) -> bool:
    """Whether `describe_model` says it: what modules there are, and their numbers."""
    steps = list(path.steps)
    while len(steps) > 1 and steps[0] == Step(True, "_modules") and not steps[1].attribute:
        del steps[:2]
    if kind != "value":
        return not steps or steps[0].key in ("_modules", "_parameters", "_buffers")
    plain = isinstance(value, bool | int | float | None)
    return len(steps) == 1 and plain and not str(steps[0].key).startswith("_")


def describe_model(model: nn.Module) -> dict[str, Json]:
    """What decides the computation of a model besides its code and tensors.

    Returns:
        By qualified name of a module, its class, its hooks, and its attributes that are numbers,
        truths or dtypes; and under `(tied)` the names that stand for one parameter.
    """
    found: dict[str, Json] = {}
    for name, module in model.named_modules():
        entry: dict[str, Json] = {"class": type_name(type(module))}
        for key, value in vars(module).items():
            plain = isinstance(value, bool | int | float | torch.dtype)
            if plain and (key == "training" or not key.startswith("_")):
                entry[key] = encode_argument(value)
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks:
            entry["hooks"] = hooks
        found[name or MODEL] = entry
    same: dict[int, list[Json]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    found["(tied)"] = {str(group[0]): group[1:] for group in same.values() if len(group) > 1}
    return found


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    same: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        same.setdefault(id(tensor), []).append(name)
    return {
        name: tuple(other for other in group if other != name)
        for group in same.values()
        for name in group
    }


def _digests(codes: Sequence[CodeType]) -> dict[str, str]:
    """SHA-256 of the source files that code is from, by module; without torch's and our own."""
    files = {code.co_filename for code in codes}
    modules = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file in files and not file.startswith(_NOT_THE_MODELS):
            modules[name] = file
    lost = [
        file
        for file in files
        if not file.startswith(("<", *_NOT_THE_MODELS)) and file not in modules.values()
    ]
    if lost:
        raise NotSavableError(f"the source {lost[0]} is of no module")
    named = {name: file for name, file in modules.items() if not _is_standard(name)}
    return {
        name: hashlib.sha256(Path(named[name]).read_bytes()).hexdigest() for name in sorted(named)
    }


def _is_standard(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names and module != "__main__"
