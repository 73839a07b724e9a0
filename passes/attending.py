"""The forms of attention whose keys or values a weight may expand, and each one's other side.

Batched products around a softmax, PyTorch's fused attention for CPUs, and `rolemesh::attention` and
`rolemesh::sparse_attention`, which stay what they are with one head of keys for all queries.

Invariant: what is emitted has the type of what it stands for, and reads no value that it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir.program import tensor_type
from rolemesh.passes.canonical_forms import Emitter, arguments
from rolemesh.passes.reassociate import Writer
from rolemesh.passes.rules.registry import Rules
from rolemesh.passes.sides import Side, read_side
from rolemesh.passes.stops import SOFTMAX

__all__ = ["Attending", "find_attending"]

aten = torch.ops.aten


class Attending(Protocol):
    """An op of attention that reads expanded keys or values, or both."""

    @property
    def node(self) -> fx.Node:
        """The op."""
        ...

    @property
    def sides(self) -> tuple[Side, ...]:
        """What it reads."""
        ...

    @property
    def flops(self) -> int:
        """Operations of its re-associated form."""
        ...

    def emit(self, new: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Its re-associated form.

        Args:
            new: Where it goes; its current node is `node`.
            values: The new graph's values of those of the old one.
        """
        ...


def find_attending(node: fx.Node, rules: Rules) -> Attending | None:
    """The attention that an op is, or is a part of; None if it reads nothing expanded.

    Args:
        node: An op.
        rules: Sharding rules.
    """
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    find = _FORMS.get(target._schema.name)
    return None if find is None else find(node, rules)


@dataclass(frozen=True)
class _Scores:
    """A batched product of queries `[.., rows, width]` and turned keys `[.., width, keys]`."""

    node: fx.Node
    side: Side

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.side,)

    @property
    def flops(self) -> int:
        product, rows, keys = tensor_type(self.node).shape
        return self.side.flops(product * rows, keys)

    def emit(self, new: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        writer = Writer(new, values)
        batch, heads, group, _ = self.side.shape
        query = values[self.node.all_input_nodes[0]]
        (_, rows, width), dtype = tensor_type(query)
        query = writer.reshape(query, batch, heads, group * rows, width)
        return _as(new, self.node, writer.scores(query, self.side, dtype))


@dataclass(frozen=True)
class _Results:
    """A batched product of weights `[.., rows, keys]` and values `[.., keys, width]`."""

    node: fx.Node
    side: Side

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.side,)

    @property
    def flops(self) -> int:
        product, rows, keys = tensor_type(self.node.all_input_nodes[0]).shape
        return self.side.flops(product * rows, keys)

    def emit(self, new: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        writer = Writer(new, values)
        batch, heads, group, keys = self.side.shape
        weights = values[self.node.all_input_nodes[0]]
        (_, rows, _), dtype = tensor_type(weights)
        weights = writer.reshape(weights, batch * heads, group * rows, keys)
        return _as(new, self.node, writer.results(weights, self.side, dtype))


@dataclass(frozen=True)
class _Fused:
    """PyTorch's fused attention for CPUs.

    It takes keys and values of one width, so it is taken apart. Scores are in float32, as it
    computes them.
    """

    node: fx.Node
    key: Side
    value: Side

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.key, self.value)

    @property
    def flops(self) -> int:
        *lead, _ = tensor_type(self.node.all_input_nodes[0]).shape
        return sum(side.flops(math.prod(lead), side.shape[3]) for side in self.sides)

    def emit(self, new: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        writer = Writer(new, values)
        operands, scale = _operands(self.node), _arguments(self.node)["scale"]
        query, mask = values[operands["query"]], operands.get("attn_mask")
        (batch, heads, rows, width), dtype = tensor_type(query)
        precise = torch.promote_types(dtype, torch.float32)
        factor = scale if isinstance(scale, float) else 1 / math.sqrt(width)
        query = writer.times(writer.cast(query, precise), factor)
        keys = self.key.shape[3]
        shape = (batch, heads, rows, keys)
        scores = writer.reshape(writer.scores(query, self.key, precise), *shape)
        if mask is not None:
            added = writer.cast(values[mask], precise)
            scores = writer.op(aten.add.Tensor, (scores, added), shape, precise)
        weights = writer.op(aten._safe_softmax.default, (scores, -1), shape, precise)
        weights = writer.reshape(weights, batch * heads, rows, keys)
        found = writer.results(weights, self.value, precise)
        return writer.cast(found, dtype)


@dataclass(frozen=True)
class _Composite:
    """`rolemesh::attention`, or `rolemesh::sparse_attention`: the same with one head of keys.

    Features that no weight expands become the tail of queries and keys.
    """

    node: fx.Node
    key: Side
    value: Side

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.key, self.value)

    @property
    def flops(self) -> int:
        operands = _operands(self.node)
        *lead, _ = tensor_type(operands["query"]).shape
        indices = operands.get("indices")
        seen = self.key.shape[3] if indices is None else tensor_type(indices).shape[-1]
        return sum(side.flops(math.prod(lead), seen) for side in self.sides)

    def emit(self, new: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        writer = Writer(new, values)
        operands = {name: values[operand] for name, operand in _operands(self.node).items()}
        query, key, value = operands["query"], self.key, self.value
        (batch, all_heads, rows, _), dtype = tensor_type(query)
        _, heads, group, keys = key.shape
        latents: list[tuple[fx.Node, fx.Node]] = []
        others: list[tuple[fx.Node, fx.Node]] = []
        start, scale = 0, key.operand.pieces[0].scale
        query = writer.times(query, scale)
        for piece in key.operand.pieces:
            part = writer.features(query, 3, start, piece.length)
            part = writer.times(part, piece.scale / scale)
            start += piece.length
            if piece.expansion is not None:
                part = writer.reshape(part, batch, heads, group * rows, piece.length)
                part = writer.weighted(part, writer.weight(key, piece), batch, heads, dtype)
                part = writer.reshape(part, batch, all_heads, rows, key.width(piece))
            cached = writer.reshape(
                writer.cached(key, piece, dtype), batch, 1, keys, key.width(piece)
            )
            (others if piece.expansion is None else latents).append((part, cached))
        # Latents and other features are cached in two tensors: joining them would copy both.
        operands["query"], operands["key"] = latents[0]
        tail = [*latents[1:], *others]
        if tail:
            operands["query_tail"], operands["key_tail"] = map(writer.cat, zip(*tail, strict=True))
        (piece,) = value.operand.pieces
        latent = value.width(piece)
        cached = writer.cached(value, piece, dtype)
        operands["value"] = writer.reshape(cached, batch, 1, keys, latent)
        target = self.node.target
        assert isinstance(target, OpOverload)
        shape = (batch, rows, all_heads, latent)
        found = writer.op(
            target, tuple({**_arguments(self.node), **operands}.values()), shape, dtype
        )
        found = writer.reshape(found, batch, rows, heads, group * latent)
        found = writer.reshape(
            writer.permute(found, 0, 2, 1, 3), batch, heads, rows * group, latent
        )
        weight = writer.turned(writer.weight(value, piece))
        found = writer.weighted(found, weight, batch, heads, dtype)
        found = writer.reshape(found, batch, heads, rows, group * piece.length)
        found = writer.times(writer.permute(found, 0, 2, 1, 3), piece.scale)
        return _as(new, self.node, found)


def _as(new: Emitter, node: fx.Node, value: fx.Node) -> fx.Node:
    """A value in the shape, and with the name, of the op that it stands for."""
    kind = tensor_type(node)
    if tensor_type(value).shape == kind.shape:
        return value
    return new.emit(aten.reshape.default, (value, list(kind.shape)), kind)


def _arguments(node: fx.Node) -> Mapping[str, object]:
    assert isinstance(node.target, OpOverload)
    return arguments(node.target, node.args, node.kwargs)


def _operands(node: fx.Node) -> Mapping[str, fx.Node]:
    """Those of its arguments that are computed, by name."""
    return {name: x for name, x in _arguments(node).items() if isinstance(x, fx.Node)}


def _product(node: fx.Node, rules: Rules) -> Attending | None:
    _, right = node.args
    assert isinstance(right, fx.Node)
    if _leads_to_softmax(node):
        side = read_side(right, (0,), 2, 1, rules)
        return None if side is None else _Scores(node, side)
    if _reads_softmax(node):
        side = read_side(right, (0,), 1, 2, rules)
        return None if side is None else _Results(node, side)
    return None


def _key_and_value(node: fx.Node, rules: Rules) -> tuple[Side, Side] | None:
    found = []
    for name in ("key", "value"):
        side = read_side(_operands(node)[name], (0, 1), 2, 3, rules)
        if side is None:
            return None
        found.append(side)
    key, value = found
    return (key, value) if key.shape == value.shape else None


def _fused(node: fx.Node, rules: Rules) -> Attending | None:
    given = _arguments(node)
    if given["dropout_p"] or given["is_causal"] or any(user.args[1] for user in node.users):
        return None
    sides = _key_and_value(node, rules)
    return None if sides is None else _Fused(node, *sides)


def _composite(node: fx.Node, rules: Rules) -> Attending | None:
    if _arguments(node)["key_tail"] is not None:  # whether heads share it is not read
        return None
    sides = _key_and_value(node, rules)
    if sides is None or len(sides[1].operand.pieces) > 1:
        return None
    if not all(side.is_shared(piece) for side in sides for piece in side.operand.pieces):
        return None
    return _Composite(node, *sides)


_FORMS: Mapping[str, Callable[[fx.Node, Rules], Attending | None]] = MappingProxyType(
    {
        "aten::bmm": _product,
        "aten::_scaled_dot_product_flash_attention_for_cpu": _fused,
        "rolemesh::attention": _composite,
        "rolemesh::sparse_attention": _composite,
    }
)


_MOVES = frozenset(
    {aten.reshape.default, aten.expand.default, aten.clone.default, aten._to_copy.default}
)


def _leads_to_softmax(node: fx.Node) -> bool:
    """Whether a product is the scores of a softmax, perhaps scaled, capped or masked."""
    seen, queue = {node}, [node]
    while queue:
        for user in queue.pop().users:
            if user.target in SOFTMAX:
                return True
            if user not in seen and _is_pointwise(user):
                seen.add(user)
                queue.append(user)
    return False


def _reads_softmax(node: fx.Node) -> bool:
    """Whether the first factor of a product is what a softmax gives."""
    value = node.args[0]
    while isinstance(value, fx.Node) and value.target not in SOFTMAX:
        if not _is_pointwise(value):
            return False
        value = value.args[0]
    return isinstance(value, fx.Node)


def _is_pointwise(node: fx.Node) -> bool:
    return node.target in _MOVES or torch.Tag.pointwise in getattr(node.target, "tags", ())
