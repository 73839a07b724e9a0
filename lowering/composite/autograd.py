"""Gradients of composite ops, as PyTorch's autograd asks for them.

Autograd keeps the arguments of a call, and computes what else its gradient needs anew. An argument
that requires a gradient and has none is refused when the op is called: a model would train without
a sign that part of it does not learn. Graphs that AOTAutograd traces hold the ops that the gradient
is computed with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.composite.op import CompositeOp

__all__ = ["register_gradient"]


_SAVED = object()
"""Stands for a tensor that autograd keeps."""


class _Context(FunctionCtx):
    """What one call keeps for its gradient."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    rest: list[object]


def register_gradient(op: CompositeOp, library: torch.library.Library) -> None:
    """Give autograd the gradient of an op, or its refusal.

    Args:
        op: The op, defined in `library`.
        library: Holds the registration.
    """
    names, gradient = op.arguments, op.gradient

    def setup_context(ctx: _Context, inputs: Sequence[object], output: object) -> None:
        of = () if gradient is None else gradient.of
        for name, needed in zip(names, ctx.needs_input_grad, strict=False):
            if needed and name not in of:
                raise _without_gradient(op, name)
        ctx.rest = [_SAVED if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)])

    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert gradient is not None
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if value is _SAVED else value for value in ctx.rest]
        found = dict(zip(gradient.of, gradient.compute(grads[0], *args), strict=True))
        return tuple(
            found.get(name) if position < len(ctx.needs_input_grad) else None
            for position, name in enumerate(names)
        )

    torch.library.register_autograd(
        f"rolemesh::{op.name}", backward, setup_context=setup_context, lib=library
    )


def _without_gradient(op: CompositeOp, name: str) -> RolemeshError:
    of = "nothing" if op.gradient is None else ", ".join(op.gradient.of)
    return RolemeshError(
        "RM040",
        f"rolemesh::{op.name} has no gradient of its argument {name!r}",
        where="a model that trains with composite ops",
        why=f"{name!r} requires a gradient, and the op can be differentiated by {of}",
        fix="train this part with the library's own implementation (attn_implementation 'sdpa' or "
        "'eager'), or call it under torch.no_grad()",
    )
