"""Calls of marked layers in Dynamo's graph: `traced_call` and `another_call`.

Dynamo puts a call of either function into its graph as it is, arguments and all, and runs it on
tensors without data to know what comes back. That is far less than it does for a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["LayerCall", "Result", "another_call", "noting_calls", "traced_call"]

Result = Tensor | tuple[Tensor, ...]
"""What a layer returns."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a marked layer, with tensors without data.

    Attributes:
        number: Which marked layer is called.
        args: Its arguments.
        kwargs: Its keyword arguments; None for the cache.
        state: The tensors of its part of the cache.
    """

    number: int
    args: Sequence[object]
    kwargs: Mapping[str, object]
    state: Sequence[Tensor]

    @property
    def facts(self) -> object:
        """What calls must agree in to run the same ops."""
        leaves, form = tree_flatten((self.args, self.kwargs, self.state))
        return form, [
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf)
            for leaf in leaves
        ]


Traced = Callable[[LayerCall, int | str | None, Result], None]
Another = Callable[[LayerCall], Result]

_NOTING: ContextVar[tuple[Traced, Another]] = ContextVar("rolemesh_noting")


@contextmanager
def noting_calls(traced: Traced, another: Another) -> Iterator[None]:
    """Let calls be traced inside the block, and hand them on.

    Args:
        traced: Takes note of a call that is traced itself, with the place or name of its
            argument that is the cache, if any, and its result.
        another: Gives the result of another one.
    """
    torch.compiler.allow_in_graph([traced_call, another_call])
    token = _NOTING.set((traced, another))
    try:
        yield
    finally:
        _NOTING.reset(token)


def traced_call(
    number: int,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    state: Sequence[Tensor],
    cache: int | str | None,
    result: Result,
) -> None:
    """Says what a layer was called with that is traced itself, and what it gave."""
    traced, _ = _NOTING.get()
    traced(LayerCall(number, args, kwargs, state), cache, result)


def another_call(
    number: int, args: Sequence[object], kwargs: Mapping[str, object], state: Sequence[Tensor]
) -> Result:
    """Stands for the call of a layer that another one was traced for."""
    _, another = _NOTING.get()
    found = another(LayerCall(number, args, kwargs, state))
    result: Result = tree_map(
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device), found
    )
    return result
