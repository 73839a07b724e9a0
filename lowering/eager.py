"""The eager target: the bound graph's generated code, op by op.

New values of inputs are written into them, only the changed rows where an op writes some rows.
A failing op's exception gets a note that names the node, its module path and its source line. It
is found from the traceback, so a call that does not fail pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from rolemesh.lowering.provenance import add_note
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Example
from rolemesh.lowering.write_back import copy_back, write_in_place

__all__ = ["failed_node", "lower_eager"]


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
    write_in_place(module.graph, signature.mutated)
    kept = copy_back(module.graph, signature.mutated)
    module.recompile()
    forward = module.forward

    def run(*args: torch.Tensor | int) -> tuple[torch.Tensor | None, ...]:
        try:
            with torch.no_grad():
                return signature.all_outputs(kept, forward(*args), args)
        except Exception as error:
            node = failed_node(module, error)
            if node is not None:
                add_note(error, node)
            raise

    return run


def failed_node(module: fx.GraphModule, error: BaseException) -> fx.Node | None:
    """The node whose line of `module`'s generated code raised `error`, if one did."""
    code = module.forward.__code__
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            lines = module.code.split("\n")
            line = lines[trace.tb_lineno - 1] if trace.tb_lineno <= len(lines) else ""
            name = line.strip().partition(" =")[0].partition(":")[0]
            return next((node for node in module.graph.nodes if node.name == name), None)
        trace = trace.tb_next
    return None
