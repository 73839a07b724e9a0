"""A random Program as plain data: inputs, op calls, outputs, a mesh, layouts, symbols of sizes.

Invariants: a step refers to earlier steps only; every symbolic size of a case is of its scope;
calls hold no tensors, so that a case can be run at any values of its symbols, edited, and written
to a file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from rolemesh.compiler.ir.dims import Dim, Scope, concrete
from rolemesh.compiler.ir.dims import replaced as with_sizes
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Input, InputKind, Output, Program
from rolemesh.compiler.ir.tensor import TensorType

__all__ = [
    "Call",
    "Case",
    "Fill",
    "Leaf",
    "Ref",
    "Result",
    "UnfitValuesError",
    "Values",
    "in_scope",
    "listing",
    "live",
    "program_of",
    "refs_in",
    "replaced",
    "run_whole",
    "sized",
]

Values = Mapping[sympy.Symbol, int]


@dataclass(frozen=True, order=True)
class Ref:
    """A result of an earlier step."""

    step: int
    result: int = 0


@dataclass(frozen=True)
class Fill:
    """Where the values of an input come from, at any size.

    Attributes:
        seed: Of the random numbers.
        low: Smallest value.
        high: One above the largest value.
        kind: `range` for independent values, `places` for distinct ones below `high`, `ends` for
            sorted ones up to `high`, the last of which is `high`.
    """

    seed: int
    low: int
    high: int
    kind: str = "range"

    def tensor(self, value: TensorType, values: Values) -> torch.Tensor:
        """The input at given values of the symbols."""
        shape, high = concrete((tuple(value.shape), self.high), values)
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "places":
            found = torch.randperm(high, generator=generator)[: shape[0]]
        elif self.kind == "ends":
            found = torch.randint(self.low, high + 1, shape, generator=generator).sort().values
            found[-1] = high
        else:
            found = torch.randint(self.low, high, shape, generator=generator)
        return found.to(value.dtype)


@dataclass(frozen=True)
class Leaf:
    """An input."""

    type: TensorType
    fill: Fill
    layout: Layout
    mutated: bool = False
    kind: InputKind = InputKind.USER

    @property
    def types(self) -> tuple[TensorType, ...]:
        return (self.type,)


@dataclass(frozen=True)
class Call:
    """One op call; `args` holds a `Ref` for each tensor."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    types: tuple[TensorType, ...]

    @property
    def refs(self) -> list[Ref]:
        """The values that it reads."""
        return list(refs_in([self.args, self.kwargs]))


@dataclass(frozen=True)
class Result:
    """An output: the new value of the input at step `mutates`, or one pinned to a layout."""

    ref: Ref
    mutates: int | None = None
    pinned: Layout | None = None


@dataclass(frozen=True)
class Case:
    """A graph as plain data.

    Attributes:
        mesh: The mesh.
        steps: Inputs and calls.
        results: Outputs.
        scope: The symbols of its sizes; None if all are plain integers.
        runs: Values of the symbols to run it at; one empty mapping without symbols.
    """

    mesh: Mesh
    steps: tuple[Leaf | Call, ...]
    results: tuple[Result, ...]
    scope: Scope | None = None
    runs: tuple[Values, ...] = ({},)

    def type(self, ref: Ref) -> TensorType:
        return self.steps[ref.step].types[ref.result]


class UnfitValuesError(Exception):
    """The graph on one device is not what was captured at these values: capture would recompile."""


def refs_in(value: object) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from refs_in(item)
    elif isinstance(value, dict):
        yield from refs_in(list(value.values()))


def replaced(value: Any, change: Callable[[Ref], Any]) -> Any:
    if isinstance(value, Ref):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([replaced(item, change) for item in value])
    if isinstance(value, dict):
        return {key: replaced(item, change) for key, item in value.items()}
    return value


# ------------------------------------------------------------------------------------ editing


def sized(case: Case, change: Callable[[Dim], int], scope: Scope | None) -> Case:
    """The case with `change` of every symbolic size, over the symbols of another scope."""

    def plain(value: Any) -> Any:
        return with_sizes(value, change)

    def layout(old: Layout) -> Layout:
        return Layout(plain(old.placements))

    steps: list[Leaf | Call] = []
    for step in case.steps:
        if isinstance(step, Leaf):
            fill = replace(step.fill, high=plain(step.fill.high))
            steps.append(
                replace(step, type=plain(step.type), fill=fill, layout=layout(step.layout))
            )
        else:
            args, kwargs, types = plain((step.args, step.kwargs, step.types))
            steps.append(replace(step, args=args, kwargs=kwargs, types=types))
    results = tuple(
        replace(r, pinned=None if r.pinned is None else layout(r.pinned)) for r in case.results
    )
    return replace(case, steps=tuple(steps), results=results, scope=scope)


def in_scope(case: Case, scope: Scope) -> Case:
    """The case with its sizes in another scope, which has symbols of the same names."""
    return sized(case, lambda dim: scope.size(dim.formula), scope)


def live(case: Case) -> Case:
    """The case without steps that no output needs."""
    pending = [result.ref.step for result in case.results]
    pending += [result.mutates for result in case.results if result.mutates is not None]
    needed: set[int] = set()
    while pending:
        index = pending.pop()
        if index in needed:
            continue
        needed.add(index)
        step = case.steps[index]
        if isinstance(step, Call):
            pending += [ref.step for ref in step.refs]
    number = {index: place for place, index in enumerate(sorted(needed))}

    def renumber(ref: Ref) -> Ref:
        return Ref(number[ref.step], ref.result)

    steps: list[Leaf | Call] = []
    for index in sorted(needed):
        step = case.steps[index]
        if isinstance(step, Call):
            args, kwargs = replaced((step.args, step.kwargs), renumber)
            step = replace(step, args=args, kwargs=kwargs)
        steps.append(step)
    results = tuple(
        replace(
            result,
            ref=renumber(result.ref),
            mutates=None if result.mutates is None else number[result.mutates],
        )
        for result in case.results
    )
    return replace(case, steps=tuple(steps), results=results)


# ------------------------------------------------------------------------------------ running


def program_of(case: Case) -> Program:
    """The Program with layouts for its inputs, in a scope of its own that assumes nothing.

    A symbol that is no dim of an input becomes an integer input, as in a captured graph.
    """
    scope = None
    if case.scope is not None:
        scope = Scope()
        scope.hints, scope.ranges = dict(case.scope.hints), dict(case.scope.ranges)
        case = in_scope(case, scope)
    graph = fx.Graph()
    nodes: dict[Ref, fx.Node] = {}
    inputs: list[Input] = []
    layouts: dict[fx.Node, tuple[Layout, ...]] = {}
    position: dict[int, int] = {}
    for index, step in enumerate(case.steps):
        if isinstance(step, Leaf):
            node = graph.placeholder(f"x{index}")
            node.meta["type"] = step.type
            nodes[Ref(index)] = node
            layouts[node] = (step.layout,)
            position[index] = len(inputs)
            _read_symbols(scope, step.type, len(inputs))
            inputs.append(Input(f"x{index}", step.kind, step.mutated))
    for symbol in _unread(scope):
        assert scope is not None
        scope.sources[symbol] = (len(inputs), None)
        node = graph.placeholder(f"size{len(inputs)}")
        node.meta["type"] = TensorType((), torch.int64)
        layouts[node] = (Layout.replicated(case.mesh),)
        inputs.append(Input(str(symbol), InputKind.USER))
    wanted = {ref for step in case.steps if isinstance(step, Call) for ref in step.refs}
    wanted |= {result.ref for result in case.results}
    for index, step in enumerate(case.steps):
        if isinstance(step, Call):
            _add_call(graph, nodes, index, step, wanted)
    graph.output(tuple(nodes[result.ref] for result in case.results))
    outputs = tuple(
        Output(None if result.mutates is None else position[result.mutates])
        for result in case.results
    )
    pinned = {i: r.pinned for i, r in enumerate(case.results) if r.pinned is not None}
    return Program(
        "fuzz", graph, tuple(inputs), outputs, mesh=case.mesh, layouts=layouts, pinned=pinned,
        scope=scope,
    )  # fmt: skip


def _read_symbols(scope: Scope | None, value: TensorType, index: int) -> None:
    for dim, size in enumerate(value.shape):
        if scope is not None and isinstance(size, Dim) and size.formula in scope.hints:
            scope.sources.setdefault(size.formula, (index, dim))


def _unread(scope: Scope | None) -> list[sympy.Symbol]:
    return [] if scope is None else [s for s in scope.hints if s not in scope.sources]


def _add_call(
    graph: fx.Graph, nodes: dict[Ref, fx.Node], index: int, call: Call, wanted: set[Ref]
) -> None:
    args, kwargs = replaced((call.args, call.kwargs), nodes.__getitem__)
    node = graph.create_node("call_function", call.target)
    node.args, node.kwargs = args, kwargs
    returns = call.target._schema.returns
    if len(returns) == 1 and str(returns[0].type) == "Tensor":
        node.meta["type"] = call.types[0]
        nodes[Ref(index)] = node
        return
    node.meta["type"] = call.types
    for place, value in enumerate(call.types):
        if Ref(index, place) in wanted:
            item = graph.call_function(operator.getitem, (node, place))
            item.meta["type"] = value
            nodes[Ref(index, place)] = item


def run_whole(
    case: Case, program: Program, values: Values
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of the Program and what its outputs must be, on one device.

    Args:
        case: The case.
        program: Its Program.
        values: Values of its symbols.

    Raises:
        UnfitValuesError: If the ops give other shapes than the case says, or refuse.
    """
    found: dict[Ref, torch.Tensor] = {}
    inputs: list[torch.Tensor] = []
    for index, step in enumerate(case.steps):
        if isinstance(step, Leaf):
            try:
                found[Ref(index)] = step.fill.tensor(step.type, values)
            except (RuntimeError, IndexError):
                raise UnfitValuesError(f"step {index}: no such input") from None
            inputs.append(found[Ref(index)])
            continue
        args, kwargs = concrete(replaced((step.args, step.kwargs), found.__getitem__), values)
        try:
            given = step.target(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            raise UnfitValuesError(f"step {index}: {step.target}: {error}") from None
        given = tuple(given) if isinstance(given, tuple | list) else (given,)
        for place, (x, value) in enumerate(zip(given, step.types, strict=True)):
            if tuple(x.shape) != concrete(tuple(value.shape), values):
                raise UnfitValuesError(f"step {index}: {step.target} gives {list(x.shape)}")
            found[Ref(index, place)] = x
    if program.scope is not None:
        sources = program.scope.sources.items()
        inputs += [torch.tensor(values[symbol]) for symbol, (_, dim) in sources if dim is None]
    return inputs, [found[result.ref] for result in case.results]


def listing(case: Case) -> str:
    """The case for people: ops with their arguments, inputs with their layouts."""
    lines = [f"mesh {case.mesh}"]
    if case.scope is not None:
        lines.append(f"sizes {case.scope.hints}, run at {[dict(run) for run in case.runs]}")
    for index, step in enumerate(case.steps):
        if isinstance(step, Leaf):
            lines.append(f"{index}: {step.type} {step.layout.placements} {step.fill}")
        else:
            types = ", ".join(map(str, step.types))
            lines.append(f"{index}: {step.target} {step.args} {step.kwargs} -> {types}")
    return "\n".join([*lines, *map(str, case.results)])
