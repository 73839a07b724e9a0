"""`constrain`: say in a model's code how a value must lie on the mesh.

In eager PyTorch it does nothing. In a captured graph it is a node of its own, which the seed pass
reads (`rolemesh.passes.constraints`) and drops. The gradient of the value is constrained alike.

Importing this module registers the op `rolemesh::constrain` with PyTorch: an op must exist before
code that calls it is compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rolemesh.compiler.ir.spec import P
from rolemesh.passes.constraints import CONSTRAIN, constraint_of, spec_text

__all__ = ["constrain", "constraint_of"]


@torch.library.custom_op(CONSTRAIN, mutates_args=())
def _constrain(x: Tensor, spec: str) -> Tensor:
    # A custom op may not return the memory of an argument.
    return x.clone()


@_constrain.register_fake
def _(x: Tensor, spec: str) -> Tensor:
    return torch.empty_like(x)


def _keep_spec(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.spec = inputs[1]


def _constrain_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.rolemesh.constrain(gradient, ctx.spec), None


_constrain.register_autograd(_constrain_gradient, setup_context=_keep_spec)


def constrain(x: Tensor, spec: P) -> Tensor:
    """Fix the layout of `x` in the sharded program.

    Args:
        x: Any tensor of the model.
        spec: One entry per dim: None or mesh axes. `P("tp", None)` shards dim 0 over `tp`.

    Returns:
        The value of `x`: `x` itself in eager PyTorch. Use it in place of `x`; a constraint whose
        result is not used does nothing.

    Example:
        >>> hidden = constrain(hidden, P(None, "tp", None))  # tokens over tp
    """
    if not torch.compiler.is_compiling():
        return x
    return torch.ops.rolemesh.constrain(x, spec_text(spec))
