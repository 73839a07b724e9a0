"""Decompositions of functional collectives that torchair has no form of.

Invariant: all ranks of a group decompose a collective into the same ones in the same order.
"""

# ruff: noqa: A002 - arguments are called what the schemas of the ops call them

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, NotImplementedType

import torch
from torch import Tensor
from torch._ops import OpOverload

__all__ = ["COLLECTIVES"]

c10d = torch.ops._c10d_functional


def _all_reduce(input: Tensor, reduce_op: str, group_name: str) -> Tensor | NotImplementedType:
    if reduce_op.lower() != "avg":
        return NotImplemented
    from torch.distributed.distributed_c10d import GroupName, _get_group_size_by_name

    total = c10d.wait_tensor(c10d.all_reduce(input, "sum", group_name))
    return total / _get_group_size_by_name(GroupName(group_name))


def _reduce_scatter(
    input: Tensor, reduce_op: str, group_size: int, group_name: str
) -> Tensor | NotImplementedType:
    if reduce_op.lower() != "avg":
        return NotImplemented
    part = c10d.reduce_scatter_tensor(input, "sum", group_size, group_name)
    return c10d.wait_tensor(part) / group_size


def _all_reduce_each(inputs: Sequence[Tensor], reduce_op: str, group_name: str) -> list[Tensor]:
    return [c10d.all_reduce(part, reduce_op, group_name) for part in inputs]


def _reduce_scatter_each(
    inputs: Sequence[Tensor], reduce_op: str, group_size: int, group_name: str
) -> list[Tensor]:
    return [c10d.reduce_scatter_tensor(part, reduce_op, group_size, group_name) for part in inputs]


def _all_gather_each(inputs: Sequence[Tensor], group_size: int, group_name: str) -> list[Tensor]:
    return [c10d.all_gather_into_tensor(part, group_size, group_name) for part in inputs]


COLLECTIVES: Mapping[OpOverload, Callable[..., object]] = MappingProxyType(
    {
        c10d.all_reduce.default: _all_reduce,
        c10d.reduce_scatter_tensor.default: _reduce_scatter,
        c10d.all_reduce_coalesced.default: _all_reduce_each,
        c10d.reduce_scatter_tensor_coalesced.default: _reduce_scatter_each,
        c10d.all_gather_into_tensor_coalesced.default: _all_gather_each,
    }
)
"""Collective -> its decomposition, or NotImplemented where torchair has the form."""
