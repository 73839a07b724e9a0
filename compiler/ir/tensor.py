"""The type of a value: a logical (whole, single-device) shape and a dtype."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

__all__ = ["TensorType", "dtype_name"]

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def dtype_name(dtype: torch.dtype) -> str:
    """Short name as in JAX's jaxprs: `f32`, `bf16`, `i64`, `bool`."""
    return _SHORT.get(dtype) or str(dtype).removeprefix("torch.")


class TensorType(NamedTuple):
    """Logical shape and dtype of one tensor value.

    A NamedTuple because rules are derived from thousands of them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}[{', '.join(map(str, self.shape))}]"
