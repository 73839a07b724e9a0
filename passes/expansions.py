"""Expansions: of which products `X @ W` the features of an attention's keys or values are made.

Models expand what they cache: keys of many heads are a product of a small latent and a weight, cut
into heads and put together with features that all heads share. `read_operand` follows such an
operand back through what only moves its elements (reshapes, transposes, expands, slices, splits,
concatenations, copies into a slice), multiplies it by a number or widens its dtype, to where its
features come from. Dims are followed as axes, so that every piece says which dim of its source is
which axis of the operand.

Invariants: the pieces are disjoint, in order, and make up all features of the operand; an axis that
a piece's dims lack is one along which the piece repeats.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from rolemesh.compiler.ir.program import operand_nodes, tensor_type, tensor_types
from rolemesh.passes.calls import op_call
from rolemesh.passes.rules.registry import Rules

__all__ = ["Axes", "Dims", "Expansion", "Operand", "Piece", "Placed", "read_operand"]

aten = torch.ops.aten

Dims = tuple[tuple[int, ...], ...]
"""Per dim of a value, its axes, major to minor; a dim of extent one may have none."""

_VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
    }
)
"""Ops whose sharding rule says which digits of the operand's dims the result's dims are."""

_SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default})
_FACTORS = frozenset({aten.mul.Tensor, aten.mul.Scalar})
_DIVISORS = frozenset({aten.div.Tensor, aten.div.Scalar})


class Axes:
    """Axes of an operand and of what it is made of; an axis may turn out to be several.

    An axis is a number. Axes of extent one are left out wherever axes are listed.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._parts: dict[int, tuple[int, int]] = {}

    def new(self, size: int) -> int:
        """Another axis."""
        self._sizes.append(size)
        return len(self._sizes) - 1

    def dims(self, shape: Sequence[int]) -> Dims:
        """An axis per dim."""
        return tuple((self.new(size),) for size in shape)

    def flat(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The same axes, in place of each that was split its parts."""
        found: list[int] = []
        for axis in axes:
            if axis in self._parts:
                found.extend(self.flat(self._parts[axis]))
            elif self._sizes[axis] != 1:
                found.append(axis)
        return tuple(found)

    def extent(self, axes: Sequence[int]) -> int:
        """The product of their extents."""
        return math.prod(self._sizes[axis] for axis in axes)

    def digits(self, axes: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]] | None:
        """Axes of each of the digits that a dim is made of, both major to minor.

        Axes that straddle two digits are split. None if a digit ends within an axis that it does
        not divide.
        """
        rest = list(self.flat(axes))
        found: list[tuple[int, ...]] = []
        for size in sizes:
            taken: list[int] = []
            while size != 1:
                if not rest:
                    return None
                axis = rest.pop(0)
                extent = self._sizes[axis]
                if size % extent == 0:
                    taken.append(axis)
                    size //= extent
                elif extent % size == 0:
                    major, minor = self.new(size), self.new(extent // size)
                    self._parts[axis] = (major, minor)
                    taken.append(major)
                    rest.insert(0, minor)
                    size = 1
                else:
                    return None
            found.append(tuple(taken))
        return None if rest else found


@dataclass(frozen=True)
class Placed:
    """A value with the axes of its dims."""

    value: fx.Node
    dims: Dims


@dataclass(frozen=True)
class Expansion:
    """A product `X @ W`.

    Attributes:
        product: The product.
        latent: The axis that it sums over.
        weight: The `W`.
    """

    product: fx.Node
    latent: int
    weight: Placed


@dataclass(frozen=True)
class Piece:
    """A run of an operand's features.

    Attributes:
        source: What they come from: the `X` of a product, or any value.
        feature: Their axis, of the source or of the expansion's weight.
        start: First of them along that axis.
        length: How many they are.
        scale: What they are multiplied by.
        expansion: What expands the source to them; None if nothing does.
    """

    source: Placed
    feature: int
    start: int
    length: int
    scale: float
    expansion: Expansion | None = None


@dataclass(frozen=True)
class Operand:
    """What an operand of attention is made of.

    Attributes:
        pieces: Runs of its features, in order.
        dims: Axes of its own dims.
        passed: Values on the way from products to the operand, which is one of them.
    """

    pieces: tuple[Piece, ...]
    dims: Dims
    passed: frozenset[fx.Node]

    @property
    def products(self) -> frozenset[fx.Node]:
        """The products that expand something to it."""
        return frozenset(p.expansion.product for p in self.pieces if p.expansion is not None)


def read_operand(value: fx.Node, feature: int, rules: Rules, axes: Axes) -> Operand | None:
    """What an operand's features come from.

    Args:
        value: The operand.
        feature: Its dim of features.
        rules: Sharding rules, which say what ops that move elements do.
        axes: Where its axes are noted.

    Returns:
        Its pieces; None if some of its features are not known to come from anywhere.
    """
    dims = axes.dims(tensor_type(value).shape)
    reader = _Reader(rules, axes)
    (axis,) = dims[feature]
    pieces = reader.pieces(_Run(value, dims, axis, 0, tensor_type(value).shape[feature]))
    if pieces is None:
        return None
    return Operand(tuple(pieces), dims, frozenset(reader.passed))


@dataclass(frozen=True)
class _Run:
    """Features `[start, start + length)` of a value, along one of its axes."""

    value: fx.Node
    dims: Dims
    feature: int
    start: int
    length: int
    scale: float = 1.0


@dataclass
class _Reader:
    """Follows runs backward."""

    rules: Rules
    axes: Axes
    passed: set[fx.Node] = field(default_factory=set)

    def pieces(self, run: _Run) -> list[Piece] | None:
        """What a run is made of; None if part of it is not known."""
        while True:
            node = run.value
            if node.target in (aten.empty.memory_format, aten.new_empty.default):
                return None
            if node.target in (aten.cat.default, aten.slice_scatter.default):
                parts = self._joined(run)
                if parts is not None:
                    return self._all(node, parts)
            if node.target is aten.mm.default:
                found = self._product(run)
                if found is not None:
                    return [found]
            before = self._before(run) if node.op == "call_function" else None
            if before is None:
                source = Placed(node, run.dims)
                return [Piece(source, run.feature, run.start, run.length, run.scale)]
            self.passed.add(node)
            run = before

    def _all(self, node: fx.Node, parts: Sequence[_Run]) -> list[Piece] | None:
        self.passed.add(node)
        found: list[Piece] = []
        for part in parts:
            pieces = self.pieces(part)
            if pieces is None:
                return None
            found += pieces
        return found

    def _product(self, run: _Run) -> Piece | None:
        """The run as columns of a product, if its features are columns."""
        source, weight = run.value.args
        assert isinstance(source, fx.Node)
        assert isinstance(weight, fx.Node)
        rows, columns = run.dims
        if run.feature not in self.axes.flat(columns):
            return None
        self.passed.add(run.value)
        latent = self.axes.new(tensor_type(weight).shape[0])
        expansion = Expansion(run.value, latent, self._plain(weight, ((latent,), columns), latent))
        expanded = self._plain(source, (rows, (latent,)), latent)
        return Piece(expanded, run.feature, run.start, run.length, run.scale, expansion)

    def _plain(self, value: fx.Node, dims: Dims, feature: int) -> Placed:
        """A value before reshapes and the like."""
        run = _Run(value, dims, feature, 0, 0)
        while run.value.target in _VIEWS and (before := self._view(run)) is not None:
            run = before
        return Placed(run.value, run.dims)

    def _before(self, run: _Run) -> _Run | None:
        """The run as features of the one value that its value is another form of."""
        node, target = run.value, run.value.target
        if target in _VIEWS:
            return self._view(run)
        if target is operator.getitem or target is aten.slice.Tensor:
            return self._cut(run)
        source = operand_nodes(node)[0] if operand_nodes(node) else None
        if source is None:
            return None
        if target is aten.clone.default or (
            target is aten._to_copy.default and _widens(tensor_type(source).dtype, node)
        ):
            return replace(run, value=source)
        if target in _FACTORS or target in _DIVISORS:
            factor = node.args[1]
            if node.args[0] is source and isinstance(factor, int | float) and factor:
                by = factor if target in _FACTORS else 1 / factor
                return replace(run, value=source, scale=run.scale * by)
        return None

    def _view(self, run: _Run) -> _Run | None:
        node = run.value
        (source,) = operand_nodes(node)
        rule = self.rules.rule(op_call(node), node.name)
        axes_of: dict[int, tuple[int, ...]] = {}
        for axes, factors in zip(run.dims, rule.results[0], strict=True):
            digits = self.axes.digits(axes, [rule.sizes[factor] for factor in factors])
            if digits is None:
                return None
            axes_of.update(zip(factors, digits, strict=True))
        if self.axes.flat((run.feature,)) != (run.feature,):
            return None  # features are not one axis of what the value is made of
        dims: list[tuple[int, ...]] = []
        for factors in rule.operands[0]:
            if any(rule.sizes[factor] != 1 and factor not in axes_of for factor in factors):
                return None
            dims.append(tuple(axis for factor in factors for axis in axes_of.get(factor, ())))
        if not any(run.feature in dim for dim in dims):
            return None
        return replace(run, value=source, dims=tuple(dims))

    def _feature_dim(self, run: _Run) -> int | None:
        """The dim that is the run's features and nothing else."""
        for dim, axes in enumerate(run.dims):
            if self.axes.flat(axes) == (run.feature,):
                return dim
        return None

    def _within(self, run: _Run, source: fx.Node, dim: int, start: int, length: int) -> _Run:
        """Some features of `source`, which are along its dim `dim`."""
        axis = self.axes.new(tensor_type(source).shape[dim])
        dims = (*run.dims[:dim], (axis,), *run.dims[dim + 1 :])
        return replace(run, value=source, dims=dims, feature=axis, start=start, length=length)

    def _cut(self, run: _Run) -> _Run | None:
        """Through a slice or a split along the features."""
        node, dim = run.value, self._feature_dim(run)
        if dim is None:
            return None
        if node.target is operator.getitem:
            split, index = node.args
            assert isinstance(split, fx.Node)
            assert isinstance(index, int)
            if split.target not in _SPLITS or _dim(split, 2) != dim:
                return None
            source = split.args[0]
            start = sum(kind.shape[dim] for kind in tensor_types(split)[:index])
            self.passed.add(split)
        else:
            source = node.args[0]
            if _dim(node, 1) != dim or _argument(node, 4, "step", 1) != 1:
                return None
            start = _argument(node, 2, "start", 0)
        assert isinstance(source, fx.Node)
        extent = tensor_type(source).shape[dim]
        start = start + extent if start < 0 else start
        return self._within(run, source, dim, start + run.start, run.length)

    def _joined(self, run: _Run) -> list[_Run] | None:
        """The runs of the values that were put next to each other, or into one another."""
        node, dim = run.value, self._feature_dim(run)
        end = run.start + run.length
        if node.target is aten.cat.default:
            if dim is None or _dim(node, 1) != dim:
                return None
            found, at = [], 0
            for source in operand_nodes(node):
                extent = tensor_type(source).shape[dim]
                first, last = max(run.start, at), min(end, at + extent)
                if first < last:
                    found.append(self._within(run, source, dim, first - at, last - first))
                at += extent
            return found
        base, source = operand_nodes(node)
        if dim is None or _dim(node, 2) != dim or _argument(node, 5, "step", 1) != 1:
            return None
        at = _argument(node, 3, "start", 0)
        stop = at + tensor_type(source).shape[dim]
        if at < 0:
            return None
        runs = (
            (base, 0, run.start, min(end, at)),
            (source, at, max(run.start, at), min(end, stop)),
            (base, 0, max(run.start, stop), end),
        )
        return [
            self._within(run, value, dim, first - offset, last - first)
            for value, offset, first, last in runs
            if first < last
        ]


def _dim(node: fx.Node, position: int) -> int:
    """The dim argument of an op, counted from the first dim of its first operand."""
    ndim = tensor_type(operand_nodes(node)[0]).ndim
    return _argument(node, position, "dim", 0) % ndim


def _argument(node: fx.Node, position: int, name: str, default: int) -> int:
    given = node.args[position] if len(node.args) > position else node.kwargs.get(name)
    assert given is None or isinstance(given, int)
    return default if given is None else given


def _widens(source: torch.dtype, node: fx.Node) -> bool:
    """Whether every number of one dtype is one of a cast's result."""
    result = tensor_type(node).dtype
    return (
        source.is_floating_point
        and result.is_floating_point
        and torch.promote_types(source, result) == result
    )
