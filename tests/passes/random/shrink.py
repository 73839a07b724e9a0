"""Making a failing case small: fewer outputs and ops, plainer layouts, fewer axes, smaller sizes.

Every candidate is a case of its own that is right on one device or left out, so what is left fails
for the same reason as the case at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from tests.passes.random.case import (
    Call,
    Case,
    Fill,
    Leaf,
    Ref,
    Result,
    in_scope,
    live,
    replaced,
    sized,
)
from tests.passes.random.check import kind_of
from tests.passes.random.infer import retyped

from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.placement import REPLICATE, Owner, Shard
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["shrink", "shrink_alike"]

_ROUNDS = 60


def shrink_alike(case: Case, problem: Callable[[Case], str]) -> Case:
    """A small case of which the same sort of thing is wrong.

    Args:
        case: A case that fails.
        problem: What is wrong with a case.
    """
    kind = kind_of(problem(case))
    return shrink(case, lambda other: kind_of(problem(other)) == kind)


def shrink(case: Case, fails: Callable[[Case], bool]) -> Case:
    """A small case that still fails.

    Args:
        case: A case that fails.
        fails: Whether a case fails as that one does.
    """
    for _ in range(_ROUNDS):
        smaller = next((other for other in _smaller(case) if fails(other)), None)
        if smaller is None:
            break
        case = smaller
    return case


def _smaller(case: Case) -> Iterator[Case]:
    yield from _fewer_runs(case)
    yield from _fewer_results(case)
    yield from _computed_as_inputs(case)
    yield from _skipped_calls(case)
    yield from _fewer_axes(case)
    yield from _simpler_layouts(case)
    yield from _plain_symbols(case)
    yield from _smaller_values(case)
    yield from _smaller_sizes(case)


def _fewer_runs(case: Case) -> Iterator[Case]:
    if len(case.runs) > 1:
        for values in case.runs:
            yield replace(case, runs=(values,))


def _fewer_results(case: Case) -> Iterator[Case]:
    """One result alone; then what an output is computed from as the output."""
    if len(case.results) > 1:
        for result in case.results:
            yield live(replace(case, results=(result,)))
    for result in case.results:
        step = case.steps[result.ref.step]
        if isinstance(step, Call):
            for ref in step.refs:
                yield live(replace(case, results=(Result(ref),)))


def _computed_as_inputs(case: Case) -> Iterator[Case]:
    """A computed value as an input, whole or in the layout of an input of its shape."""
    for index, step in enumerate(case.steps):
        if not isinstance(step, Call) or len(step.types) != 1:
            continue
        (value,) = step.types
        low, high = (-3, 4) if value.dtype.is_floating_point else (0, 2)
        layouts = [
            leaf.layout
            for leaf in case.steps
            if isinstance(leaf, Leaf) and leaf.type.shape == value.shape
        ]
        whole = Layout.replicated(case.mesh)
        plain = [
            whole.replace(axis, Shard(dim, 1, extent))
            for axis in range(len(case.mesh.names))
            for dim, extent in enumerate(value.shape)
        ]
        for layout in (whole, *layouts, *plain):
            yield _with(case, index, Leaf(value, Fill(index, low, high), layout))


def _skipped_calls(case: Case) -> Iterator[Case]:
    """A call's operand of the result's type in place of the result."""
    for index, step in enumerate(case.steps):
        if not isinstance(step, Call) or len(step.types) != 1:
            continue
        for ref in step.refs:
            if case.type(ref) == step.types[0]:
                yield _skipped(case, index, ref)
                break


def _skipped(case: Case, index: int, operand: Ref) -> Case:
    def change(ref: Ref) -> Ref:
        return operand if ref == Ref(index) else ref

    steps = [
        replace(step, args=replaced(step.args, change), kwargs=replaced(step.kwargs, change))
        if isinstance(step, Call)
        else step
        for step in case.steps
    ]
    results = tuple(replace(result, ref=change(result.ref)) for result in case.results)
    return live(replace(case, steps=tuple(steps), results=results))


def _fewer_axes(case: Case) -> Iterator[Case]:
    """The mesh without an axis, or with two ranks on one."""
    names, sizes = case.mesh.names, case.mesh.sizes
    for axis, name in enumerate(names):
        if any(isinstance(s, Call) and name in str(s.args) for s in case.steps):
            continue
        if len(names) > 1:
            axes = {n: ranks for n, ranks in zip(names, sizes, strict=True) if n != name}
            yield _on_mesh(case, Mesh(axes), lambda p, at=axis: (*p[:at], *p[at + 1 :]))
        if sizes[axis] > 2:
            axes = dict(zip(names, sizes, strict=True)) | {name: 2}
            yield _on_mesh(case, Mesh(axes), lambda p: p)


def _on_mesh(case: Case, mesh: Mesh, change: Callable[[Any], Any]) -> Case:
    def layout(old: Layout) -> Layout:
        new = change(old.placements)
        return Layout(
            tuple(
                Owner(p.rank % ranks) if isinstance(p, Owner) else p
                for p, ranks in zip(new, mesh.sizes, strict=True)
            )
        )

    steps = [
        replace(step, layout=layout(step.layout)) if isinstance(step, Leaf) else step
        for step in case.steps
    ]
    results = tuple(
        replace(r, pinned=None if r.pinned is None else layout(r.pinned)) for r in case.results
    )
    return replace(case, mesh=mesh, steps=tuple(steps), results=results)


def _simpler_layouts(case: Case) -> Iterator[Case]:
    """An input whole on one axis or split plainly; a result without its pin."""
    for index, step in enumerate(case.steps):
        if not isinstance(step, Leaf):
            continue
        for axis, placement in enumerate(step.layout.placements):
            if placement != REPLICATE:
                yield _with(case, index, replace(step, layout=step.layout.replace(axis, REPLICATE)))
            dim = getattr(placement, "dim", None)
            if dim is not None and placement != (plain := Shard(dim, 1, step.type.shape[dim])):
                yield _with(case, index, replace(step, layout=step.layout.replace(axis, plain)))
    for index, result in enumerate(case.results):
        if result.pinned is not None or result.mutates is not None:
            results = list(case.results)
            results[index] = Result(result.ref)
            yield live(replace(case, results=tuple(results)))


def _plain_symbols(case: Case) -> Iterator[Case]:
    """A symbol as the number that it is in a run, or another symbol in its place."""
    if case.scope is None:
        return
    for symbol in case.scope.hints:
        for value in dict.fromkeys(values[symbol] for values in case.runs):
            yield from _substituted(case, symbol, value)
        for other in case.scope.hints:
            if other != symbol:
                yield from _substituted(case, symbol, other)


def _substituted(case: Case, symbol: Any, value: Any) -> Iterator[Case]:
    assert case.scope is not None
    scope = Scope()
    for known, hint in case.scope.hints.items():
        if known != symbol:
            scope.hints[known] = hint
            scope.ranges[known] = case.scope.ranges[known]
    runs = tuple({s: v for s, v in values.items() if s != symbol} for values in case.runs)

    def change(size: Dim) -> int:
        return scope.size(size.formula.subs(symbol, value))

    made = retyped(sized(replace(case, runs=runs), change, scope if scope.hints else None))
    if made is not None and _is_valid(made):
        yield made


def _smaller_values(case: Case) -> Iterator[Case]:
    """A run at the smallest sizes; the hints too."""
    if case.scope is None or len(case.runs) > 1:
        return
    (values,) = case.runs
    for symbol, value in values.items():
        for smaller in range(2, value):
            yield replace(case, runs=({**values, symbol: smaller},))
    for symbol, hint in case.scope.hints.items():
        for smaller in range(2, hint):
            scope = Scope()
            scope.hints = {**case.scope.hints, symbol: smaller}
            scope.ranges = case.scope.ranges
            made = retyped(in_scope(case, scope))
            if made is not None:
                yield made


def _smaller_sizes(case: Case) -> Iterator[Case]:
    """A plain size as a smaller one, wherever it occurs."""
    found = {
        size
        for step in case.steps
        if isinstance(step, Leaf)
        for size in step.type.shape
        if not isinstance(size, Dim) and size > 1
    }
    for size in sorted(found, reverse=True):
        for smaller in sorted({1, 2, size // 2} - {0, size}):
            made = retyped(_resized(case, size, smaller))
            if made is not None and made != case and _is_valid(made):
                yield made


def _resized(case: Case, size: int, smaller: int) -> Case:
    def number(value: Any) -> Any:
        if isinstance(value, Dim | bool) or not isinstance(value, int):
            return _rebuilt(value, number)
        return smaller if value == size else value

    steps: list[Leaf | Call] = []
    for step in case.steps:
        if isinstance(step, Leaf):
            shape = tuple([number(extent) for extent in step.type.shape])
            fill = replace(step.fill, high=number(step.fill.high))
            layout = Layout(
                tuple(
                    type(p)(p.dim, *number(tuple(p)[1:])) if hasattr(p, "dim") else p
                    for p in step.layout.placements
                )
            )
            value = TensorType(shape, step.type.dtype)
            steps.append(replace(step, type=value, fill=fill, layout=layout))
        else:
            # Lists are sizes; single numbers may be dims, so they stay.
            args = tuple(number(arg) if isinstance(arg, list) else arg for arg in step.args)
            steps.append(replace(step, args=args))
    return replace(case, steps=tuple(steps))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Ref | torch.dtype):
        return value
    if isinstance(value, list):
        return [change(item) for item in value]
    if isinstance(value, tuple):
        items = [change(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def _is_valid(case: Case) -> bool:
    """Whether the layouts fit the sizes."""
    try:
        for step in case.steps:
            if isinstance(step, Leaf):
                step.layout.check(step.type.shape, case.mesh)
        for result in case.results:
            if result.pinned is not None:
                result.pinned.check(case.type(result.ref).shape, case.mesh)
    except RolemeshError:
        return False
    return True


def _with(case: Case, index: int, step: Leaf | Call) -> Case:
    return live(replace(case, steps=(*case.steps[:index], step, *case.steps[index + 1 :])))
