"""Small Programs for tests, built op by op, with the types that the ops give on meta tensors."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tests.layouts import pad_masks
from torch import fx

from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.ledger import collectives
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import Placement
from rolemesh.compiler.ir.program import Input, InputKind, Origin, Output, Program
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering.chunks import scatter
from rolemesh.passes.base import Pass
from rolemesh.passes.partition import Partition
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.verify import Verify
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs

__all__ = [
    "Builder",
    "check_values",
    "decide",
    "node_named",
    "ops_of",
    "partition",
    "traffic",
    "with_layout",
]

Spec = Layout | P | Placement


class Builder:
    """Builds one Program.

    Args:
        axes: Its mesh; `tp=2` if left out.
    """

    def __init__(self, **axes: int) -> None:
        self.mesh = Mesh(axes or {"tp": 2})
        self.graph = fx.Graph()
        self.inputs: list[Input] = []
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        self.module = ""

    def input(
        self,
        name: str,
        shape: Sequence[int],
        spec: Spec | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        kind: InputKind = InputKind.USER,
        mutated: bool = False,
    ) -> fx.Node:
        """A placeholder in a layout: a `P`, a `Layout`, or the placement on the only axis."""
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        with self.graph.inserting_after(last) if last else self.graph.inserting_before(None):
            node = self.graph.placeholder(name.replace(".", "_"))
        node.meta["type"] = TensorType(tuple(shape), dtype)
        self.inputs.append(Input(name, kind, mutated))
        self.layouts[node] = (self._layout(spec, shape),)
        return node

    def weight(self, name: str, shape: Sequence[int], spec: Spec | None = None) -> fx.Node:
        """A parameter."""
        return self.input(name, shape, spec, kind=InputKind.PARAMETER)

    def op(self, target: Callable[..., object], *args: Any, **kwargs: Any) -> Any:
        """A call; the node, or the tuple of its results if it has several."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["origin"] = Origin(module=self.module, source="model.py:1")
        values = fx.map_arg((args, kwargs), _meta)
        found = target(*values[0], **values[1])
        if isinstance(found, torch.Tensor):
            node.meta["type"] = _type(found)
            return node
        assert isinstance(found, tuple | list)
        node.meta["type"] = tuple(_type(value) for value in found)
        picks = []
        for position, value in enumerate(found):
            pick = self.graph.call_function(operator.getitem, (node, position))
            pick.meta["type"] = _type(value)
            picks.append(pick)
        return tuple(picks)

    def program(
        self,
        *results: fx.Node,
        mutates: Mapping[int, str] | None = None,
        pinned: Mapping[int, Spec] | None = None,
        name: str = "test",
    ) -> Program:
        """The Program that returns `results`.

        Args:
            results: Its outputs.
            mutates: The input whose new value an output is, by output.
            pinned: Layouts that outputs must have, by output.
            name: Its name.
        """
        self.graph.output(results)
        names = [entry.name for entry in self.inputs]
        outputs = tuple(
            Output(names.index(mutates[i]) if mutates and i in mutates else None)
            for i in range(len(results))
        )
        shapes = [result.meta["type"].shape for result in results]
        return Program(
            name,
            self.graph,
            tuple(self.inputs),
            outputs,
            mesh=self.mesh,
            layouts=self.layouts,
            pinned={i: self._layout(spec, shapes[i]) for i, spec in (pinned or {}).items()},
        )

    def _layout(self, spec: Spec | None, shape: Sequence[int]) -> Layout:
        if spec is None:
            return Layout.replicated(self.mesh)
        if isinstance(spec, Layout):
            return spec
        return spec.layout(shape, self.mesh) if isinstance(spec, P) else Layout((spec,))


def _meta(node: fx.Node) -> object:
    value = node.meta["type"]
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _type(value: torch.Tensor) -> TensorType:
    return TensorType(tuple(value.shape), value.dtype)


def decide(program: Program) -> Program:
    """Propagate and push back."""
    return PushBack().apply(Propagate().apply(program))


def partition(program: Program) -> Program:
    """All passes from propagation to verification."""
    return Verify().apply(Partition().apply(decide(program)))


def ops_of(program: Program) -> str:
    """Names of the mesh ops, in order, separated by spaces."""
    return " ".join(node.target.name for node in program.ops if isinstance(node.target, MeshOp))


def traffic(program: Program) -> Counter[str]:
    """How many collectives of each kind there are."""
    return Counter(entry.op for entry in collectives(program))


def node_named(program: Program, name: str) -> fx.Node:
    """The node with a name."""
    return next(node for node in program.graph.nodes if node.name == name)


def with_layout(program: Program, name: str, *placements: Placement) -> Program:
    """The program with another layout of one node."""
    layouts = {**program.layouts, node_named(program, name): (Layout(placements),)}
    return program.after("mutate", layouts=layouts)


def check_values(program: Program, *passes: Pass) -> Program:
    """Partition a Program; every rank must give what the ops give on whole tensors.

    Args:
        program: The Program.
        passes: Passes to run after it, each of which must leave a Program that `verify` accepts.
    """
    partitioned = partition(program)
    for step in passes:
        partitioned = step.apply(partitioned)
        Verify().apply(partitioned)
    torch.manual_seed(0)
    tensors = []
    for node in program.placeholders:
        value = node.meta["type"]
        low, high = (-3, 4) if value.dtype.is_floating_point else (0, 2)
        tensors.append(torch.randint(low, high, value.shape).to(value.dtype))
    module = fx.GraphModule(torch.nn.Module(), program.graph)
    expected = module(*tensors)
    inputs = scatter_inputs(partitioned, tensors, poison=True)
    outputs = run_lockstep(partitioned, inputs, poison=True, check=True)
    for index, want in enumerate(expected):
        wants = scatter(want, partitioned.output_layout(index), program.the_mesh)
        masks = pad_masks(want.shape, partitioned.output_layout(index), program.the_mesh)
        for mask, expect, have in zip(masks, wants, outputs[index], strict=True):
            assert have is not None
            torch.testing.assert_close(have[mask], expect[mask])
    return partitioned
