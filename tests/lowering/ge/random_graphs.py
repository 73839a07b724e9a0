"""Random FX graphs over the ops that models use, with the inputs to run them on.

A graph is grown op by op on real tensors, so every op sees arguments that are valid for it. Two
properties keep "equal within tolerance" meaningful:

* a value stays finite and small, else the op that made it is dropped;
* rounding never decides which element an op takes (`random_ops`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tests.lowering.ge.random_ops import OPS, SIZES, Call, Draw, NotNowError, Value
from torch import Tensor, fx

__all__ = ["Grown", "grow"]

FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
LIMIT = 300.0


@dataclass(frozen=True)
class Grown:
    """A random graph.

    Attributes:
        module: The graph; it returns a tuple of tensors.
        inputs: What it runs on. Some are not contiguous.
        ops: Names of its ops, in order.
    """

    module: fx.GraphModule
    inputs: tuple[Tensor, ...]
    ops: tuple[str, ...]


def grow(seed: int, ops: int = 10) -> Grown:
    """A random graph of about `ops` ops.

    Args:
        seed: Decides everything.
        ops: How many ops to try for.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    graph = fx.Graph()
    inputs, values = _inputs(rng, graph)
    names: list[str] = []
    for _ in range(4 * ops):
        if len(names) == ops:
            break
        name = rng.choice(list(OPS))
        try:
            call = OPS[name](Draw(rng, values))
            made = _apply(graph, call, inputs)
        except (NotNowError, RuntimeError, IndexError):
            continue  # no value fits, or torch refuses the arguments
        if made:
            names.append(name)
            values.extend(made)
    used = {operand for node in graph.nodes for operand in node.all_input_nodes}
    ends = [value for value in values if value.node not in used and value.node.op != "placeholder"]
    graph.output(tuple(value.node for value in ends))
    for node in reversed(graph.find_nodes(op="placeholder")):
        if not node.users and len(inputs) > 1:
            inputs.pop(node)
            graph.erase_node(node)
    return Grown(fx.GraphModule(torch.nn.Module(), graph), tuple(inputs.values()), tuple(names))


def _inputs(rng: random.Random, graph: fx.Graph) -> tuple[dict[fx.Node, Tensor], list[Value]]:
    inputs: dict[fx.Node, Tensor] = {}
    values: list[Value] = []
    sizes = [rng.choice(SIZES) for _ in range(3)]
    for _ in range(rng.randrange(2, 5)):
        shape = [rng.choice(sizes) for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))]
        kind = rng.random()
        if kind < 0.75:
            tensor = torch.randn(shape).to(rng.choice(FLOATS))
        elif kind < 0.9:
            tensor = torch.randint(-9, 9, shape, dtype=rng.choice((torch.int64, torch.int32)))
        else:
            tensor = torch.rand(shape) < 0.5
        if len(shape) > 1 and rng.random() < 0.3:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        node = graph.placeholder(f"x{len(inputs)}")
        inputs[node] = tensor
        values.append(Value(node, tensor, exact=True))
    return inputs, values


def _apply(graph: fx.Graph, call: Call, inputs: dict[fx.Node, Tensor]) -> list[Value]:
    """Add a call and run it; nothing is added if a result is not finite, empty or large."""
    constants: list[Tensor] = []

    def real(argument: object) -> object:
        if isinstance(argument, Value):
            return argument.tensor
        return [real(item) for item in argument] if isinstance(argument, list) else argument

    def symbolic(argument: object) -> object:
        if isinstance(argument, Value):
            return argument.node
        if isinstance(argument, Tensor):
            first = next(iter(inputs))
            with graph.inserting_before(first):
                node = graph.placeholder(f"c{len(inputs)}")
            constants.append(argument)
            inputs.update({node: argument, **{k: inputs.pop(k) for k in list(inputs)}})
            return node
        return [symbolic(item) for item in argument] if isinstance(argument, list) else argument

    result = call.target(*(real(a) for a in call.args), **call.kwargs)
    found = [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]
    if not all(_tame(tensor) for tensor in found):
        return []
    node = graph.call_function(call.target, tuple(symbolic(a) for a in call.args), call.kwargs)  # type: ignore[arg-type]
    if isinstance(result, Tensor):
        return [Value(node, result, call.exact)]
    first = graph.call_function(_getitem, (node, 0))
    made = [Value(first, found[0], call.exact)]
    if call.exact:  # values and indices
        made.append(Value(graph.call_function(_getitem, (node, 1)), found[1], exact=True))
    return made


def _getitem(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


def _tame(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.numel() > 4000 or tensor.ndim > 6:
        return False
    if tensor.dtype is torch.bool:
        return True
    return bool(torch.isfinite(tensor).all()) and float(tensor.abs().max()) <= LIMIT
