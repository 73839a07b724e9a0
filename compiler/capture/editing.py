"""Editing AOTAutograd's graph.

Invariant: every node has a FakeTensor, or a plain or symbolic number, as `meta["val"]`; what is
emitted gets the one that follows from its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

__all__ = [
    "Editor",
    "argument_list",
    "depends_on_data",
    "evaluated",
    "number_at",
    "tensor_value",
    "tensors",
]

_WHERE = ("nn_module_stack", "stack_trace")


class Editor:
    """Emits ops in front of one node, as if they came from the same line of the model.

    Args:
        before: The node.
        origin: The node whose module and source line the new ones get.
    """

    def __init__(self, before: fx.Node, origin: fx.Node) -> None:
        self._graph = before.graph
        self._before = before
        self._where = {key: origin.meta[key] for key in _WHERE if key in origin.meta}

    def call(
        self, target: fx.node.Target, *args: fx.node.Argument, **kwargs: fx.node.Argument
    ) -> fx.Node:
        """A new node."""
        value = evaluated(target, args, kwargs)
        with self._graph.inserting_before(self._before):
            made = self._graph.create_node("call_function", target, args, kwargs)
        made.meta.update(self._where, val=value)
        return made

    def number(self, size: int | torch.SymInt) -> int | fx.Node | None:
        """A size as an argument of what is emitted; see `number_at`."""
        return number_at(self._before, size)


def number_at(place: fx.Node, size: int | torch.SymInt) -> int | fx.Node | None:
    """A size as an argument of `place`: itself, or an earlier node with that value, else None."""
    if not isinstance(size, torch.SymInt):
        return size
    if size.node.expr.is_Integer:
        return int(size.node.expr)  # known by what Dynamo found out later
    for node in place.graph.nodes:
        if node is place:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return node
    return None


def tensor_value(node: object) -> Tensor:
    """The FakeTensor of a node that is a tensor."""
    assert isinstance(node, fx.Node)
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def tensors(value: object) -> list[Tensor]:
    """The tensors of a node's value, which may be several."""
    values = value if isinstance(value, list | tuple) else (value,)
    return [item for item in values if isinstance(item, Tensor)]


def depends_on_data(value: object) -> bool:
    """Whether a node's value is a number that depends on data, or has such a size."""
    if isinstance(value, list | tuple):
        return any(depends_on_data(item) for item in value)
    if isinstance(value, Tensor):
        return any(depends_on_data(size) for size in value.shape)
    return isinstance(value, torch.SymInt | torch.SymBool) and bool(free_unbacked_symbols(value))


def argument_list(value: object, target: Callable[..., object]) -> Sequence[Any]:
    """Positional arguments, if `value` is a call of `target`; none for anything else.

    Their types are what the schema of `target` says.
    """
    if isinstance(value, fx.Node) and value.target is target:
        return value.args
    return ()


def evaluated(
    target: fx.node.Target,
    args: Sequence[fx.node.Argument],
    kwargs: Mapping[str, fx.node.Argument],
) -> object:
    """What a call gives on the values of its operands.

    Args:
        target: What is called.
        args: Positional arguments; nodes stand for their values.
        kwargs: Keyword arguments, likewise.
    """
    assert callable(target)

    def value(node: fx.Node) -> Any:  # FX's Argument
        return node.meta["val"]

    own_args: Any = fx.map_arg(tuple(args), value)
    own_kwargs: Any = fx.map_arg(dict(kwargs), value)
    return target(*own_args, **own_kwargs)
