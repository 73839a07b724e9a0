"""Reading the arguments of a call as the op's schema names them, without the cost of a binder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rolemesh.compiler.ir.rule import OpCall

__all__ = ["argument", "dim_argument", "dims_argument", "int_argument"]


def argument(call: OpCall, index: int, name: str, default: object = None) -> object:
    """The argument at `index`, given by position or by name, else `default`."""
    return call.args[index] if len(call.args) > index else call.kwargs.get(name, default)


def int_argument(call: OpCall, index: int, name: str, default: int) -> int:
    """An integer argument; None counts as not given."""
    value = argument(call, index, name)
    return default if value is None else cast(int, value)


def dim_argument(call: OpCall, index: int, ndim: int, default: int = 0, name: str = "dim") -> int:
    """A dim argument as a position from the front of a tensor with `ndim` dims."""
    return int_argument(call, index, name, default) % max(ndim, 1)


def dims_argument(call: OpCall, index: int, ndim: int, name: str = "dim") -> frozenset[int]:
    """A dims argument, one dim or a list, as positions from the front.

    None and the empty list mean all dims, as in the reductions.
    """
    value = argument(call, index, name)
    if value is None:
        return frozenset(range(ndim))
    if isinstance(value, int):
        return frozenset((value % max(ndim, 1),))
    dims = cast(Sequence[int], value)
    return frozenset(dim % max(ndim, 1) for dim in dims) or frozenset(range(ndim))
