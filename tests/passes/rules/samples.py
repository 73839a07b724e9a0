"""Small sample tensors and calls for tables of ops."""

from __future__ import annotations

import math

import torch

Call = tuple[torch._ops.OpOverload, tuple[object, ...], dict[str, object]]


def f(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) + 0.1


def i(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) % 4


def m(*shape: int) -> torch.Tensor:
    return i(*shape) > 1


def case(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> Call:
    return op, args, kwargs
