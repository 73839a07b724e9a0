"""What tests of forms with sizes that depend on data share: values, a trace's ops, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rolemesh.compiler.capture.tracing import Traced, trace
from rolemesh.compiler.ir.errors import RolemeshError

__all__ = ["f", "refuse", "targets"]


def f(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values, the same for one sum of sizes."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def targets(traced: Traced) -> set[object]:
    """The ops of a trace."""
    return {node.target for node in traced.program.ops}


def refuse(function: Callable[..., object], *args: object) -> None:
    """A function runs, and is refused by `trace`, because something depends on data."""
    function(*args)
    with pytest.raises(RolemeshError, match=r"^\[RM011\] .* depends on data"):
        trace(function, *args)
