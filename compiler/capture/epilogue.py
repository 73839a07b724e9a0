"""What AOTAutograd does around a graph at each call, where that is simple, done directly.

It copies new values into mutated inputs, and marks sizes that Dynamo makes symbols of. Its own
wrappers are written for all that a graph may do, and cost a call of a small model several percent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch._aot_autograd.schemas import OutputType, ViewAndMutationMeta
from torch._guards import TracingContext

from rolemesh.compiler.capture.entry import Captured

__all__ = ["Compiled", "Epilogue", "epilogue_of", "simple_epilogue", "with_epilogue"]

Compiled = Callable[..., object]
"""What Dynamo calls with its flat inputs."""

_OWN_MEMORY = (OutputType.non_alias, OutputType.unsafe_view_alias, OutputType.custom_function_view)


@dataclass(frozen=True)
class Epilogue:
    """What is done once a graph has run.

    Attributes:
        mutated: Which of Dynamo's flat inputs the first outputs are new values of.
        dynamic: By number of a result, its dims that Dynamo makes symbols of at once.
    """

    mutated: tuple[int, ...]
    dynamic: Mapping[int, tuple[int, ...]]


def simple_epilogue(context: TracingContext, captured: Captured) -> Epilogue | None:
    """What AOTAutograd does around the graph that it has just compiled.

    Args:
        context: What it knows of the graph.
        captured: The graph as it was captured. It may write to more inputs than AOTAutograd knows
            of: those of repeated layers.

    Returns:
        None if it is more: for an output that shares memory with an input or another output, an
        input whose shape or memory is changed, and autocast, which must not see the graph again.
    """
    assert context.fw_metadata is not None
    if torch._C._is_any_autocast_enabled() or any(
        output.requires_grad for output in context.fw_metadata.output_info
    ):
        return None
    return epilogue_of(context.fw_metadata, captured)


def epilogue_of(metadata: ViewAndMutationMeta, captured: Captured) -> Epilogue | None:
    """The same, of what AOTAutograd knows of a graph, whose results may require gradients."""
    changed = [metadata.input_info[index] for index in metadata.mutated_inp_runtime_indices]
    if (
        any(o.output_type not in _OWN_MEMORY for o in metadata.output_info)
        or any(not i.mutates_data or i.mutates_metadata for i in changed)
        or any(i.mutates_storage_metadata for i in changed)
        or metadata.num_intermediate_bases
        or metadata.grad_enabled_mutation is not None
    ):
        return None
    dynamic = {
        index: tuple(sorted(output.dynamic_dims))
        for index, output in enumerate(metadata.output_info)
        if output.dynamic_dims
    }
    written = [output.mutates for output in captured.program.outputs if output.mutates is not None]
    places = [captured.tensor_inputs[position] for position in written]
    return Epilogue(tuple(place for place in places if isinstance(place, int)), dynamic)


def with_epilogue(captured: Captured, epilogue: Epilogue) -> Compiled:
    """What Dynamo calls: a captured graph, then its epilogue."""
    count = len(epilogue.mutated)

    def run(*flat: object) -> list[object]:
        values = captured.run(flat)
        for index, value in zip(epilogue.mutated, values, strict=False):
            target = flat[index]
            if value is not target:
                with torch.no_grad():
                    cast(Tensor, target).copy_(cast(Tensor, value))
        results = values[count:]
        for index, dims in epilogue.dynamic.items():
            # As AOTAutograd marks them, for the graph that Dynamo captures next.
            result = cast(Any, results[index])
            known: set[int] = getattr(result, "_dynamo_weak_dynamic_indices", set())
            result._dynamo_weak_dynamic_indices = known | set(dims)
        return results

    return run
