"""Runs a fused op on real tensors and on tensors without data, and compares the results' types."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["DTYPES", "TOLERANCE", "checked", "f", "near"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative: one or two roundings of a result that was computed in float32."""


def f(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def checked(op: Callable[..., object], *args: object, **kwargs: object) -> tuple[Tensor, ...]:
    """Results of an op, after a check that a run without data gives the same types."""
    meta_args, meta_kwargs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
    without = _tensors(op(*meta_args, **meta_kwargs))
    found = _tensors(op(*args, **kwargs))
    kinds = [(x.shape, x.dtype, x.stride()) for x in without]
    assert kinds == [(x.shape, x.dtype, x.stride()) for x in found]
    return tuple(found)


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def near(found: Tensor, expected: Tensor) -> None:
    """Compare with an expectation in float32, by the tolerance of what was found."""
    bound = TOLERANCE[found.dtype]
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=bound, atol=bound, equal_nan=True
    )
