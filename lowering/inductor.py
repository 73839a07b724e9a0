"""The inductor target: the bound graph compiled by torch's own compiler, collectives included.

Inductor plans the memory of intermediate values, received weights among them, so graphs are bound
without a pool (it cannot take collectives that write into a given buffer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from rolemesh.lowering.flatten import as_fake, flatten
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example

__all__ = ["lower_inductor"]


def lower_inductor(
    module: fx.GraphModule,
    example_inputs: Sequence[Example],
    signature: Signature,
    options: object = None,
) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """A callable that runs the compiled graph without gradients.

    Args:
        module: A bound graph.
        example_inputs: Local tensors, fake or real, with the shapes to compile for.
        signature: Not used.
        options: There are none.

    Raises:
        ValueError: If the graph was bound with a pool.
    """
    if next(module.buffers(), None) is not None:
        raise ValueError("bind without a pool for the inductor target: it plans memory itself")
    from torch._inductor.compile_fx import compile_fx
    from torch.utils._python_dispatch import _disable_current_modes

    fakes = as_fake(example_inputs)
    flat = flatten(module, fakes)
    with torch.no_grad(), _disable_current_modes():
        compiled: Callable[..., Sequence[torch.Tensor | None]] = compile_fx(flat, fakes)  # type: ignore[assignment]

    def run(*args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            return tuple(compiled(*args))

    return run
