"""GE's RMS norms and gated activation, by the references of the ops that become them."""

from __future__ import annotations

from torch import Tensor

from rolemesh.lowering.npu import activations, norms
from rolemesh.runtime.ge.ops.table import Attributes, OpTable

__all__ = ["OPS"]

OPS = OpTable()


@OPS.op("RmsNorm", equal=("x", "gamma"))
def rms_norm(a: Attributes, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The norm and its reciprocal root mean square."""
    return norms.rms_norm(x, gamma, a.float("epsilon", 1e-6))


@OPS.op("AddRmsNorm", equal=("x1", "x2", "gamma"))
def add_rms_norm(
    a: Attributes, x1: Tensor, x2: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of a sum, its reciprocal root mean square, and the sum."""
    return norms.add_rms_norm(x1, x2, gamma, a.float("epsilon", 1e-6))


@OPS.op("AddRmsNormCast", equal=("x1", "x2", "gamma"))
def add_rms_norm_cast(
    a: Attributes, x1: Tensor, x2: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm of a sum in fp32 and in the inputs' type, its reciprocal root mean square, the sum.

    torchair makes it of the op before and a cast, in NPU mode.
    """
    y, rstd, x = norms.add_rms_norm(x1, x2, gamma, a.float("epsilon", 1e-6))
    return y.float(), y, rstd, x


@OPS.op("SwiGlu")
def swi_glu(a: Attributes, x: Tensor) -> Tensor:
    """SiLU of the first half of a dim, times its second half."""
    return activations.swiglu(x, a.int("dim", -1))
