"""Captured graphs, kept for the next process: what `capture` returns, without AOTAutograd.

Kept are the Program, where Dynamo's inputs and outputs are in it, the values of constants, and what
AOTAutograd does around its graph where that is simple: new values are copied into mutated inputs,
and outputs are tensors of their own. A graph with an output that is a view of an input, or that
changes an input's shape, is not kept.

Tracing may decide something about symbolic sizes, which Dynamo then guards on. Such guards are kept
too, and taken again on a hit; sizes for which they do not hold miss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import fx
from torch._guards import TracingContext

from rolemesh.compiler.cache.folder import CacheFolder
from rolemesh.compiler.cache.graph_key import graph_key
from rolemesh.compiler.cache.guards import encode_guards, take_guards
from rolemesh.compiler.cache.programs import (
    decode_entry,
    encode_entry,
    program_from,
    program_json,
)
from rolemesh.compiler.cache.state import capture_state
from rolemesh.compiler.cache.text import NotCacheableError, digest
from rolemesh.compiler.capture.entry import Captured, Cut, Executor, Fixed, Integer, Size, Slot
from rolemesh.compiler.capture.epilogue import (
    Compiled,
    Epilogue,
    simple_epilogue,
    with_epilogue,
)
from rolemesh.compiler.capture.graph import capture
from rolemesh.compiler.capture.sources import current_frame, input_names, placeholder_sources
from rolemesh.compiler.ir.dims import Dim
from rolemesh.compiler.ir.program import Program
from rolemesh.compiler.ir.serial_values import Json, decode_argument, encode_argument

__all__ = ["capture_cached"]

_KIND = "captured"


def capture_cached(
    folder: CacheFolder | None,
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    executor: Executor,
) -> tuple[Captured, Compiled, str | None]:
    """What `capture` gives, from the cache if it is there.

    Args:
        folder: The cache; None for none.
        gm: Dynamo's graph.
        example_inputs: Its inputs; FakeTensors will do.
        executor: What runs the captured graph by default.

    Returns:
        The captured graph, the compiled function that Dynamo calls, and the key of the graph; None
        if nothing may be kept of it.

    Raises:
        RolemeshError: As `capture` does.
    """
    if folder is None:
        return *capture(gm, example_inputs, executor=executor), None
    try:
        names = input_names(placeholder_sources(gm.graph), example_inputs, current_frame())
        key = digest(capture_state(), graph_key(gm, example_inputs, names))
    except NotCacheableError:
        return *capture(gm, example_inputs, executor=executor), None
    content = folder.read(_KIND, key)
    if content is not None:
        try:
            found = _decoded(content, example_inputs, executor)
        except ValueError as error:
            folder.refuse(_KIND, key, str(error))
            found = None
        if found is not None:
            return *found, key
    context = TracingContext.get()
    guards = _guards(context)
    captured, compiled = capture(gm, example_inputs, executor=executor)
    try:
        added = _guards(context)[len(guards) :]
        folder.write(
            _KIND, key, _encoded(captured, _epilogue(context, captured), added, example_inputs)
        )
    except NotCacheableError:
        return captured, compiled, None
    return captured, compiled, key


def _guards(context: TracingContext) -> list[Any]:
    mode = context.fake_mode
    env = None if mode is None else mode.shape_env
    return [] if env is None else [guard.expr for guard in env.guards]


def _epilogue(context: TracingContext, captured: Captured) -> Epilogue:
    """What AOTAutograd does around the graph that it has just compiled.

    Raises:
        NotCacheableError: If that is not simple.
    """
    if context.guards_context.aotautograd_guards:
        raise NotCacheableError("it matters whether inputs are the same tensor")
    epilogue = simple_epilogue(context, captured)
    if epilogue is None:
        raise NotCacheableError("outputs share memory with inputs, or the graph has other effects")
    return epilogue


def _encoded(
    captured: Captured, epilogue: Epilogue, guards: Sequence[Any], inputs: Sequence[object]
) -> bytes:
    """The content of an entry.

    Raises:
        NotCacheableError: If something in it cannot be written.
    """
    try:
        data: Mapping[str, Json] = {
            "program": program_json(captured.program),
            "tensor_inputs": cast(list[Json], list(captured.tensor_inputs)),
            "slots": [_slot_json(slot) for slot in captured.slots],
            "mutated": list(epilogue.mutated),
            "dynamic": [[index, *dims] for index, dims in epilogue.dynamic.items()],
            "guards": [*encode_guards(guards, inputs)],
        }
        return encode_entry(data, captured.constants)
    except TypeError as error:
        raise NotCacheableError(str(error)) from error


def _decoded(
    content: bytes, inputs: Sequence[object], executor: Executor
) -> tuple[Captured, Compiled] | None:
    """What an entry holds; None if its guards do not hold for these inputs."""
    data, constants = decode_entry(content)
    entry = cast(Any, data)
    if not take_guards(entry["guards"], inputs):
        return None
    program = program_from(entry["program"])
    slots = tuple(_slot(slot, program) for slot in entry["slots"])
    captured = Captured(program, constants, executor, tuple(entry["tensor_inputs"]), slots)
    dynamic = {index: tuple(dims) for index, *dims in entry["dynamic"]}
    return captured, with_epilogue(captured, Epilogue(tuple(entry["mutated"]), dynamic))


def _slot_json(slot: Slot) -> Json:
    match slot:
        case Fixed(value):
            return {"fixed": encode_argument(value)}
        case Size(size):
            return {"size": encode_argument(size)}
        case Integer(output):
            return {"integer": output}
        case Cut(unit, outputs):
            return {"cut": [unit, *outputs]}
        case int():
            return slot


def _slot(data: Json, program: Program) -> Slot:
    match data:
        case {"fixed": value}:
            return Fixed(decode_argument(value, {}, program.scope))
        case {"size": value}:
            size = decode_argument(value, {}, program.scope)
            assert isinstance(size, Dim)
            return Size(size)
        case {"integer": int(output)}:
            return Integer(output)
        case {"cut": [int(unit), *outputs]}:
            return Cut(unit, tuple(cast(list[int], outputs)))
        case int(output):
            return output
    raise ValueError(f"{data!r} is no place of an output")
