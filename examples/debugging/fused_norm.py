"""The case that docs/debugging.md debugs: a fused norm whose sharding rule is wrong.

The model is OLMo-2, which normalises all query heads together. Its norm is replaced by a custom op,
as one does to call a kernel, and the op's rule says that every dim may be split. The dim that is
normalised may not: each rank would divide by the mean of its own part.

    rolemesh check examples/debugging/fused_norm.py:case --role decode --mesh tp=2
"""

import torch

import rolemesh
from rolemesh.compiler.models.cases import load_case

SPEC = "... d, d -> ... d"  # wrong; right is "... d!, d! -> ... d!": d must be whole


@torch.library.custom_op("kernels::rms_norm", mutates_args=())
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm of the last dim, in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@rms_norm.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.empty_like(x)


rolemesh.register_rule("kernels::rms_norm", SPEC)


class FusedNorm(torch.nn.Module):
    """A drop-in for the model's norm."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x, of shape `[..., d]`."""
        return torch.ops.kernels.rms_norm(x, self.weight, self.eps)


def case(tokens: int, batch: int) -> rolemesh.Case:
    """A tiny OLMo-2 with fused norms."""
    made = load_case("hf:olmo2", tokens=tokens, batch=batch, layers=2)
    for name, module in list(made.model.named_modules()):
        if "RMSNorm" in type(module).__name__:
            made.model.set_submodule(name, FusedNorm(module))
    return made
