"""What the executor checks while it runs, and the errors that it raises.

A graph is not to blame for its inputs (RM029), nor for an op that fails (RM031); everything else
that does not fit is a malformed graph (RM027).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.ge.binding import Binding
from rolemesh.runtime.ge.graph import Graph, Node, dtype_name, malformed

__all__ = [
    "as_described",
    "check_assigned",
    "check_count",
    "check_result",
    "failed",
    "op_fault",
    "shares_memory",
    "unequal",
    "unlike",
]


def check_count(graph: Graph, inputs: Sequence[object], assigned: Sequence[object]) -> None:
    """Refuse another number of tensors than the graph takes.

    Raises:
        RolemeshError: RM029.
    """
    results = len(graph.net_output.inputs)
    if len(inputs) != len(graph.data):
        raise _refused(
            f"a GE graph got {len(inputs)} inputs instead of {len(graph.data)}",
            f"graph {graph.name!r}",
            "its Data ops are "
            + (", ".join(f"{i} {node.name!r}" for i, node in enumerate(graph.data)) or "none"),
        )
    if len(assigned) not in (0, results):
        raise _refused(
            f"a GE graph got {len(assigned)} tensors to put results in instead of {results}",
            f"graph {graph.name!r}",
            "there is one for each result, or None, or none at all",
        )


def as_described(graph: Graph, index: int, tensor: torch.Tensor) -> torch.Tensor:
    """An input as its Data op describes it: a scalar may come as a tensor of one element.

    Raises:
        RolemeshError: RM029 if it has another data type or shape, or is not contiguous.
    """
    node = graph.data[index]
    (desc,) = node.outputs
    if desc.shape == () and tensor.shape == (1,):
        tensor = tensor.reshape(())
    if not desc.admits(tensor) or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
        raise _refused(
            f"input {index} is {_said(tensor)}{layout}",
            f"{node.type} {node.name!r} of graph {graph.name!r}",
            f"it takes {desc}, contiguous",
        )
    return tensor


def check_assigned(graph: Graph, index: int, target: torch.Tensor, result: torch.Tensor) -> None:
    """Refuse a tensor that cannot take a result.

    Raises:
        RolemeshError: RM029.
    """
    if target.dtype != result.dtype or target.shape != result.shape:
        raise _refused(
            f"result {index} cannot be put in {_said(target)}",
            f"graph {graph.name!r}",
            f"it is {_said(result)}",
        )


def check_result(graph: Graph, index: int, result: torch.Tensor) -> None:
    """Refuse a result of the graph that NetOutput does not describe.

    Raises:
        RolemeshError: RM027.
    """
    desc = graph.net_output.input_descs[index]
    if not desc.admits(result):
        edge = graph.net_output.inputs[index]
        assert edge is not None
        raise malformed(
            f"result {index} is {_said(result)}",
            f"{graph.describe(graph.nodes[edge.producer])}, output {edge.output}",
            f"NetOutput {graph.net_output.name!r} describes it as {desc}",
        )


def unequal(graph: Graph, binding: Binding, dtypes: Sequence[torch.dtype]) -> RolemeshError:
    """RM027 for inputs whose data types differ where GE wants them equal."""
    node = binding.node
    names = {edge: desc.name for edge, desc in zip(node.inputs, node.input_descs, strict=True)}
    edges = binding.edges(*binding.op.equal)
    said = (f"{names[e]} is {dtype_name(dtype)}" for e, dtype in zip(edges, dtypes, strict=True))
    return malformed(
        "inputs of an op have different data types",
        graph.describe(node),
        f"{', '.join(said)}; GE promotes no types",
    )


def unlike(graph: Graph, node: Node, index: int, result: torch.Tensor) -> RolemeshError:
    """RM027 for a result with another data type or size than the fx node's value."""
    desc = node.outputs[index]
    size = "" if desc.numel is None else f" with {desc.numel} elements"
    return malformed(
        f"output {index} is {_said(result)}",
        graph.describe(node),
        f"the fx node's value is {dtype_name(desc.dtype)}{size}",
    )


def failed(
    graph: Graph, binding: Binding, arguments: Sequence[object], error: Exception
) -> RolemeshError:
    """RM031 for an op whose function raised `error`."""
    given = {
        f"{name}{index if len(_flat(argument)) > 1 else ''}": tensor
        for name, argument in zip(binding.names, arguments, strict=True)
        for index, tensor in enumerate(_flat(argument))
    }
    said = ", ".join(f"{name} {_said(tensor)}" for name, tensor in given.items())
    return RolemeshError(
        "RM031",
        what=f"{type(error).__name__}: {error}",
        where=graph.describe(binding.node),
        why=f"its inputs are {said}" if said else "it has no inputs",
        fix="the op's inputs or attributes are wrong, or its semantics in rolemesh.runtime.ge.ops",
    )


def op_fault(graph: Graph, node: Node, what: str) -> RolemeshError:
    """RM031 for an op whose function does not keep the promises of `runtime.ge.ops.table`."""
    return RolemeshError(
        "RM031",
        what=what,
        where=graph.describe(node),
        why="the form of an op's function is described in rolemesh.runtime.ge.ops.table",
        fix=f"correct the semantics of {node.type}",
    )


def shares_memory(result: torch.Tensor, arguments: Sequence[object]) -> bool:
    """Whether a tensor lies in the memory of an argument."""
    memory = result.untyped_storage().data_ptr()
    given = (x for argument in arguments for x in _flat(argument))
    return memory != 0 and any(x.untyped_storage().data_ptr() == memory for x in given)


def _flat(argument: object) -> list[torch.Tensor]:
    items = argument if isinstance(argument, list) else [argument]
    return [item for item in items if isinstance(item, torch.Tensor)]


def _said(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"


def _refused(what: str, where: str, why: str) -> RolemeshError:
    return RolemeshError(
        "RM029", what=what, where=where, why=why, fix="convert the program again for these inputs"
    )
