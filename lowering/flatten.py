"""A bound graph as flat ATen: the plain functions of mesh ops become the ops they call.

Targets that compile take this form, so that packing and unpacking fuse with what is around them.

Invariant: a flat node has `meta["val"]`, the `meta["origin"]` of the bound node it comes from, and
its name: the last flat node of a bound node has just that name, earlier ones a number after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from rolemesh.lowering.sizes import Example

__all__ = ["Decompositions", "Fake", "as_fake", "fake_mode_of", "flatten"]

Fake = FakeTensor | torch.SymInt
"""An example input without data: a fake tensor, or the value of a symbol."""

Decompositions = Mapping[torch._ops.OpOverload, Callable[..., object]]
"""What to trace in place of an op."""


def as_fake(examples: Sequence[Example], mode: FakeTensorMode | None = None) -> list[Fake]:
    """Fake tensors like the examples; those that are fake already are kept, with their mode.

    Args:
        examples: The examples.
        mode: Of the tensors that are made; by default a new one.
    """
    mode = fake_mode_of(examples) or mode or FakeTensorMode(allow_non_fake_inputs=True)
    return [x if isinstance(x, Fake) else mode.from_tensor(x) for x in examples]


def fake_mode_of(examples: Sequence[Example]) -> FakeTensorMode | None:
    """The mode of the fake tensors among the examples; None if there are none."""
    return next((x.fake_mode for x in examples if isinstance(x, FakeTensor)), None)


def flatten(
    module: fx.GraphModule,
    examples: Sequence[Fake],
    decompositions: Decompositions | None = None,
) -> fx.GraphModule:
    """Trace a bound graph to flat ATen.

    Args:
        module: The bound graph.
        examples: Fake tensors of one mode, one per input, with the shapes to trace for.
        decompositions: What to trace in place of ops.

    Returns:
        A functional graph with the same inputs and outputs, in the same order.
    """
    run = _Located(module).run
    # A caller's dispatch modes, such as AOTAutograd's check of a first call, would see the tracing.
    with torch.no_grad(), _disable_current_modes(), fx_traceback.preserve_node_meta():
        trace = make_fx(run, dict(decompositions or {}))
        with fake_mode_of(examples) or nullcontext():
            flat = trace(*examples)
    flat.graph = _named(flat.graph, [n.name for n in module.graph.find_nodes(op="placeholder")])
    return flat


class _Located(fx.Interpreter):
    """Runs a graph under a tracer that copies annotations, and annotates what each node makes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> object:
        """Run one node."""
        with fx_traceback.annotate({"node": n.name, "origin": n.meta.get("origin")}):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return getattr(self, n.op)(n.target, args, kwargs)


def _named(graph: fx.Graph, inputs: Sequence[str]) -> fx.Graph:
    """The graph with names as the module's docstring says; a new one, which has no other names."""
    names = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    made: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        annotation = node.meta.pop("custom", {})
        if node.op == "call_function" and annotation:
            node.meta["origin"] = annotation["origin"]
            made.setdefault(annotation["node"], []).append(node)
    for name, nodes in made.items():
        names |= {node: f"{name}__{number}" for number, node in enumerate(nodes[:-1], 1)}
        names[nodes[-1]] = name
    named = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
        name = names.get(node, f"_{node.name}")  # out of the way of names to come
        copies[node] = named.create_node(node.op, node.target, args, dict(kwargs), name)
        copies[node].meta = node.meta
    return named
