"""The inductor target: the bound graph compiled by torch's own compiler, collectives included.

Inductor plans the memory of intermediate values, received weights among them, so graphs are bound
without a pool (it cannot take collectives that write into a given buffer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

__all__ = ["lower_inductor"]


def lower_inductor(
    module: fx.GraphModule, example_inputs: Sequence[torch.Tensor]
) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """A callable that runs the compiled graph without gradients.

    The graph is traced to flat ATen first, so that packing and unpacking fuse with what is around
    them.

    Args:
        module: A bound graph.
        example_inputs: Local tensors, fake or real, with the shapes to compile for.

    Raises:
        ValueError: If the graph was bound with a pool.
    """
    if next(module.buffers(), None) is not None:
        raise ValueError("bind without a pool for the inductor target: it plans memory itself")
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    mode = next((x.fake_mode for x in example_inputs if isinstance(x, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [x if isinstance(x, FakeTensor) else mode.from_tensor(x) for x in example_inputs]
    # A caller's dispatch modes, such as AOTAutograd's check of a first call, would see the tracing.
    with torch.no_grad(), _disable_current_modes():
        with mode:
            flat = make_fx(module)(*fakes)
        compiled: Callable[..., Sequence[torch.Tensor | None]] = compile_fx(flat, fakes)  # type: ignore[assignment]

    def run(*args: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            return tuple(compiled(*args))

    return run
