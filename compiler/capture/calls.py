"""Calls of marked layers in Dynamo's graph: the op `rolemesh::layer`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["LayerCall", "layer_op", "noting_calls"]


@dataclass(frozen=True)
class LayerCall:
    """One call of a marked layer, as Dynamo sees it.

    Attributes:
        number: Which marked layer is called.
        form: The form of the call.
        numbers: Integers among its arguments.
        tensors: Tensors among its arguments and in its part of the cache, without data.
        results: What the layer gave, if it was traced itself.
        count: Length of the tuple it returns; 0 for one tensor without a tuple.
    """

    number: int
    form: str
    numbers: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    count: int

    @property
    def facts(self) -> list[object]:
        """What calls must agree in to run the same ops."""
        return [
            self.numbers,
            *((tuple(x.shape), x.stride(), x.dtype, x.requires_grad) for x in self.tensors),
        ]


Noted = Callable[[LayerCall], Sequence[Tensor]]
"""Takes note of a call, and gives what it returns if the layer is not traced itself."""

_NOTED: ContextVar[Noted] = ContextVar("rolemesh_noted")


@contextmanager
def noting_calls(noted: Noted) -> Iterator[None]:
    """Hand calls that are traced inside the block to `noted`."""
    token = _NOTED.set(noted)
    try:
        yield
    finally:
        _NOTED.reset(token)


@functools.cache
def _library() -> torch.library.Library:
    """The definition of `rolemesh::layer`; it goes away with this object."""
    library = torch.library.Library("rolemesh", "FRAGMENT")
    library.define(
        "layer(Tensor[] leaves, Tensor[] state, SymInt[] numbers, Tensor[] results, "
        "str form, int number, int count) -> Tensor[]"
    )

    def called(
        leaves: Sequence[Tensor],
        state: Sequence[Tensor],
        numbers: Sequence[int],
        results: Sequence[Tensor],
        form: str,
        number: int,
        count: int,
    ) -> Sequence[Tensor]:
        call = LayerCall(number, form, tuple(numbers), (*leaves, *state), tuple(results), count)
        return _NOTED.get()(call)

    torch.library.register_fake("rolemesh::layer", called, lib=library)
    return library


def layer_op() -> OpOverload:
    """The op that stands for a call of a marked layer in Dynamo's graph.

    `rolemesh::layer(leaves, state, numbers, results, form, number, count)`: arguments of the call,
    tensors of the layer's part of the cache, and, where the layer is traced itself, what it gave.
    """
    _library()
    found: OpOverload = torch.ops.rolemesh.layer.default
    return found
