"""Readable names for what Dynamo captured: inputs, module paths and source lines.

Dynamo says where each graph input comes from with a Python expression over the locals `L` and the
globals `G` of the compiled frame::

    L["self"]._modules["model"]._modules["layers"]._modules["0"]._parameters["weight"]
    L["kwargs"]["past_key_values"].layers[0].keys

`input_names` turns the first into `model.layers.0.weight` and the second into
`past_key_values.layers[0].keys`. Names are unique within a graph. An expression of a form that is
not known here keeps its own text as its name: an odd name is no reason to refuse a model.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from types import CodeType
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.compiler.capture.paths import AccessPath, access_path
from rolemesh.compiler.ir.program import InputKind

__all__ = [
    "Frame",
    "SourceName",
    "argument_path",
    "current_frame",
    "input_names",
    "module_path",
    "placeholder_sources",
    "readable",
    "source_line",
]

_REGISTRIES = ("_modules", "_parameters", "_buffers")
_ROOT = re.compile(r"^[LG]\['(\w+)'\]\.?")
_BOUND = ".forward.__self__"
"""How Dynamo spells a module whose forward was set on the object: a marked layer."""
_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_LIBRARIES = (str(PurePath(torch.__file__).parent), str(PurePath(__file__).parents[2]))
"""Folders whose frames are not the model's: torch and rolemesh."""


class SourceName(NamedTuple):
    """Name and kind of one graph input."""

    name: str
    kind: InputKind


@dataclass(frozen=True)
class Frame:
    """What is known about the frame that Dynamo compiles.

    Attributes:
        variables: Its locals and globals that graph inputs may start from.
        positional: Names of the parameters that receive the values of `*args`, in order, if the
            frame is a wrapper `(self, *args, **kwargs)` around a forward with named parameters.
        varargs: Name of its `*args` parameter, or empty.
        varkw: Name of its `**kwargs` parameter, or empty.
    """

    variables: Mapping[str, object] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    varargs: str = ""
    varkw: str = ""


def current_frame() -> Frame:
    """The frame that Dynamo is compiling; an empty one outside a backend's call."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:
        return Frame()
    code = translator.f_code
    count = code.co_argcount + code.co_kwonlyargcount
    names = list(code.co_varnames[count:])
    varargs = names.pop(0) if code.co_flags & inspect.CO_VARARGS else ""
    varkw = names.pop(0) if code.co_flags & inspect.CO_VARKEYWORDS else ""
    variables = {**translator.f_globals, **translator.f_locals}
    positional: tuple[str, ...] = ()
    model = _wrapped_module(code, variables)
    if varargs and model is not None:
        parameters = inspect.signature(model.forward).parameters.values()
        positional = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return Frame(variables, positional, varargs, varkw)


def _wrapped_module(code: CodeType, variables: Mapping[str, object]) -> torch.nn.Module | None:
    """The module whose forward a frame `(self, *args, **kwargs)` or Dynamo's own wrapper calls."""
    if code.co_argcount == 1:
        found = variables.get(code.co_varnames[0])
    else:
        found = variables.get("fn") if "fn" in code.co_freevars else None
        found = getattr(found, "__self__", found)
    return found if isinstance(found, torch.nn.Module) else None


def input_names(
    sources: Sequence[str], values: Sequence[object], frame: Frame
) -> tuple[SourceName, ...]:
    """Name the inputs of a graph.

    Args:
        sources: Dynamo's expression for each input.
        values: The example value of each input.
        frame: The frame that the expressions start from.

    Returns:
        One unique name per input: the fully qualified name of a parameter or buffer, the access
        path of any other input.
    """
    paths = [access_path(source) for source in sources]
    found = [
        SourceName(source, InputKind.USER) if path is None else _named(path, value, frame)
        for source, path, value in zip(sources, paths, values, strict=True)
    ]
    counts: dict[str, int] = {}
    for entry in found:
        counts[entry.name] = counts.get(entry.name, 0) + 1
    for index, (entry, path) in enumerate(zip(found, paths, strict=True)):
        if counts[entry.name] > 1:  # two models in one graph: name them by their variables
            qualified = sources[index] if path is None else f"{path.root}.{entry.name}"
            found[index] = entry._replace(name=qualified)
    names = {entry.name for entry in found}
    if len(names) < len(found):
        return tuple(e._replace(name=s) for e, s in zip(found, sources, strict=True))
    return tuple(found)


def module_path(stack: Mapping[str, tuple[str, object]] | None) -> str:
    """Path of the innermost module of a node's `nn_module_stack`; empty for the root."""
    if not stack:
        return ""
    path = list(stack.values())[-1][0].replace(_BOUND, "")
    return _ROOT.sub("", path)


@functools.lru_cache(maxsize=1024)
def source_line(stack_trace: str | None) -> str:
    """`file.py:line` of the innermost frame of the model in a node's `stack_trace`."""
    for file, line in reversed(_STACK_LINE.findall(stack_trace or "")):
        if not file.startswith(_LIBRARIES):
            return f"{PurePath(file).name}:{line}"
    return ""


def placeholder_sources(graph: fx.Graph) -> list[str]:
    """Dynamo's expression for each placeholder of its graph; the node's name where it has none."""
    sources = []
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        sources.append(node.name if source is None else source.name)
    return sources


def readable(text: str, frame: Frame) -> str:
    """`text` with expressions over the frame's locals written as the model's author would."""
    if frame.varkw:
        text = re.sub(rf"L\['{frame.varkw}'\]\['(\w+)'\]", r"\1", text)
    for index, name in enumerate(frame.positional):
        text = text.replace(f"L['{frame.varargs}'][{index}]", name)
    return re.sub(r"\b[LG]\['(\w+)'\]", r"\1", text)


def argument_path(path: AccessPath, frame: Frame) -> AccessPath:
    """A path from a wrapper's `*args` or `**kwargs`, as one from the parameter that gets it."""
    root, steps = path
    if steps and not steps[0].attribute:
        key = steps[0].key
        if root == frame.varkw and isinstance(key, str):
            return AccessPath(key, steps[1:])
        if root == frame.varargs and isinstance(key, int) and key < len(frame.positional):
            return AccessPath(frame.positional[key], steps[1:])
    return path


def _named(path: AccessPath, value: object, frame: Frame) -> SourceName:
    registry = [step.key for step in path.steps if step.key in _REGISTRIES and step.attribute]
    if registry or isinstance(frame.variables.get(path.root), torch.nn.Module):
        is_parameter = "_parameters" in registry or isinstance(value, torch.nn.Parameter)
        kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
        return SourceName(_qualified(path), kind)
    return SourceName(str(argument_path(path, frame)), InputKind.USER)


def _qualified(path: AccessPath) -> str:
    """The state_dict key: steps after the root, without the registries they go through."""
    keys = [str(s.key) for s in path.steps if not (s.attribute and s.key in _REGISTRIES)]
    return ".".join(keys) or path.root
