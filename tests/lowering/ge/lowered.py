"""Lowering plain functions to GE graphs and running them, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from rolemesh.compiler.ir.program import Input, InputKind, Origin, Output
from rolemesh.lowering.signature import Signature

__all__ = ["dynamic_examples", "module_of", "signature_of"]


def module_of(
    function: Callable[..., Sequence[object]], inputs: int, outputs: int
) -> fx.GraphModule:
    """A graph that calls a function of tensors, as a bound graph calls those of mesh ops."""
    graph = fx.Graph()
    taken = [graph.placeholder(f"x{i}") for i in range(inputs)]
    call = graph.call_function(function, tuple(taken))
    call.meta["origin"] = Origin("layers.1", "model.py:12")
    graph.output(tuple(graph.call_function(_item, (call, i)) for i in range(outputs)))
    return fx.GraphModule(torch.nn.Module(), graph)


def _item(values: Sequence[object], index: int) -> object:
    return values[index]


def signature_of(
    inputs: int,
    outputs: int,
    mutated: Mapping[int, int] | None = None,
    parameters: Sequence[int] = (),
) -> Signature:
    """A signature; `mutated` maps outputs to the inputs whose new values they are."""
    updated = set((mutated or {}).values())
    return Signature(
        "test",
        tuple(
            Input(
                f"x{i}",
                InputKind.PARAMETER if i in parameters else InputKind.USER,
                mutated=i in updated,
            )
            for i in range(inputs)
        ),
        tuple(Output((mutated or {}).get(i)) for i in range(outputs)),
    )


def dynamic_examples(
    examples: Sequence[Tensor], dims: Mapping[int, Sequence[int]], *, apart: bool = False
) -> list[FakeTensor]:
    """Fake tensors like the examples.

    Args:
        examples: The examples.
        dims: Which dims of which are symbols.
        apart: Whether each of them has a symbol of its own; else those of equal size have one.
    """
    kind = DimDynamic.DYNAMIC if apart else DimDynamic.DUCK
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [
        mode.from_tensor(
            example,
            source=ConstantSource(f"x{index}"),
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[
                    kind if dim in dims.get(index, ()) else DimDynamic.STATIC
                    for dim in range(example.ndim)
                ]
            ),
        )
        for index, example in enumerate(examples)
    ]
