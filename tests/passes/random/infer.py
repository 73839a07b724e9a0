"""Types of op calls with symbolic sizes: by running the op, and reading off the sizes it gives.

Each call runs twice: on tensors at the hints, and without storage at sizes so far apart that a
result's extent has one reading as a formula. What has none is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from tests.passes.random.case import Call, Case, Fill, Leaf, Ref, refs_in, replaced

from rolemesh.compiler.ir.dims import Dim, Scope, concrete
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["Inference", "UnsuitedError", "retyped"]

LIMIT = 400
"""Elements of the largest value, at the hints."""
_FAR = (1009, 100_003, 10_000_019)
_LARGEST = 600
"""Plain sizes stay below this, sizes with a symbol above it."""


class UnsuitedError(Exception):
    """The values at hand do not suit the op that was drawn."""


class Inference:
    """The values of a case under construction.

    Args:
        scope: The symbols; None if there are none.

    Attributes:
        values: Every value at the hints.
    """

    def __init__(self, scope: Scope | None) -> None:
        self._scope = scope
        self._far: Mapping[sympy.Symbol, int] = (
            {} if scope is None else dict(zip(scope.hints, _FAR, strict=False))
        )
        self._hints: Mapping[sympy.Symbol, int] = {} if scope is None else scope.hints
        self.values: dict[Ref, torch.Tensor] = {}
        self._ghosts: dict[Ref, torch.Tensor] = {}
        self._known: dict[int, int] = {}

    def leaf(self, ref: Ref, value: TensorType, fill: Fill) -> None:
        """Add an input."""
        self.values[ref] = fill.tensor(value, self._hints)
        self._learn(value.shape)
        shape = concrete(tuple(value.shape), self._far)
        self._ghosts[ref] = torch.empty(shape, dtype=value.dtype, device="meta")

    def call(
        self,
        ref: Ref,
        target: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[TensorType, ...]:
        """Add a call; its results' types.

        Args:
            ref: Its first result.
            target: The op.
            args: Its arguments.
            kwargs: Its arguments by name.

        Raises:
            UnsuitedError: If the op refuses, its values are too large or not finite, or an extent
                has no formula.
        """
        try:
            given = target(*self._run(args, self.values, self._hints),
                           **self._run(kwargs, self.values, self._hints))  # fmt: skip
            values = tuple(given) if isinstance(given, tuple | list) else (given,)
            if not all(_tame(x) for x in values):
                raise UnsuitedError
            ghosts = self._ghost(target, args, kwargs, values)
        except (RuntimeError, IndexError, NotImplementedError, TypeError):
            raise UnsuitedError from None
        if len(values) != len(ghosts):
            raise UnsuitedError
        types = []
        for place, (x, ghost) in enumerate(zip(values, ghosts, strict=True)):
            extents = tuple([self._size(extent) for extent in ghost.shape])
            if concrete(extents, self._hints) != tuple(x.shape):
                raise UnsuitedError
            types.append(TensorType(extents, x.dtype))
            self.values[Ref(ref.step, place)] = x
            self._ghosts[Ref(ref.step, place)] = ghost
        return tuple(types)

    def _run(self, value: Any, tensors: Mapping[Ref, torch.Tensor], values: Any) -> Any:
        return concrete(replaced(value, tensors.__getitem__), values)

    def _ghost(
        self,
        target: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        self._learn(_sizes_in([args, kwargs]))
        ghosts = [self._ghosts[ref] for ref in refs_in([args, kwargs])]
        if target is torch.ops.aten._grouped_mm.default:  # without storage it takes bf16 only
            rows, columns = ghosts[0].shape[0], ghosts[1].shape[2]
            return (torch.empty(rows, columns, dtype=values[0].dtype, device="meta"),)
        is_plain = all(size < _LARGEST for ghost in ghosts for size in ghost.shape)
        if is_plain and not any(isinstance(n, Dim) for n in _sizes_in([args, kwargs])):
            return tuple([torch.empty_like(x, device="meta") for x in values])
        kwargs = self._run(kwargs, self._ghosts, self._far)
        if not ghosts:
            kwargs["device"] = "meta"
        given = target(*self._run(args, self._ghosts, self._far), **kwargs)
        return tuple(given) if isinstance(given, tuple | list) else (given,)

    def _learn(self, sizes: Any) -> None:
        for size in sizes:
            if isinstance(size, Dim):
                self._known[concrete(size, self._far)] = size

    def _size(self, extent: int) -> int:
        """The size that an extent stands for."""
        if extent < _LARGEST:
            return extent
        found = self._known.get(extent)
        if found is None:
            found = self._known[extent] = self._read(extent)
        return found

    def _read(self, extent: int) -> int:
        """A new extent as a formula of known ones."""
        pairs = itertools.combinations_with_replacement(tuple(self._known.items()), 2)
        for (a, first), (b, second) in pairs:
            if a * b == extent:
                return first * second
            if a + b == extent:
                return first + second
        for known, size in self._known.items():
            if known % extent == 0 and known // extent < _LARGEST:
                return size // (known // extent)
            if (known + 1) // 2 == extent:
                return (size + 1) // 2
            times, rest = divmod(extent + 20, known)
            if 0 < times < 50 and rest < 41:
                return size * times + (rest - 20)
        raise UnsuitedError


def _sizes_in(value: Any) -> list[int]:
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [value]
    if isinstance(value, dict):
        return _sizes_in(list(value.values()))
    if isinstance(value, list | tuple):
        return [size for item in value for size in _sizes_in(item)]
    return []


def _tame(x: torch.Tensor) -> bool:
    if x.numel() > LIMIT or x.ndim > 5:
        return False
    if not x.is_floating_point() or not x.numel():
        return True
    return bool(x.isfinite().all()) and float(x.abs().max()) < 1e7


def retyped(case: Case) -> Case | None:
    """The case with the types that its calls give now; None if one refuses."""
    inference = Inference(case.scope)
    steps: list[Leaf | Call] = []
    for index, step in enumerate(case.steps):
        try:
            if isinstance(step, Leaf):
                inference.leaf(Ref(index), step.type, step.fill)
                steps.append(step)
                continue
            types = inference.call(Ref(index), step.target, step.args, step.kwargs)
        except (UnsuitedError, RuntimeError, IndexError):
            return None
        steps.append(Call(step.target, step.args, step.kwargs, types))
    return Case(case.mesh, tuple(steps), case.results, case.scope, case.runs)
