"""Symbolic sizes on their way into a rank's graph: as nodes, and as `SymInt`s to trace with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from rolemesh.compiler.ir.dims import Dim, replaced
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.lowering.chunks import holds

__all__ = ["Example", "Examples", "SizeNodes"]

_T = TypeVar("_T")

Example = torch.Tensor | torch.SymInt
"""An example input of a rank's graph: a local tensor, or the value of a symbol."""


class SizeNodes:
    """Nodes of one graph that compute sizes, each formula once.

    Args:
        graph: The graph under construction.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._tracer = GraphAppendingTracer(graph)
        self._symbols: dict[sympy.Basic, fx.Proxy] = {}
        self._nodes: dict[sympy.Expr, fx.Node] = {}

    def add_inputs(self, program: Program) -> None:
        """Add the symbols of a Program as integer inputs."""
        if program.scope is not None:
            for symbol in program.scope.hints:
                node = self._graph.placeholder(f"size_{symbol}")
                self._symbols[symbol] = fx.Proxy(node, self._tracer)

    def filled(self, value: _T) -> _T:
        """A structure of arguments with a node in place of every symbolic size."""
        return replaced(value, self._node) if self._symbols else value

    def _node(self, size: Dim) -> fx.Node:
        found = self._nodes.get(size.formula)
        if found is None:
            proxy = sympy_interp(PythonReferenceAnalysis, self._symbols, size.formula)
            found = self._nodes[size.formula] = proxy.node
        return found


class Examples:
    """Example inputs of one rank's graph, to trace it with.

    Where sizes are symbolic they are fake tensors and `SymInt`s of a shape environment of their
    own. Tracing may rely on properties of sizes; `hold` says whether given values have them.

    Args:
        program: A partitioned Program.
        rank: The rank.
        values: Values of the symbols to trace for; those of the traced example by default.

    Attributes:
        inputs: A local tensor per input of the Program, then the value of each symbol.
    """

    def __init__(
        self, program: Program, rank: int, values: Mapping[sympy.Symbol, int] | None = None
    ) -> None:
        self._program = program
        self._rank = rank
        self._shape_env: ShapeEnv | None = None
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.inputs: list[Example] = []
        if program.scope is None:
            self.inputs += self._tensors(lambda size: size)
            return
        self._shape_env = ShapeEnv()
        numbers = self._numbers(self._shape_env, program.hints if values is None else values)

        def size(value: int) -> int:
            if not isinstance(value, Dim):
                return value
            found: int = sympy_interp(PythonReferenceAnalysis, numbers, value.formula)
            return found

        with FakeTensorMode(shape_env=self._shape_env, allow_non_fake_inputs=True):
            self.inputs += self._tensors(size)
        self.inputs += numbers.values()

    def hold(self, values: Mapping[sympy.Symbol, int]) -> bool:
        """Whether a graph traced with these examples is right for these values of the symbols."""
        if self._shape_env is None:
            return True
        known = {self._symbols[symbol]: value for symbol, value in values.items()}
        return all(guard.expr.subs(known) == sympy.true for guard in self._shape_env.guards)

    def _numbers(
        self, shape_env: ShapeEnv, values: Mapping[sympy.Symbol, int]
    ) -> dict[sympy.Basic, torch.SymInt]:
        scope = self._program.scope
        assert scope is not None
        numbers: dict[sympy.Basic, torch.SymInt] = {}
        for symbol in scope.hints:
            hint = values[symbol]
            source = ConstantSource(f"size_{symbol}")
            made = shape_env.create_symbol(hint, source, DimDynamic.DYNAMIC, None, True, True)
            shape_env.var_to_range[made] = scope.ranges[symbol]
            number = shape_env.create_symintnode(made, hint=hint, source=source)
            assert isinstance(number, torch.SymInt)
            numbers[symbol] = number
            self._symbols[symbol] = made
        return numbers

    def _tensors(self, size: Callable[[int], int]) -> Sequence[torch.Tensor]:
        return [self._tensor(node, size) for node in self._program.placeholders]

    def _tensor(self, node: fx.Node, size: Callable[[int], int]) -> torch.Tensor:
        program = self._program
        layout, value = program.layout(node), tensor_type(node)
        if not holds(layout, program.the_mesh, self._rank):
            return torch.empty(0, dtype=value.dtype)
        shape = layout.local_shape(value.shape, program.the_mesh)
        return torch.empty([size(extent) for extent in shape], dtype=value.dtype)
