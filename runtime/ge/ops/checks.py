"""What the functions of GE ops demand of attributes, dtypes and axes.

A GE kernel that is given what its definition does not name fails, or computes something else. An op
function here refuses such input with a ValueError, so that a faulty lowering cannot hide behind the
more lenient CPU kernels of torch.
"""

from __future__ import annotations

import torch

from rolemesh.runtime.ge.ops.table import Attributes

__all__ = [
    "ANY",
    "BOOL",
    "COMPLEX",
    "FLOATS",
    "INDICES",
    "INTEGERS",
    "NUMBERS",
    "copied",
    "demand",
    "normal_axis",
    "only",
    "wide",
]

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
COMPLEX = frozenset({torch.complex64, torch.complex128})
INDICES = frozenset({torch.int32, torch.int64})
INTEGERS = INDICES | {
    torch.int8,
    torch.int16,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
}
NUMBERS = FLOATS | COMPLEX | INTEGERS
BOOL = frozenset({torch.bool})
ANY = NUMBERS | BOOL


def demand(a: Attributes, kinds: frozenset[torch.dtype], *tensors: torch.Tensor) -> None:
    """Refuse operands of other dtypes than these.

    Raises:
        ValueError: If a tensor's dtype is none of `kinds`.
    """
    for tensor in tensors:
        if tensor.dtype not in kinds:
            raise ValueError(f"{a.where}: no semantics for operands of {tensor.dtype}")


def only(a: Attributes, **values: bool | int | float | str) -> None:
    """Refuse an attribute whose other values have no semantics here.

    Args:
        a: The op's attributes; an attribute that is missing has its default.
        **values: For each attribute the one value that is known, its default where it has one.

    Raises:
        ValueError: If an attribute has another value.
    """
    for name, known in values.items():
        given: bool | int | float | str
        if isinstance(known, bool):
            given = a.bool(name, known)
        elif isinstance(known, int):
            given = a.int(name, known)
        elif isinstance(known, float):
            given = a.float(name, known)
        else:
            given = a.str(name, known)
        if given != known:
            raise ValueError(f"{a.where}: no semantics for {name}={given!r}, only for {known!r}")


def normal_axis(a: Attributes, axis: int, rank: int) -> int:
    """An axis counted from the first dim.

    Raises:
        ValueError: If there is no such dim. A tensor without dims has axes 0 and -1.
    """
    if not -max(rank, 1) <= axis < max(rank, 1):
        raise ValueError(f"{a.where}: axis {axis} of a tensor with {rank} dims")
    return axis % max(rank, 1)


def wide(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 if it has 16 bits: kernels compute formulas there and round once."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def copied(x: torch.Tensor) -> torch.Tensor:
    """The tensor in new, contiguous memory."""
    return x.clone(memory_format=torch.contiguous_format)
