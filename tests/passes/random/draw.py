"""Drawing a case: inputs with random layouts, then ops of random families on what is there.

Values are small integers in float64 as far as ops keep them so: then sums are exact in any order,
and ops that jump (comparisons, sorts, floor) may be drawn without a false alarm.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tests.layouts import random_layout
from tests.passes.random.case import Call, Fill, Leaf, Ref, Result, refs_in
from tests.passes.random.infer import LIMIT, Inference, UnsuitedError

from rolemesh.compiler.ir.dims import Dim, Scope
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.program import InputKind
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["EXTENTS", "Draw", "Family", "dim_of"]

EXTENTS = (1, 2, 2, 3, 4, 4, 5, 6, 8)
Shape = Sequence[int]


class Draw:
    """A case under construction.

    Args:
        seed: Of everything that is drawn.
        mesh: The mesh.
        symbols: How many symbols sizes may have.
    """

    def __init__(self, rng: random.Random, mesh: Mesh, symbols: int) -> None:
        self.rng = rng
        self.mesh = mesh
        self.scope = Scope() if symbols else None
        self.symbols: list[int] = []
        if self.scope is not None:
            hints = [2, 3, 4, 5, 6, 7]
            for name in ("T", "B", "S")[:symbols]:
                self.symbols.append(self.scope.symbol(name, rng.choice(hints)))
        self.inference = Inference(self.scope)
        self.steps: list[Leaf | Call] = []
        self.exact: dict[Ref, bool] = {}
        self.results: list[Result] = []

    # Sizes.

    def extent(self) -> int:
        """A size: plain, a symbol, or a formula of symbols."""
        if not self.symbols or self.rng.random() < 0.5:
            return self.rng.choice(EXTENTS)
        size = self.rng.choice(self.symbols)
        kind = self.rng.random()
        if kind < 0.7:
            return size
        if kind < 0.8:
            return size * self.rng.choice(self.symbols)
        return size * 2 if kind < 0.9 else size + 1

    def shape(self, ndim: int) -> tuple[int, ...]:
        while True:
            shape = tuple([self.extent() for _ in range(ndim)])
            if math.prod(map(hint, shape)) <= LIMIT // 2:
                return shape

    def broadcastable(self, shape: Shape) -> list[int]:
        kept = [1 if self.rng.random() < 0.3 else n for n in shape]
        return kept[self.rng.randrange(len(kept) + 1) if self.rng.random() < 0.3 else 0 :]

    def count(self, extent: int) -> int:
        """A number from 1 up to `extent`."""
        if isinstance(extent, Dim):
            return self.rng.choice([1, 2, extent])
        return self.rng.randint(1, extent)

    def place(self, extent: int) -> int:
        """An index below `extent`."""
        return self.rng.randrange(2 if isinstance(extent, Dim) else extent)

    # Values.

    def leaf(self, shape: Shape, dtype: torch.dtype = torch.float64, *, high: int = 4) -> Ref:
        low = -3 if dtype.is_floating_point else 0
        if dtype == torch.bool:
            high = 2
        owner = self.rng.random() < 0.15
        layout = random_layout(self.rng.choice, tuple(shape), self.mesh, owner=owner)
        kind = self.rng.choice([InputKind.USER, InputKind.PARAMETER])
        fill = Fill(self.rng.randrange(1 << 30), low, high)
        return self.add(Leaf(TensorType(tuple(shape), dtype), fill, layout, kind=kind))

    def whole(self, shape: Shape, dtype: torch.dtype, high: int, kind: str) -> Ref:
        """An integer input that every rank holds; see `Fill` for `kind`."""
        fill = Fill(self.rng.randrange(1 << 30), 0, high, kind)
        value = TensorType(tuple(shape), dtype)
        return self.add(Leaf(value, fill, Layout.replicated(self.mesh)))

    def add(self, leaf: Leaf) -> Ref:
        ref = Ref(len(self.steps))
        try:
            self.inference.leaf(ref, leaf.type, leaf.fill)
        except (RuntimeError, IndexError):
            raise UnsuitedError from None
        self.steps.append(leaf)
        self.exact[ref] = True
        return ref

    def type(self, ref: Ref) -> TensorType:
        return self.steps[ref.step].types[ref.result]

    def pick(
        self,
        wanted: Callable[[TensorType], bool] = lambda x: True,
        *,
        floats: bool = True,
        exact: bool = False,
    ) -> Ref:
        """A value of those drawn so far, late ones more likely."""
        found = [
            ref
            for ref in self.exact
            if (not floats or self.type(ref).dtype.is_floating_point)
            and (not exact or self.exact[ref])
            and wanted(self.type(ref))
        ]
        if not found:
            raise UnsuitedError
        return found[-1] if self.rng.random() < 0.4 else self.rng.choice(found)

    def ids(self, shape: Shape, count: int) -> Ref:
        """Integers below `count` of a shape: computed ones if there are, else an input."""
        if self.rng.random() < 0.5:
            for ref in reversed(self.exact):
                if self.type(ref) == TensorType(tuple(shape), torch.int64):
                    return self.call(torch.ops.aten.remainder.Scalar, ref, count)
        return self.leaf(shape, torch.int64, high=count)

    def like(self, dtype: torch.dtype, shape: Shape) -> Ref:
        """A value of a type and shape."""
        wanted = TensorType(tuple(shape), dtype)
        found = [ref for ref in self.exact if self.type(ref) == wanted]
        if found and self.rng.random() < 0.6:
            return self.rng.choice(found)
        return self.leaf(shape, dtype)

    def dim(self, value: TensorType) -> int:
        """A dim of a value, sometimes counted from the end."""
        if not value.ndim:
            raise UnsuitedError
        dim = self.rng.randrange(value.ndim)
        return dim - value.ndim if self.rng.random() < 0.3 else dim

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    # Calls.

    def call(
        self, target: torch._ops.OpOverload, *args: Any, inexact: bool = False, **kwargs: Any
    ) -> Ref:
        """Run an op; it becomes a step if its result is of use."""
        first = Ref(len(self.steps))
        types = self.inference.call(first, target, args, kwargs)
        self.steps.append(Call(target, args, kwargs, types))
        exact = not inexact and all(self.exact[ref] for ref in refs_in([list(args), kwargs]))
        for place, value in enumerate(types):
            ref = Ref(first.step, place)
            x = self.inference.values[ref]
            small = not value.dtype.is_floating_point or not x.numel() or float(x.abs().max()) < 999
            self.exact[ref] = exact and small
        return first

    def attempt(self, family: Family) -> None:
        """Draw from a family; nothing is left of it if the values do not suit it."""
        mark = len(self.steps)
        try:
            family(self)
        except UnsuitedError:
            if not any(isinstance(step, Call) for step in self.steps[mark:]):
                for ref in [ref for ref in self.exact if ref.step >= mark]:
                    del self.exact[ref]
                del self.steps[mark:]

    # Outputs.

    def choose_results(self) -> None:
        """What nothing uses is an output, sometimes pinned to a layout."""
        used = {ref for step in self.steps if isinstance(step, Call) for ref in step.refs}
        used |= {result.ref for result in self.results}
        calls = [ref for ref in self.exact if isinstance(self.steps[ref.step], Call)]
        unused = [ref for ref in calls if ref not in used]
        others = sorted(ref for ref in calls if ref in used)
        chosen = unused[:4] + ([self.rng.choice(others)] if others and self.flag() else [])
        for ref in chosen:
            pinned = None
            if self.rng.random() < 0.4:
                pinned = random_layout(self.rng.choice, self.type(ref).shape, self.mesh)
            self.results.append(Result(ref, pinned=pinned))

    def mutate(self, write: Callable[[Draw, Ref], Ref]) -> None:
        """Sometimes one input is a cache that the program writes to."""
        if self.rng.random() > 0.35:
            return
        leaves = [
            i
            for i, step in enumerate(self.steps)
            if isinstance(step, Leaf) and step.type.ndim and step.type.dtype.is_floating_point
        ]
        index = self.rng.choice(leaves)
        leaf = self.steps[index]
        assert isinstance(leaf, Leaf)
        try:
            new = write(self, Ref(index))
        except UnsuitedError:
            return
        self.steps[index] = replace(leaf, mutated=True)
        self.results.append(Result(new, mutates=index))


Family = Callable[[Draw], Ref]
"""Adds one or several calls, or raises `UnsuitedError`."""


def hint(size: int) -> int:
    """A size's value at the hints."""
    return size.hint if isinstance(size, Dim) else size


def dim_of(value: TensorType) -> bool:
    """Whether a value has a dim, and elements."""
    return value.ndim >= 1 and all(hint(size) for size in value.shape)
