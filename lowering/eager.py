"""The eager target: the bound graph, op by op, in code of its own (`rolemesh.lowering.code`).

New values of inputs are written into them, only the changed rows where an op writes some rows.
A failing op's exception gets a note that names the node, its module path and its source line. It
is found from the traceback, so a call that does not fail pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from rolemesh.lowering.code import graph_code
from rolemesh.lowering.provenance import add_note
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example
from rolemesh.lowering.write_back import copy_back, write_in_place
from rolemesh.passes.base import collection_paused

__all__ = ["lower_eager"]


def lower_eager(
    module: fx.GraphModule,
    example_inputs: Sequence[Example],
    signature: Signature,
    options: object = None,
) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """A callable that runs `module` without gradients.

    Args:
        module: A bound graph.
        example_inputs: Not used; other targets compile for their shapes.
        signature: Says which inputs the graph updates.
        options: There are none.
    """
    with collection_paused():
        write_in_place(module.graph, signature.mutated)
        kept = copy_back(module.graph, signature.mutated)
        code = graph_code(module, signature.name)
    module.recompile()
    forward = code.forward

    def run(*args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
        try:
            # Below autograd, so that composite ops run without their gradients' Python code.
            with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
                return signature.all_outputs(kept, forward(*args), args)
        except Exception as error:
            node = code.failed_node(error)
            if node is not None:
                add_note(error, node)
            raise

    return run
