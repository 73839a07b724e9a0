"""Program: a functional graph with a signature, layouts and a history, as plain data.

Invariants: a Program and its graph are never changed after the pass that made them returns; a
pass returns a new Program, which may share the graph. Node metadata holds only what is bound to
the graph: `meta["type"]` (a `TensorType`, or a tuple of them for an op with several results, with
LOGICAL shapes) and `meta["origin"]`. Layouts live in `Program.layouts` and nowhere else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import sympy
import torch
from torch import fx

from rolemesh.compiler.ir.dims import Dim, Scope, evaluator, replaced
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.nodes import copy_node
from rolemesh.compiler.ir.rule import Choice, OpCall, Rule
from rolemesh.compiler.ir.tensor import TensorType

__all__ = [
    "Alternative",
    "Decision",
    "Input",
    "InputKind",
    "Origin",
    "Output",
    "Program",
    "operand_nodes",
    "origin",
    "tensor_type",
    "tensor_types",
]


class InputKind(enum.Enum):
    """What an input of a Program is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    USER = "user"
    CONSTANT = "constant"
    TANGENT = "tangent"
    """The gradient of a result of the model, where a joint Program starts its backward part."""
    SAVED = "saved"
    """What a forward Program leaves to the backward one."""


@dataclass(frozen=True)
class Input:
    """One input, aligned with a placeholder of the graph.

    Attributes:
        name: Fully qualified name of a parameter or buffer; the access path of a user input, for
            example `past_key_values.layers[0].keys`.
        kind: What it is.
        mutated: Whether the program gives it a new value.
    """

    name: str
    kind: InputKind
    mutated: bool = False

    @property
    def is_state(self) -> bool:
        """Whether it is stored between calls: a weight, or a tensor the program updates."""
        return self.mutated or self.kind in (InputKind.PARAMETER, InputKind.BUFFER)


@dataclass(frozen=True)
class Output:
    """One output, aligned with the graph's output values.

    Attributes:
        mutates: Index of the input whose new value this is; None for a result of the model.
        gradient_of: Index of the input whose gradient this is; None for what the model gives.
    """

    mutates: int | None = None
    gradient_of: int | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from.

    Attributes:
        module: Module path, for example `model.layers.0.self_attn`; empty if unknown.
        source: `file.py:line` of the model's code; empty if unknown.
        reason: Why a pass inserted the node; empty for nodes of the captured model.
        value: Name of the value that an inserted node brings elsewhere, in the decided Program.
        user: Name of the op it is brought there for, in the decided Program.
    """

    module: str = ""
    source: str = ""
    reason: str = ""
    value: str = ""
    user: str = ""


class Alternative(NamedTuple):
    """A choice that propagation priced for one op and mesh axis.

    Attributes:
        choice: The choice.
        price: What it costs in all: bytes received, and work as bytes; see `passes.cost`.
        moved: What bringing the operands there costs.
        follows: What suggested it: `operand 0`, `tokens`, `result` (its layout is given); empty for
            a choice that is always there.
    """

    choice: Choice
    price: float
    moved: float
    follows: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What propagation decided for one op.

    Attributes:
        call: The op's call; ops with equal calls share it.
        rule: The op's sharding rule.
        choices: One choice per mesh axis.
        reasons: One reason per mesh axis, for people.
        alternatives: Per mesh axis, all choices that were priced, the cheapest first; empty where
            there was nothing to choose.
    """

    call: OpCall
    rule: Rule
    choices: tuple[Choice, ...]
    reasons: tuple[str, ...]
    alternatives: tuple[tuple[Alternative, ...], ...] = ()


@dataclass(frozen=True)
class Program:
    """A graph of ATen ops (and, after partitioning, mesh ops) with everything known about it.

    Attributes:
        name: For people, for example `pd_mixed.decode`.
        graph: The functional graph. Its output is a flat tuple.
        inputs: One entry per placeholder.
        outputs: One entry per output value.
        phase: Phase it belongs to, for example `decode`; empty before sharding.
        mesh: The mesh it is sharded for; None before sharding.
        layouts: Layouts of each value, one per result; empty before seeding.
        decisions: What propagation decided, by op; empty before it and after partitioning.
        seeds: Why inputs lie as they do; empty before seeding and after partitioning.
        pinned: Layouts that outputs must have, by output index.
        history: Names of the passes that made it, in order.
        scope: The symbols of its sizes; None if all sizes are plain integers.
    """

    name: str
    graph: fx.Graph
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    phase: str = ""
    mesh: Mesh | None = None
    layouts: Mapping[fx.Node, tuple[Layout, ...]] = field(default_factory=dict)
    decisions: Mapping[fx.Node, Decision] = field(default_factory=dict)
    seeds: Mapping[fx.Node, str] = field(default_factory=dict)
    pinned: Mapping[int, Layout] = field(default_factory=dict)
    history: tuple[str, ...] = ()
    scope: Scope | None = None

    @cached_property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in order."""
        return self.graph.find_nodes(op="placeholder")

    @property
    def results(self) -> tuple[object, ...]:
        """The graph's output values: nodes, or constants such as None."""
        values = self.graph.output_node().args[0]
        assert isinstance(values, tuple | list)
        return tuple(values)

    @property
    def ops(self) -> Iterator[fx.Node]:
        """Nodes that compute something, in order."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    @property
    def is_joint(self) -> bool:
        """Whether it computes gradients."""
        return any(output.gradient_of is not None for output in self.outputs)

    @property
    def the_mesh(self) -> Mesh:
        """The mesh of a sharded Program."""
        if self.mesh is None:
            raise ValueError(f"program {self.name} is not sharded yet")
        return self.mesh

    def layout(self, node: fx.Node) -> Layout:
        """The layout of a single-result node."""
        return self.layouts[node][0]

    def output_layout(self, index: int) -> Layout:
        """The layout that an output must have: its input's, a pinned one, or whole."""
        output = self.outputs[index]
        target = output.mutates if output.gradient_of is None else output.gradient_of
        if target is not None:
            return self.layout(self.placeholders[target])
        return self.pinned.get(index, Layout.replicated(self.the_mesh))

    def after(self, pass_name: str, **changes: object) -> Program:
        """A copy with `changes`, and `pass_name` added to the history."""
        return replace(self, history=(*self.history, pass_name), **changes)  # type: ignore[arg-type]

    def values(self, inputs: Sequence[torch.Tensor]) -> dict[sympy.Symbol, int]:
        """The values of the symbols of its sizes for one run.

        Args:
            inputs: Its inputs, of logical shapes; a tensor without storage will do for its shape.
        """
        return {} if self.scope is None else self.scope.values(inputs)

    @property
    def hints(self) -> Mapping[sympy.Symbol, int]:
        """The values of the symbols of its sizes in the traced example."""
        return {} if self.scope is None else self.scope.hints

    def fits(self, values: Mapping[sympy.Symbol, int]) -> bool:
        """Whether everything that its passes assumed of its sizes is true of these values."""
        return self.scope is None or self.scope.holds(values)

    def at(self, values: Mapping[sympy.Symbol, int]) -> Program:
        """The same Program with plain sizes, for these values of its symbols.

        Decisions of propagation and reasons of seeds are left out: they belong to the symbolic one.
        """
        if self.scope is None:
            return self
        evaluate = evaluator(values)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copy = copies[node] = copy_node(graph, node, copies.__getitem__)
            copy.args = replaced(copy.args, evaluate)
            copy.kwargs = replaced(dict(copy.kwargs), evaluate)
            if "type" in copy.meta:
                copy.meta["type"] = replaced(copy.meta["type"], evaluate)
        layouts = {
            copies[node]: tuple(_layout(layout, evaluate) for layout in found)
            for node, found in self.layouts.items()
        }
        pinned = {i: _layout(p, evaluate) for i, p in self.pinned.items()}
        return replace(
            self,
            graph=graph,
            layouts=layouts,
            decisions={},
            seeds={},
            pinned=pinned,
            scope=None,
        )

    def __str__(self) -> str:
        from rolemesh.compiler.ir.text import program_text

        return program_text(self)


def _layout(layout: Layout, evaluate: Callable[[Dim], int]) -> Layout:
    return Layout(replaced(layout.placements, evaluate))


def tensor_types(node: fx.Node) -> tuple[TensorType, ...]:
    """Types of a node's results; empty for a node that yields no tensor."""
    value = node.meta.get("type")
    if value is None:
        return ()
    return (value,) if isinstance(value, TensorType) else value


def tensor_type(node: fx.Node) -> TensorType:
    """Type of a single-result node."""
    value = node.meta["type"]
    assert isinstance(value, TensorType), node
    return value


def origin(node: fx.Node) -> Origin:
    """Where a node comes from."""
    found = node.meta.get("origin")
    return found if isinstance(found, Origin) else Origin()


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """Tensor operands in argument order, lists flattened, repeats kept."""
    found: list[fx.Node] = []
    for arg in (*node.args, *node.kwargs.values()):
        if isinstance(arg, fx.Node):
            if isinstance(arg.meta.get("type"), TensorType):
                found.append(arg)
        elif isinstance(arg, list | tuple):
            found.extend(
                item
                for item in arg
                if isinstance(item, fx.Node) and isinstance(item.meta.get("type"), TensorType)
            )
    return found
