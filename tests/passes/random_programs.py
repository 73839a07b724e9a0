"""Random small Programs with random layouts, and whether they compute what the whole graph does.

A `Case` is plain data: tensors, op calls, outputs, a mesh and layouts. It is made by running ops on
real tensors as they are drawn, so it knows what every value must be. `check` takes it through the
passes and all ranks; `shrink` makes a failing case small.

Values are small integers in float64 as far as ops keep them so: then sums are exact in any order,
and ops that jump (comparisons, sorts, floor) may be drawn without a false alarm.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.layouts import MESHES, pad_masks, random_layout
from torch import fx

import rolemesh.compiler.annotate  # noqa: F401 - registers the op `constrain`
from rolemesh.compiler.ir.layout import Layout, Shard
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import Input, InputKind, Output, Program
from rolemesh.compiler.ir.spec import P
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.lowering import chunks
from rolemesh.passes.partition import Partition
from rolemesh.passes.propagate import Propagate
from rolemesh.passes.push_back import PushBack
from rolemesh.passes.verify import Verify
from rolemesh.runtime.lockstep import run_lockstep, scatter_inputs

__all__ = ["Call", "Case", "Leaf", "Ref", "Result", "check", "draw_case", "program_of", "shrink"]

aten = torch.ops.aten
LIMIT = 400
"""Elements of the largest value drawn."""


@dataclass(frozen=True)
class Ref:
    """A result of an earlier step."""

    step: int
    result: int = 0


@dataclass(frozen=True)
class Leaf:
    """An input."""

    value: torch.Tensor
    layout: Layout
    mutated: bool = False
    kind: InputKind = InputKind.USER

    @property
    def values(self) -> tuple[torch.Tensor, ...]:
        return (self.value,)


@dataclass(frozen=True)
class Call:
    """One op call; `args` holds a `Ref` for each tensor."""

    target: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Result:
    """An output: the new value of the input at step `mutates`, or one pinned to a layout."""

    ref: Ref
    mutates: int | None = None
    pinned: Layout | None = None


@dataclass(frozen=True)
class Case:
    """A graph as plain data."""

    mesh: Mesh
    steps: tuple[Leaf | Call, ...]
    results: tuple[Result, ...]

    def value(self, ref: Ref) -> torch.Tensor:
        return self.steps[ref.step].values[ref.result]


# ------------------------------------------------------------------------------------- running


def kind_of(x: torch.Tensor) -> TensorType:
    return TensorType(tuple(x.shape), x.dtype)


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


def program_of(case: Case) -> tuple[Program, list[torch.Tensor]]:
    """The Program with layouts for its inputs, and its inputs."""
    graph = fx.Graph()
    nodes: dict[Ref, fx.Node] = {}
    inputs: list[Input] = []
    layouts: dict[fx.Node, tuple[Layout, ...]] = {}
    tensors: list[torch.Tensor] = []
    position: dict[int, int] = {}
    for index, step in enumerate(case.steps):
        if isinstance(step, Leaf):
            node = graph.placeholder(f"x{index}")
            node.meta["type"] = kind_of(step.value)
            nodes[Ref(index)] = node
            layouts[node] = (step.layout,)
            position[index] = len(inputs)
            inputs.append(Input(f"x{index}", step.kind, step.mutated))
            tensors.append(step.value)
    for index, step in enumerate(case.steps):
        if not isinstance(step, Call):
            continue
        args = replaced(step.args, nodes.__getitem__)
        kwargs = replaced(step.kwargs, nodes.__getitem__)
        node = graph.call_function(step.target, args, kwargs)
        returns = step.target._schema.returns
        if len(returns) == 1 and str(returns[0].type) == "Tensor":
            node.meta["type"] = kind_of(step.values[0])
            nodes[Ref(index)] = node
            continue
        node.meta["type"] = tuple(kind_of(x) for x in step.values)
        wanted = {ref for other in case.steps if isinstance(other, Call)
                  for ref in refs_in([other.args, other.kwargs])}  # fmt: skip
        wanted |= {result.ref for result in case.results}
        for place, x in enumerate(step.values):
            if Ref(index, place) in wanted:
                item = graph.call_function(operator.getitem, (node, place))
                item.meta["type"] = kind_of(x)
                nodes[Ref(index, place)] = item
    graph.output(tuple(nodes[result.ref] for result in case.results))
    outputs = tuple(
        Output(None if result.mutates is None else position[result.mutates])
        for result in case.results
    )
    pinned = {i: r.pinned for i, r in enumerate(case.results) if r.pinned is not None}
    program = Program(
        "fuzz", graph, tuple(inputs), outputs, mesh=case.mesh, layouts=layouts, pinned=pinned
    )
    return program, tensors


Run = Callable[[Program, Sequence[Sequence[torch.Tensor]]], Sequence[Sequence[torch.Tensor | None]]]
"""Runs all ranks of a program on their local inputs."""


def in_lockstep(
    program: Program, inputs: Sequence[Sequence[torch.Tensor]]
) -> list[list[torch.Tensor | None]]:
    """Run the program's own nodes."""
    return run_lockstep(program, inputs, poison=True, check=True)


def check(case: Case, run: Run = in_lockstep, tolerance: float = 1e-8) -> str:
    """Take a case through the passes and all ranks; empty if right, else what is wrong.

    Args:
        case: The case.
        run: Runs all ranks.
        tolerance: Of values that are not fp32, absolute and relative.
    """
    program, tensors = program_of(case)
    try:
        for step in (Propagate(), PushBack(), Partition(), Verify()):
            program = step.apply(program)
        locals_ = run(program, scatter_inputs(program, tensors, poison=True))
    except Exception as error:  # noqa: BLE001 - any error is what is looked for
        return f"{type(error).__name__}: {error}\n{program}"
    for index, (result, found) in enumerate(zip(case.results, locals_, strict=True)):
        wrong = _difference(case, program, index, case.value(result.ref), found, tolerance)
        if wrong:
            return f"output {index}: {wrong}\n{program}"
    return ""


def _difference(
    case: Case,
    program: Program,
    index: int,
    expected: torch.Tensor,
    found: Sequence[torch.Tensor | None],
    exact: float,
) -> str:
    value = program.results[index]
    assert isinstance(value, fx.Node)
    layout = program.layout(value)
    wants = chunks.scatter(expected, layout, case.mesh)
    masks = pad_masks(expected.shape, layout, case.mesh)
    for rank, (want, mask, have) in enumerate(zip(wants, masks, found, strict=True)):
        assert have is not None
        tolerance = 1e-4 if want.dtype == torch.float32 else exact
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"rank {rank} has {have.dtype} {list(have.shape)}, not {list(want.shape)}"
        a, b = have[mask], want[mask]
        if not torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance):
            return f"rank {rank} has\n{have}\nnot\n{want}"
    return ""


# ------------------------------------------------------------------------------------ shrinking


def shrink(case: Case, fails: Callable[[Case], bool], rounds: int = 10) -> Case:
    """A small case that still fails: fewer outputs and ops, plainer layouts."""
    for _ in range(rounds):
        before = case
        for smaller in _smaller(case):
            if fails(smaller):
                case = smaller
                break
        if case is before:
            break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    yield from _fewer_results(case)
    yield from _computed_as_inputs(case)
    yield from _simpler_layouts(case)


def _fewer_results(case: Case) -> Iterator[Case]:
    """One result alone; then what an output is computed from as the output."""
    if len(case.results) > 1:
        for result in case.results:
            yield _live(replace(case, results=(result,)))
    for result in case.results:
        step = case.steps[result.ref.step]
        if isinstance(step, Call):
            for ref in refs_in([step.args, step.kwargs]):
                yield _live(replace(case, results=(Result(ref),)))


def _computed_as_inputs(case: Case) -> Iterator[Case]:
    """A computed value as an input, whole or in the layout of an input of its shape."""
    for index, step in enumerate(case.steps):
        if not isinstance(step, Call) or len(step.values) != 1:
            continue
        value = step.values[0]
        yield _with(case, index, Leaf(value, Layout.replicated(case.mesh)))
        if tuple(value.shape) == tuple(case.value(next(refs_in(step.args))).shape):
            for leaf in case.steps:
                if isinstance(leaf, Leaf) and leaf.value.shape == value.shape:
                    yield _with(case, index, Leaf(value, leaf.layout))


def _simpler_layouts(case: Case) -> Iterator[Case]:
    """An input whole on one axis; a result without its pin."""
    for index, step in enumerate(case.steps):
        if isinstance(step, Leaf):
            for axis in range(len(case.mesh.names)):
                whole = step.layout.replace(axis, Layout.replicated(case.mesh).placements[0])
                if whole != step.layout:
                    yield _with(case, index, replace(step, layout=whole))
    for index, result in enumerate(case.results):
        if result.pinned is not None or result.mutates is not None:
            results = list(case.results)
            results[index] = Result(result.ref)
            yield _live(replace(case, results=tuple(results)))


def _with(case: Case, index: int, step: Leaf | Call) -> Case:
    return _live(replace(case, steps=(*case.steps[:index], step, *case.steps[index + 1 :])))


def _live(case: Case) -> Case:
    """The case without steps that no output needs."""
    pending = [ref.ref.step for ref in case.results]
    pending += [ref.mutates for ref in case.results if ref.mutates is not None]
    live: set[int] = set()
    while pending:
        index = pending.pop()
        if index in live:
            continue
        live.add(index)
        step = case.steps[index]
        if isinstance(step, Call):
            pending += [ref.step for ref in refs_in([step.args, step.kwargs])]
    number = {index: place for place, index in enumerate(sorted(live))}

    def renumber(ref: Ref) -> Ref:
        return Ref(number[ref.step], ref.result)

    steps: list[Leaf | Call] = []
    for index in sorted(live):
        step = case.steps[index]
        if isinstance(step, Call):
            step = replace(
                step, args=replaced(step.args, renumber), kwargs=replaced(step.kwargs, renumber)
            )
        steps.append(step)
    results = tuple(
        replace(
            result,
            ref=renumber(result.ref),
            mutates=None if result.mutates is None else number[result.mutates],
        )
        for result in case.results
    )
    return Case(case.mesh, tuple(steps), results)


# -------------------------------------------------------------------------------------- drawing


class _UnsuitedError(Exception):
    """The values at hand do not suit the op that was drawn."""


class _Draw:
    """A case under construction."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.mesh: Mesh = self.rng.choice(MESHES)
        self.steps: list[Leaf | Call] = []
        self.exact: dict[Ref, bool] = {}
        self.results: list[Result] = []

    # Values.

    def leaf(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float64, *, high: int = 4
    ) -> Ref:
        low = -3 if dtype.is_floating_point else 0
        if dtype == torch.bool:
            high = 2
        value = torch.randint(low, high, tuple(shape), generator=self.generator).to(dtype)
        owner = self.rng.random() < 0.15
        layout = random_layout(self.rng.choice, value.shape, self.mesh, owner=owner)
        kind = self.rng.choice([InputKind.USER, InputKind.PARAMETER])
        return self.add(Leaf(value, layout, kind=kind))

    def whole(self, value: torch.Tensor) -> Ref:
        """An input with this value, that every rank holds."""
        return self.add(Leaf(value, Layout.replicated(self.mesh)))

    def add(self, leaf: Leaf) -> Ref:
        self.steps.append(leaf)
        ref = Ref(len(self.steps) - 1)
        self.exact[ref] = True
        return ref

    def value(self, ref: Ref) -> torch.Tensor:
        return self.steps[ref.step].values[ref.result]

    def pick(
        self,
        wanted: Callable[[torch.Tensor], bool] = lambda x: True,
        *,
        floats: bool = True,
        exact: bool = False,
    ) -> Ref:
        """A value of those drawn so far, late ones more likely."""
        found = [
            ref
            for ref in self.exact
            if (not floats or self.value(ref).is_floating_point())
            and (not exact or self.exact[ref])
            and wanted(self.value(ref))
        ]
        if not found:
            raise _UnsuitedError
        return found[-1] if self.rng.random() < 0.4 else self.rng.choice(found)

    def ids(self, shape: Sequence[int], count: int) -> Ref:
        """Integers below `count` of a shape: computed ones if there are, else an input."""
        if self.rng.random() < 0.5:
            for ref in reversed(self.exact):
                x = self.value(ref)
                if x.dtype == torch.int64 and x.shape == torch.Size(shape):
                    return self.call(aten.remainder.Scalar, ref, count)
        return self.leaf(shape, torch.int64, high=count)

    def like(self, x: torch.Tensor, shape: Sequence[int]) -> Ref:
        """A value of the type of x and a given shape."""
        found = [
            ref
            for ref in self.exact
            if self.value(ref).shape == torch.Size(shape) and self.value(ref).dtype == x.dtype
        ]
        if found and self.rng.random() < 0.6:
            return self.rng.choice(found)
        return self.leaf(shape, x.dtype)

    def dim(self, x: torch.Tensor) -> int:
        """A dim of x, sometimes counted from the end."""
        if not x.ndim:
            raise _UnsuitedError
        dim = self.rng.randrange(x.ndim)
        return dim - x.ndim if self.rng.random() < 0.3 else dim

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    # Calls.

    def call(
        self, target: torch._ops.OpOverload, *args: Any, inexact: bool = False, **kwargs: Any
    ) -> Ref:
        """Run an op; it becomes a step if its result is of use."""
        try:
            found = target(*replaced(args, self.value), **replaced(kwargs, self.value))
        except (RuntimeError, IndexError):
            raise _UnsuitedError from None
        values = tuple(found) if isinstance(found, tuple | list) else (found,)
        for x in values:
            if x.numel() > LIMIT or x.ndim > 5 or (x.is_floating_point() and not _tame(x)):
                raise _UnsuitedError
        self.steps.append(Call(target, args, kwargs, values))
        operands = list(refs_in([list(args), kwargs]))
        exact = not inexact and all(self.exact[ref] for ref in operands)
        refs = [Ref(len(self.steps) - 1, place) for place in range(len(values))]
        for ref, x in zip(refs, values, strict=True):
            small = not x.is_floating_point() or not x.numel() or float(x.abs().max()) <= 1000
            self.exact[ref] = exact and small
        return refs[0]


def _tame(x: torch.Tensor) -> bool:
    return not x.numel() or (bool(x.isfinite().all()) and float(x.abs().max()) < 1e7)


_EXTENTS = (1, 2, 2, 3, 4, 4, 5, 6, 8)
_Family = Callable[[_Draw], Ref]


def _shape(d: _Draw, ndim: int) -> list[int]:
    while True:
        shape = [d.rng.choice(_EXTENTS) for _ in range(ndim)]
        if math.prod(shape) <= LIMIT // 2:
            return shape


def _broadcastable(d: _Draw, shape: Sequence[int]) -> list[int]:
    kept = [1 if d.rng.random() < 0.3 else n for n in shape]
    return kept[d.rng.randrange(len(kept) + 1) if d.rng.random() < 0.3 else 0 :]


def unary(d: _Draw) -> Ref:
    x = d.pick()
    name = d.rng.choice(
        ["neg", "abs", "relu", "clone", "sign", "silu", "tanh", "sigmoid", "mul", "add", "rsub",
         "sub", "div", "pow", "clamp", "gelu", "alias"]
    )  # fmt: skip
    if name in ("silu", "tanh", "sigmoid", "gelu"):
        return d.call(getattr(aten, name).default, x, inexact=True)
    scalar = {"mul": aten.mul.Tensor, "add": aten.add.Tensor, "sub": aten.sub.Tensor}
    if name in scalar:
        return d.call(scalar[name], x, d.rng.choice([-2, 2, 3.0]))
    if name == "div":
        return d.call(aten.div.Tensor, x, 2)
    if name == "rsub":
        return d.call(aten.rsub.Scalar, x, 3)
    if name == "pow":
        return d.call(aten.pow.Tensor_Scalar, x, 2)
    if name == "clamp":
        return d.call(aten.clamp.default, x, -2, 2)
    if name == "sign":
        return d.call(aten.sign.default, d.pick(exact=True))
    return d.call(getattr(aten, name).default, x)


def binary(d: _Draw) -> Ref:
    x = d.pick()
    y = d.like(d.value(x), _broadcastable(d, d.value(x).shape))
    name = d.rng.choice(["add", "add", "sub", "mul", "mul", "maximum", "minimum", "div", "alpha"])
    if d.flag() and name != "div":
        x, y = y, x
    if name == "alpha":
        return d.call(aten.add.Tensor, x, y, alpha=2)
    if name == "div":
        ones = d.call(aten.add.Tensor, d.call(aten.abs.default, y), 1)
        return d.call(aten.div.Tensor, x, ones, inexact=True)
    if name in ("maximum", "minimum"):
        return d.call(getattr(aten, name).default, x, y)
    return d.call(getattr(aten, name).Tensor, x, y)


def same_shape(d: _Draw) -> Ref:
    """An op of two values that both exist, as residuals and gates are."""
    x = d.pick()
    y = d.pick(lambda v: v.shape == d.value(x).shape and v.dtype == d.value(x).dtype)
    return d.call(d.rng.choice([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]), x, y)


def compare(d: _Draw) -> Ref:
    x = d.pick(exact=True)
    y = d.leaf(_broadcastable(d, d.value(x).shape), d.value(x).dtype)
    op = d.rng.choice([aten.gt, aten.le, aten.eq, aten.ne])
    return d.call(op.Tensor, x, y) if d.flag() else d.call(op.Scalar, x, 1)


def where(d: _Draw) -> Ref:
    x = d.pick()
    shape = d.value(x).shape
    conditions = [
        r for r in d.exact if d.value(r).dtype == torch.bool and d.value(r).shape == shape
    ]
    condition = (
        d.rng.choice(conditions) if conditions else d.leaf(_broadcastable(d, shape), torch.bool)
    )
    if d.flag():
        return d.call(aten.masked_fill.Scalar, x, condition, -3)
    y = d.like(d.value(x), _broadcastable(d, shape))
    return d.call(aten.where.self, condition, x, y)


def cast(d: _Draw) -> Ref:
    x = d.pick(floats=False, exact=True)
    return d.call(
        aten._to_copy.default,
        x,
        dtype=d.rng.choice([torch.float64, torch.float64, torch.float32, torch.int64]),
    )


def matmul(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 2)
    shape = d.value(x).shape
    n = d.rng.choice(_EXTENTS)
    if len(shape) == 2:
        y = d.like(d.value(x), (shape[1], n))
        kind = d.rng.choice(["mm", "mm", "addmm", "linear", "reversed"])
        if kind == "addmm":
            bias = d.leaf((n,), d.value(x).dtype)
            return d.call(aten.addmm.default, bias, x, y)
        if kind == "linear":
            weight = d.leaf((n, shape[1]), d.value(x).dtype)
            return d.call(aten.linear.default, x, weight, d.leaf((n,), d.value(x).dtype))
        if kind == "reversed":
            return d.call(aten.mm.default, d.like(d.value(x), (n, shape[0])), x)
        return d.call(aten.mm.default, x, y)
    if len(shape) == 3:
        y = d.like(d.value(x), (shape[0], shape[2], n))
        if d.rng.random() < 0.2:
            bias = d.leaf((shape[0], shape[1], n), d.value(x).dtype)
            return d.call(aten.baddbmm.default, bias, x, y)
        return d.call(aten.bmm.default, x, y)
    return d.call(aten.matmul.default, x, d.like(d.value(x), (shape[-1], n)))


def bias(d: _Draw) -> Ref:
    """A product and a bias: the bias must be added once."""
    y = matmul(d)
    shape = d.value(y).shape
    return d.call(aten.add.Tensor, y, d.like(d.value(y), shape[-1:]))


def reshape(d: _Draw) -> Ref:
    x = d.pick(floats=d.rng.random() < 0.9)
    shape = list(d.value(x).shape)
    for _ in range(d.rng.randint(1, 3)):
        place = d.rng.randrange(len(shape) + 1)
        kind = d.rng.choice(["split", "merge", "one"])
        if kind == "one":
            shape.insert(place, 1)
        elif kind == "merge" and place + 1 < len(shape):
            shape[place : place + 2] = [shape[place] * shape[place + 1]]
        elif kind == "split" and place < len(shape):
            outer = d.rng.choice([n for n in range(1, shape[place] + 1) if shape[place] % n == 0])
            shape[place : place + 1] = [outer, shape[place] // outer]
    if shape and d.flag():
        shape[d.rng.randrange(len(shape))] = -1
    target = d.rng.choice([aten.view.default, aten.reshape.default, aten._unsafe_view.default])
    return d.call(target, x, shape)


def regroup(d: _Draw) -> Ref:
    """A reshape into other factors of the same number of elements."""
    x = d.pick()
    count = d.value(x).numel()
    a = d.rng.choice([n for n in range(1, count + 1) if count % n == 0])
    return d.call(aten.reshape.default, x, [a, count // a])


def arrange(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1, floats=d.rng.random() < 0.9)
    v = d.value(x)
    kind = d.rng.choice(["transpose", "permute", "unsqueeze", "squeeze", "expand", "repeat", "flip",
                         "roll", "t", "pad", "diagonal"])  # fmt: skip
    if kind == "transpose":
        return d.call(aten.transpose.int, x, d.dim(v), d.dim(v))
    if kind == "permute":
        return d.call(aten.permute.default, x, d.rng.sample(range(v.ndim), v.ndim))
    if kind == "unsqueeze":
        return d.call(aten.unsqueeze.default, x, d.rng.randint(0, v.ndim))
    if kind == "squeeze":
        return d.call(aten.squeeze.dim, x, d.dim(v))
    if kind == "expand":
        lead = d.rng.choice([[], [2], [3]])
        return d.call(aten.expand.default, x, [*lead, *(3 if n == 1 else -1 for n in v.shape)])
    if kind == "repeat":
        return d.call(aten.repeat.default, x, [d.rng.choice([1, 1, 2, 3]) for _ in v.shape])
    if kind == "flip":
        return d.call(aten.flip.default, x, [d.dim(v)])
    if kind == "roll":
        return d.call(aten.roll.default, x, [1], [d.dim(v)])
    if kind == "t" and v.ndim == 2:
        return d.call(aten.t.default, x)
    if kind == "pad":
        return d.call(aten.constant_pad_nd.default, x, [d.rng.choice([0, 1]), 1], 0.0)
    if kind == "diagonal" and v.ndim >= 2:
        return d.call(aten.diagonal.default, x, 0, 0, 1)
    raise _UnsuitedError


def cut(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1, floats=d.rng.random() < 0.9)
    v = d.value(x)
    dim = d.dim(v)
    extent = v.shape[dim]
    if not extent:
        raise _UnsuitedError
    kind = d.rng.choice(["slice", "slice", "split", "sizes", "select", "unbind", "stride"])
    if kind == "slice":
        start = d.rng.randrange(extent)
        return d.call(aten.slice.Tensor, x, dim, start, d.rng.randint(start + 1, extent))
    if kind == "stride":
        return d.call(aten.slice.Tensor, x, dim, 0, extent, 2)
    if kind == "split":
        return d.call(aten.split.Tensor, x, d.rng.randint(1, extent), dim)
    if kind == "sizes":
        first = d.rng.randint(1, extent)
        rest = [extent - first] if extent > first else []
        return d.call(aten.split_with_sizes.default, x, [first, *rest], dim)
    if kind == "unbind":
        return d.call(aten.unbind.int, x, dim)
    return d.call(aten.select.int, x, dim, d.rng.randrange(extent))


def join(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1)
    v = d.value(x)
    dim = d.dim(v)
    if d.rng.random() < 0.25:
        return d.call(aten.stack.default, [x, d.like(v, v.shape)], dim)
    shape = list(v.shape)
    if d.flag():
        shape[dim] = d.rng.choice(_EXTENTS)
    parts = [x, d.like(v, shape)]
    if d.flag():
        parts.reverse()
    return d.call(aten.cat.default, parts, dim)


def _mean(d: _Draw, x: Ref, dim: int, keep: bool) -> Ref:
    if d.flag():
        return d.call(aten.mean.default, x, inexact=True)
    return d.call(aten.mean.dim, x, [dim], keep, inexact=True)


def _total(d: _Draw, x: Ref, dim: int, keep: bool) -> Ref:
    return d.call(d.rng.choice([aten.sum.default, aten.max.default, aten.min.default]), x)


def _outer_dims(d: _Draw, x: Ref, dim: int, keep: bool) -> Ref:
    ndim = d.value(x).ndim
    return d.call(aten.sum.dim_IntList, x, [0, ndim - 1][:ndim], keep)


def _variance(d: _Draw, x: Ref, dim: int, keep: bool) -> Ref:
    if d.value(x).shape[dim] < 2:
        raise _UnsuitedError
    return d.call(aten.var_mean.correction, x, [dim], correction=1, keepdim=keep, inexact=True)


def _exact_max(d: _Draw, x: Ref, dim: int, keep: bool) -> Ref:
    return d.call(aten.max.dim, d.pick(lambda u: u.ndim >= 1, exact=True), 0, keep)


REDUCTIONS: dict[str, Callable[[_Draw, Ref, int, bool], Ref]] = {
    "sum": lambda d, x, dim, keep: d.call(aten.sum.dim_IntList, x, [dim], keep),
    "dims": _outer_dims,
    "all": _total,
    "mean": _mean,
    "amax": lambda d, x, dim, keep: d.call(aten.amax.default, x, [dim], keep),
    "amin": lambda d, x, dim, keep: d.call(aten.amin.default, x, [dim], keep),
    "softmax": lambda d, x, dim, keep: d.call(aten._softmax.default, x, dim, False, inexact=True),
    "log_softmax": lambda d, x, dim, keep: d.call(
        aten._log_softmax.default, x, dim, False, inexact=True
    ),
    "cumsum": lambda d, x, dim, keep: d.call(aten.cumsum.default, x, dim),
    "max": _exact_max,
    "var_mean": _variance,
    "logsumexp": lambda d, x, dim, keep: d.call(
        aten.logsumexp.default, x, [dim], keep, inexact=True
    ),
    "prod": lambda d, x, dim, keep: d.call(aten.prod.dim_int, x, dim, keep),
    "norm": lambda d, x, dim, keep: d.call(
        aten.linalg_vector_norm.default, x, 2, [dim], keep, inexact=True
    ),
}


def reduce(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1 and v.numel() > 0)
    dim, keep = d.dim(d.value(x)), d.flag()
    kind = d.rng.choice(["sum", *REDUCTIONS])  # sums twice as often
    return REDUCTIONS[kind](d, x, dim, keep)


def truth(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.dtype == torch.bool and v.ndim >= 1, floats=False)
    dim = d.dim(d.value(x))
    kind = d.rng.choice(["any", "all", "sum", "not", "cast"])
    if kind == "sum":
        return d.call(aten.sum.dim_IntList, x, [dim])
    if kind == "not":
        return d.call(aten.logical_not.default, x)
    if kind == "cast":
        return d.call(aten._to_copy.default, x, dtype=torch.float64)
    return d.call(getattr(aten, kind).dim, x, dim, d.flag())


def integer(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.dtype == torch.int64 and v.ndim >= 1, floats=False)
    kind = d.rng.choice(["add", "mul", "sum", "amax", "cumsum", "cast", "one_hot"])
    if kind in ("add", "mul"):
        return d.call(getattr(aten, kind).Tensor, x, 2)
    dim = d.dim(d.value(x))
    if kind == "sum":
        return d.call(aten.sum.dim_IntList, x, [dim])
    if kind == "amax":
        return d.call(aten.amax.default, x, [dim])
    if kind == "cumsum":
        return d.call(aten.cumsum.default, x, dim)
    if kind == "one_hot":
        return d.call(aten.one_hot.default, d.call(aten.remainder.Scalar, x, 3), 3)
    return d.call(aten._to_copy.default, x, dtype=torch.float64)


def norm(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1 and v.dtype == torch.float64)
    width = d.value(x).shape[-1]
    weight, offset = d.leaf((width,)), d.leaf((width,))
    return d.call(aten.native_layer_norm.default, x, [width], weight, offset, 1e-3, inexact=True)


def order(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1 and v.numel() > 0, exact=True)
    v = d.value(x)
    dim = d.dim(v)
    kind = d.rng.choice(["topk", "sort", "argmax", "argsort"])
    if kind == "topk":
        return d.call(aten.topk.default, x, d.rng.randint(1, v.shape[dim]), dim)
    if kind == "sort":
        return d.call(aten.sort.stable, x, stable=True, dim=dim)
    if kind == "argsort":
        return d.call(aten.argsort.stable, x, stable=True, dim=dim)
    return d.call(aten.argmax.default, x, dim, d.flag())


def lookup(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1 and v.numel() > 0)
    v = d.value(x)
    dim = d.dim(v)
    count = v.shape[dim]
    kind = d.rng.choice(["embedding", "index_select", "index", "gather", "index2", "rows"])
    if kind == "embedding":
        if v.ndim != 2:
            raise _UnsuitedError
        return d.call(aten.embedding.default, x, d.ids(_shape(d, d.rng.randint(1, 2)), v.shape[0]))
    if kind == "index_select":
        return d.call(aten.index_select.default, x, dim, d.ids(_shape(d, 1), count))
    if kind == "index":
        index = [None] * (dim % v.ndim) + [d.ids(_shape(d, d.rng.randint(1, 2)), count)]
        return d.call(aten.index.Tensor, x, index)
    if kind == "gather":
        shape = list(v.shape)
        shape[dim] = d.rng.choice(_EXTENTS)
        return d.call(aten.gather.default, x, dim, d.ids(shape, count))
    if kind == "rows":  # a table of experts: looked-up rows enter a product
        table = d.leaf((d.rng.choice((3, 4, 8)), d.rng.choice((2, 4)), 3))
        rows = d.call(aten.index.Tensor, table, [d.ids(_shape(d, 1), d.value(table).shape[0])])
        y = d.leaf((d.value(rows).shape[0], 2, d.value(rows).shape[1]))
        return d.call(aten.bmm.default, y, rows)
    if v.ndim < 2:
        raise _UnsuitedError
    shape = _shape(d, 1)
    return d.call(aten.index.Tensor, x, [d.ids(shape, v.shape[0]), d.ids(shape, v.shape[1])])


def write(d: _Draw) -> Ref:
    x = d.pick(lambda v: v.ndim >= 1 and v.numel() > 0)
    return _written(d, x)


def _written(d: _Draw, x: Ref) -> Ref:
    v = d.value(x)
    dim = d.dim(v)
    count = v.shape[dim]
    shape = list(v.shape)
    kind = d.rng.choice(["index_copy", "index_add", "slice_scatter", "select_scatter", "scatter",
                         "scatter_add", "index_put", "accumulate"])  # fmt: skip
    if kind in ("index_copy", "index_add"):
        shape[dim] = d.rng.randint(1, count)
        # Distinct places: which of two rows wins is not defined.
        ids = torch.randperm(count, generator=d.generator)[: shape[dim]]
        return d.call(getattr(aten, kind).default, x, dim, d.whole(ids), d.like(v, shape))
    if kind == "slice_scatter":
        start = d.rng.randrange(count)
        shape[dim] = d.rng.randint(1, count - start)
        end = start + shape[dim]
        return d.call(aten.slice_scatter.default, x, d.like(v, shape), dim, start, end)
    if kind == "select_scatter":
        del shape[dim]
        return d.call(aten.select_scatter.default, x, d.like(v, shape), dim, d.rng.randrange(count))
    if kind == "scatter":
        shape[dim] = 1
        return d.call(aten.scatter.src, x, dim, d.ids(shape, count), d.like(v, shape))
    if kind == "scatter_add":
        shape[dim] = d.rng.choice(_EXTENTS)
        return d.call(aten.scatter_add.default, x, dim, d.ids(shape, count), d.like(v, shape))
    if kind == "index_put":
        values = d.like(v, [1, *shape[1:]])
        return d.call(aten.index_put.default, x, [d.ids([1], shape[0])], values)
    rows = d.rng.choice(_EXTENTS)
    values = d.like(v, [rows, *shape[1:]])
    return d.call(aten.index_put.default, x, [d.ids([rows], shape[0])], values, True)


def create(d: _Draw) -> Ref:
    x = d.pick()
    v = d.value(x)
    shape = list(v.shape)
    kind = d.rng.choice(["arange", "full", "new_zeros", "ones_like", "mask", "tril", "triu", "eye"])
    if kind == "arange":
        count = d.rng.choice(_EXTENTS)
        return d.call(aten.arange.start_step, 0, count, 1, dtype=torch.int64)
    if kind == "full":
        return d.call(aten.full.default, shape, 2.0, dtype=v.dtype)
    if kind == "new_zeros":
        return d.call(aten.new_zeros.default, x, shape)
    if kind == "ones_like":
        return d.call(aten.ones_like.default, x)
    if kind == "mask":  # as a causal mask is made
        count = d.rng.choice(_EXTENTS)
        row = d.call(aten.arange.default, count, dtype=torch.int64)
        column = d.call(aten.unsqueeze.default, row, 1)
        return d.call(aten.le.Tensor, row, column)
    if kind == "eye":
        return d.call(aten.eye.default, d.rng.choice(_EXTENTS), dtype=v.dtype)
    if v.ndim < 2:
        raise _UnsuitedError
    return d.call(getattr(aten, kind).default, x, d.rng.choice([-1, 0, 1]))


def attention(d: _Draw) -> Ref:
    """Attention over heads; keys may have fewer heads than queries have."""
    batch, heads, rows = (d.rng.choice((1, 2, 3, 4)) for _ in range(3))
    groups = d.rng.choice((1, 1, 2))
    query = d.like(torch.empty(0, dtype=torch.float64), (batch, heads * groups, rows, 2))
    keys, values = (d.leaf((batch, heads, 5, 2)) for _ in range(2))
    mask = d.leaf(d.rng.choice([(rows, 5), (batch, 1, rows, 5), (1, heads * groups, 1, 5)]))
    if groups > 1:
        shapes = [batch, heads, groups, 5, 2], [batch, heads * groups, 5, 2]
        keys, values = (d.call(aten.unsqueeze.default, x, 2) for x in (keys, values))
        keys, values = (d.call(aten.expand.default, x, shapes[0]) for x in (keys, values))
        keys, values = (d.call(aten.reshape.default, x, shapes[1]) for x in (keys, values))
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    return d.call(op, query, keys, values, 0.0, False, attn_mask=mask, inexact=True)


def experts(d: _Draw) -> Ref:
    """Rows sorted by expert, a weight for each expert, and tokens that get the rows' sum."""
    rows, count, width = d.rng.choice((4, 6, 8)), d.rng.choice((2, 3, 4)), d.rng.choice((4, 8))
    ends = torch.randint(0, rows + 1, (count,), generator=d.generator).sort().values
    ends[-1] = rows
    offsets = d.whole(ends.int())
    x = d.like(torch.empty(0), (rows, 8))
    y = d.call(aten._grouped_mm.default, x, d.leaf((count, 8, width), torch.float32), offsets)
    if d.flag():
        y = d.call(aten.mul.Tensor, y, d.leaf((rows, 1), torch.float32))
    if d.flag():
        y = d.call(aten.reshape.default, y, [rows // 2, 2, width])
    return d.call(aten.sum.dim_IntList, y, [1]) if d.flag() else y


def table(d: _Draw) -> Ref:
    """Rows of a table that is cut by rows, made part of a larger dim, and used up."""
    entries, count, width = (d.rng.choice(_EXTENTS[1:]) for _ in range(3))
    values = torch.randint(-3, 4, (entries, width), generator=d.generator).double()
    axis = d.rng.randrange(len(d.mesh.names))
    layout = Layout.replicated(d.mesh).replace(axis, Shard(0, 1, entries))
    x = d.add(Leaf(values, layout))
    ids = d.ids([count], entries)
    if d.flag():
        rows = d.call(aten.index.Tensor, x, [ids])
    else:
        rows = d.call(aten.index_select.default, x, 0, ids)
    lead = d.rng.choice((1, 2, 4))
    y = d.leaf((lead, count, width))
    y = d.call(aten.mul.Tensor, y, rows)
    kind = d.rng.choice(["merge", "inner", "whole", "split", "plain"])
    if kind == "merge":
        y = d.call(aten.reshape.default, y, [lead * count, width])
    elif kind == "inner":
        y = d.call(aten.reshape.default, y, [lead, count * width])
    elif kind == "whole":
        y = d.call(aten.reshape.default, y, [-1])
    elif kind == "split" and count % 2 == 0:
        y = d.call(aten.reshape.default, y, [lead, count // 2, 2, width])
    if d.flag():
        name = d.rng.choice(["sum", "amax", "amin", "relu"])
        if name == "relu":
            return d.call(aten.relu.default, y)
        op = aten.sum.dim_IntList if name == "sum" else getattr(aten, name).default
        return d.call(op, y, [d.dim(d.value(y))])
    return y


def constrain(d: _Draw) -> Ref:
    """A layout asked for in the model's code."""
    x = d.pick(lambda v: v.ndim >= 1 and v.numel() > 0)
    axes = list(d.mesh.names)
    entries: list[str | tuple[str, ...] | None] = [None] * d.value(x).ndim
    entries[d.rng.randrange(len(entries))] = tuple(axes) if d.flag() else d.rng.choice(axes)
    return d.call(torch.ops.rolemesh.constrain.default, x, str(P(*entries)))


FAMILIES: tuple[_Family, ...] = (
    unary, binary, binary, same_shape, same_shape, compare, where, cast, matmul, matmul, bias,
    reshape, reshape, regroup, arrange, arrange, cut, cut, join, reduce, reduce, truth,
    integer, norm, order, lookup, lookup, write, create, attention, experts, table, table,
    constrain,
)  # fmt: skip


def draw_case(seed: int) -> Case:
    """The case of a seed."""
    d = _Draw(seed)
    for _ in range(d.rng.randint(1, 3)):
        d.leaf(_shape(d, d.rng.choice([1, 2, 2, 3, 3])))
    goal = d.rng.randint(3, 10)
    for _ in range(200):
        if sum(isinstance(step, Call) for step in d.steps) >= goal:
            break
        mark = len(d.steps)
        try:
            d.rng.choice(FAMILIES)(d)
        except _UnsuitedError:
            if not any(isinstance(step, Call) for step in d.steps[mark:]):
                for ref in [ref for ref in d.exact if ref.step >= mark]:
                    del d.exact[ref]
                del d.steps[mark:]
    _choose_results(d)
    return _live(Case(d.mesh, tuple(d.steps), tuple(d.results)))


def _choose_results(d: _Draw) -> None:
    _mutate(d)
    used = {ref for step in d.steps if isinstance(step, Call)
            for ref in refs_in([step.args, step.kwargs])}  # fmt: skip
    unused = [r for r in d.exact if r not in used and isinstance(d.steps[r.step], Call)]
    others = [r for r in used if isinstance(d.steps[r.step], Call)]
    chosen = unused[:4] + ([d.rng.choice(sorted(others, key=str))] if others and d.flag() else [])
    for ref in chosen:
        pinned = None
        if d.rng.random() < 0.4:
            pinned = random_layout(d.rng.choice, d.value(ref).shape, d.mesh)
        d.results.append(Result(ref, pinned=pinned))


def _mutate(d: _Draw) -> None:
    """Sometimes one input is a cache that the program writes to."""
    if d.rng.random() > 0.35:
        return
    leaves = [
        i
        for i, step in enumerate(d.steps)
        if isinstance(step, Leaf) and step.value.ndim and step.value.is_floating_point()
    ]
    index = d.rng.choice(leaves)
    leaf = d.steps[index]
    assert isinstance(leaf, Leaf)
    try:
        new = _written(d, Ref(index))
    except _UnsuitedError:
        return
    d.steps[index] = replace(leaf, mutated=True)
    d.results.append(Result(new, mutates=index))
