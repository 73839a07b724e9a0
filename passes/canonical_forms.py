"""Canonical forms of single ops: what `canonicalise` rewrites an op to, and how it emits nodes.

`REWRITES` is the table: op name -> a function that emits the op's canonical form through an
`Emitter` and returns the node that stands for its result, or None to leave the op as it is.

An `Emitter` gives one node for equal ops, so a rewrite need not know what others have emitted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir.nodes import add_call
from rolemesh.compiler.ir.program import Origin, origin, tensor_type, tensor_types
from rolemesh.compiler.ir.tensor import TensorType

__all__ = ["REWRITES", "Arguments", "Emitter", "Rewrite", "arguments"]

aten = torch.ops.aten

_CAUSAL_MASKS: Mapping[str, str] = MappingProxyType(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attn_mask",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward": "attn_mask",
        "aten::_scaled_dot_product_efficient_attention": "attn_bias",
        "aten::_scaled_dot_product_fused_attention_overrideable": "attn_bias",
    }
)
"""Fused attention op -> its additive mask argument; `is_causal` compares plain row and column."""


_ZEROS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})

Arguments = Mapping[str, object]
"""Arguments of an op by the names in its schema, defaults filled in."""

_Call = tuple[Callable[..., object], tuple[object, ...], TensorType]
"""An op, its positional arguments, and the type of its result."""


class Emitter:
    """Adds nodes to a new graph on behalf of one op of the old graph at a time.

    Attributes:
        graph: The new graph.
        current: The old node whose form is being emitted.
        device_option: The device that ops create tensors on, as a keyword argument, if it is known.
    """

    def __init__(self, old: fx.Graph, escaping: Collection[fx.Node]) -> None:
        """Start an empty graph.

        Args:
            old: The graph that is rewritten.
            escaping: Old nodes whose memory a result of the model may be; their values are not
                shared with equal ones.
        """
        self.graph = fx.Graph()
        self.current = old.output_node()
        self._escaping = escaping
        device = _device(old)
        self.device_option: dict[str, object] = {} if device is None else {"device": device}
        self._emitted: dict[object, fx.Node] = {}
        self._pure: dict[int, bool] = {}  # by the id of an op, whose own hash is a call of Python's

    def emit(
        self,
        target: Callable[..., object],
        args: Sequence[object],
        meta: TensorType | tuple[TensorType, ...],
        kwargs: Mapping[str, object] | None = None,
        name: str = "",
    ) -> fx.Node:
        """The value of the op at hand: a new node, or an equal one that is there already.

        Args:
            target: The op.
            args: Positional arguments over the new graph.
            meta: Type of the result, or of each result.
            kwargs: Keyword arguments.
            name: Name of a new node, if not that of the captured one.
        """
        return self._node(
            name or self.current.name,
            (target, tuple(args), dict(kwargs or {})),
            meta,
            origin(self.current),
            shareable=self.current not in self._escaping,
        )

    def emit_part(
        self,
        name: str,
        target: Callable[..., object],
        args: Sequence[object],
        meta: TensorType,
        kwargs: Mapping[str, object] | None = None,
        reason: str = "",
    ) -> fx.Node:
        """A value on the way to that of the op at hand.

        Args:
            name: Name of a new node.
            target: The op.
            args: Positional arguments over the new graph.
            meta: Type of the result.
            kwargs: Keyword arguments.
            reason: Why it is there, if it is more than a form of the captured op.
        """
        where: Origin = origin(self.current)
        where = replace(where, reason=reason) if reason else where
        return self._node(name, (target, tuple(args), dict(kwargs or {})), meta, where)

    def _node(
        self,
        name: str,
        call: tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]],
        meta: TensorType | tuple[TensorType, ...],
        where: Origin,
        shareable: bool = True,
    ) -> fx.Node:
        target, args, kwargs = call
        pure = self._pure.get(id(target))
        if pure is None:
            pure = self._pure[id(target)] = _is_pure(target)
        key = (id(target), _key(args), _key(kwargs) if kwargs else None, meta) if pure else None
        found = self._emitted.get(key)
        if found is not None and shareable:
            return found
        node = add_call(self.graph, target, args, kwargs, name)
        node.meta["type"] = meta
        node.meta["origin"] = where
        if pure and found is None:
            self._emitted[key] = node
        return node

    def escapes(self, node: fx.Node) -> bool:
        """Whether a result of the model may be the memory of this old node."""
        return node in self._escaping

    def causal_mask(self, rows: int, columns: int, dtype: torch.dtype) -> fx.Node:
        """`[1, 1, rows, columns]`: 0 where the column is not after the row, else minus infinity."""
        device = self.device_option

        def part(
            name: str,
            target: Callable[..., object],
            args: Sequence[object],
            shape: tuple[int, ...],
            dtype: torch.dtype,
            **kwargs: object,
        ) -> fx.Node:
            reason = "the causal mask as an operand, so that query rows can shard"
            return self.emit_part(name, target, args, TensorType(shape, dtype), kwargs, reason)

        def iota(name: str, length: int, shape: tuple[int, ...]) -> fx.Node:
            line = part(
                f"{name}s", aten.arange.default, (length,), (length,), torch.int64, **device
            )
            return part(name, aten.reshape.default, (line, list(shape)), shape, torch.int64)

        def scalar(name: str, value: float) -> fx.Node:
            options = {"dtype": dtype, **device}
            return self.emit_part(
                name, aten.scalar_tensor.default, (value,), TensorType((), dtype), options
            )

        shape = (1, 1, rows, columns)
        row = iota("causal_row", rows, (1, 1, rows, 1))
        column = iota("causal_column", columns, (1, 1, 1, columns))
        seen = part("causal_seen", aten.le.Tensor, (column, row), shape, torch.bool)
        choices = (seen, scalar("zero", 0.0), scalar("minus_infinity", float("-inf")))
        return part("causal_mask", aten.where.self, choices, shape, dtype)


def _sum(new: Emitter, node: fx.Node, product: _Call, args: Arguments) -> fx.Node:
    """`beta * self + alpha * product`; `self` is not read if `beta` is 0."""
    kind = tensor_type(node)
    alpha, beta, bias = args["alpha"], args["beta"], args["self"]
    assert isinstance(bias, fx.Node)
    if beta == 0 and alpha == 1:
        return new.emit(*product)
    total = new.emit_part(f"{node.name}_product", *product)
    if beta == 0:
        return new.emit(aten.mul.Tensor, (total, alpha), kind)
    if alpha != 1:
        total = new.emit_part(f"{node.name}_scaled", aten.mul.Tensor, (total, alpha), kind)
    if beta != 1:
        bias = new.emit_part(f"{node.name}_bias", aten.mul.Tensor, (bias, beta), tensor_type(bias))
    return new.emit(aten.add.Tensor, (total, bias), kind)


def _addmm(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node:
    operands = (args["mat1"], args["mat2"])
    return _sum(new, node, (aten.mm.default, operands, tensor_type(node)), args)


def _baddbmm(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node:
    operands = (args["batch1"], args["batch2"])
    return _sum(new, node, (aten.bmm.default, operands, tensor_type(node)), args)


def _addbmm(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node:
    operands = (args["batch1"], args["batch2"])
    assert isinstance(operands[0], fx.Node)
    shape, dtype = tensor_type(node)
    batched = TensorType((tensor_type(operands[0]).shape[0], *shape), dtype)
    products = new.emit_part(f"{node.name}_products", aten.bmm.default, operands, batched)
    call = (aten.sum.dim_IntList, (products, [0]), tensor_type(node))
    return _sum(new, node, call, args)


def _bmm(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    """A batch of rows times one matrix, which ATen expands where the rows are no view."""
    rows, expanded = args["self"], args["mat2"]
    assert isinstance(rows, fx.Node)
    assert isinstance(expanded, fx.Node)
    (batch, count, depth), dtype = tensor_type(rows)
    if expanded.target is not aten.expand.default:
        return None
    matrix = expanded.all_input_nodes[0]
    shape = tensor_type(matrix).shape
    if len(shape) != 2 or shape != tensor_type(expanded).shape[1:]:
        return None
    flat = TensorType((batch * count, depth), dtype)
    rows = new.emit_part(f"{node.name}_rows", aten.reshape.default, (rows, list(flat.shape)), flat)
    kind = TensorType((batch * count, shape[1]), dtype)
    product = new.emit_part(f"{node.name}_product", aten.mm.default, (rows, matrix), kind)
    result = tensor_type(node)
    return new.emit(aten.reshape.default, (product, list(result.shape)), result)


def _copy(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    value = args["src"]
    assert isinstance(value, fx.Node)
    shape, dtype = tensor_type(node)
    if tensor_type(value).dtype != dtype:
        cast = TensorType(tensor_type(value).shape, dtype)
        name = f"{node.name}_cast"
        value = new.emit_part(name, aten._to_copy.default, (value,), cast, {"dtype": dtype})
    if tensor_type(value).shape != shape:
        whole = TensorType(shape, dtype)
        name = f"{node.name}_expand"
        value = new.emit_part(name, aten.expand.default, (value, list(shape)), whole)
    if new.escapes(node):
        return new.emit(aten.clone.default, (value,), tensor_type(node))
    return value


def _masked_scatter(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    """Rows of `source` in the place of the rows that a mask `[.., 1]` picks, in order.

    As a choice between rows it shards like the rows: which row of `source` stands where is a
    cumulative sum over the mask, and that is small.
    """
    value, mask, source = args["self"], args["mask"], args["source"]
    assert isinstance(value, fx.Node)
    assert isinstance(mask, fx.Node)
    assert isinstance(source, fx.Node)
    shape, dtype = tensor_type(value)
    given = tensor_type(source).shape
    rows = (*shape[:-1], 1)
    if tensor_type(mask).shape != rows or len(shape) < 2 or given[-1:] != shape[-1:]:
        return None
    count, there = math.prod(shape[:-1]), math.prod(given[:-1])

    def part(name: str, target: OpOverload, args: Sequence[object], meta: TensorType) -> fx.Node:
        return new.emit_part(f"{node.name}_{name}", target, args, meta)

    integers = TensorType((count,), torch.int64)
    flat = part("mask", aten.reshape.default, (mask, [count]), TensorType((count,), torch.bool))
    before = part("count", aten.cumsum.default, (flat, 0), integers)
    last = part("last", aten.sub.Tensor, (before, 1), integers)
    index = part("index", aten.clamp.default, (last, 0, there - 1), integers)
    table_type = TensorType((there, shape[-1]), dtype)
    table = part("table", aten.reshape.default, (source, list(table_type.shape)), table_type)
    taken_type = TensorType((count, shape[-1]), dtype)
    taken = part("taken", aten.index_select.default, (table, 0, index), taken_type)
    placed = part("placed", aten.reshape.default, (taken, list(shape)), tensor_type(value))
    return new.emit(aten.where.self, (mask, placed, value), tensor_type(node))


def _index_put(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    """Rows added into zeros, as the gradient of a table that was looked up in: it sums over rows.

    `index_put` would need each row whole before it adds it to what is there.
    """
    table, value, indices = args["self"], args["values"], args["indices"]
    assert isinstance(table, fx.Node)
    assert isinstance(value, fx.Node)
    assert isinstance(indices, list | tuple)
    (size, *features), dtype = tensor_type(node)
    if not args["accumulate"] or table.target not in _ZEROS or not dtype.is_floating_point:
        return None
    ids = indices[0]
    if len(indices) > 1 or not isinstance(ids, fx.Node):
        return None
    picked, kind = tensor_type(ids)
    if kind not in (torch.int64, torch.int32) or tensor_type(value).shape != (*picked, *features):
        return None

    def part(name: str, target: OpOverload, args: Sequence[object], meta: TensorType) -> fx.Node:
        return new.emit_part(f"{node.name}_{name}", target, args, meta)

    width = math.prod(features)
    flat = TensorType((*picked, width), dtype)
    if tensor_type(value) != flat:
        value = part("rows", aten.reshape.default, (value, list(flat.shape)), flat)
    below = part("below", aten.lt.Scalar, (ids, 0), TensorType(picked, torch.bool))
    wrapped = part("wrapped", aten.add.Tensor, (ids, size), tensor_type(ids))
    positive = part("ids", aten.where.self, (below, wrapped, ids), tensor_type(ids))
    call = (aten.embedding_dense_backward.default, (value, positive, size, -1, False))
    result = tensor_type(node)
    table_type = TensorType((size, width), dtype)
    if table_type == result:
        return new.emit(*call, result)
    added = part("sum", *call, table_type)
    return new.emit(aten.reshape.default, (added, list(result.shape)), result)


def _causal_attention(new: Emitter, node: fx.Node, args: Arguments) -> fx.Node | None:
    target = node.target
    assert isinstance(target, OpOverload)
    mask = _CAUSAL_MASKS[target._schema.name]
    query, key = args["query"], args["key"]
    if args["is_causal"] is not True or args[mask] is not None:
        return None
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    rows, columns = tensor_type(query).shape[-2], tensor_type(key).shape[-2]
    causal = new.causal_mask(rows, columns, tensor_type(query).dtype)
    given = {**args, mask: causal, "is_causal": False}
    schema = target._schema.arguments
    return new.emit(
        target,
        tuple(given[argument.name] for argument in schema if not argument.kwarg_only),
        tensor_types(node),
        {argument.name: given[argument.name] for argument in schema if argument.kwarg_only},
    )


Rewrite = Callable[[Emitter, fx.Node, Arguments], fx.Node | tuple[fx.Node, ...] | None]
"""Emits the canonical form of an op, and gives its result, or each of its results; None to leave
the op as it is."""

REWRITES: Mapping[str, Rewrite] = MappingProxyType(
    {
        "aten::addmm": _addmm,
        "aten::baddbmm": _baddbmm,
        "aten::addbmm": _addbmm,
        "aten::bmm": _bmm,
        "aten::copy": _copy,
        "aten::index_put": _index_put,
        "aten::_unsafe_index_put": _index_put,
        "aten::masked_scatter": _masked_scatter,
        **dict.fromkeys(_CAUSAL_MASKS, _causal_attention),
    }
)
"""Op -> its rewrite."""


def arguments(
    target: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> Arguments:
    """The arguments of a call by the names in the op's schema."""
    found: dict[str, object] = {}
    for position, argument in enumerate(target._schema.arguments):
        default = argument.default_value
        given = args[position] if position < len(args) else default
        found[argument.name] = kwargs.get(argument.name, given)
    return found


def _is_pure(target: object) -> bool:
    if not isinstance(target, OpOverload):
        return target is operator.getitem
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _device(graph: fx.Graph) -> object:
    """The device that the captured ops create tensors on; None if none says."""
    devices = (node.kwargs.get("device") for node in graph.nodes)
    return next((device for device in devices if device is not None), None)


def _key(value: object) -> object:
    """A hashable form in which 1, 1.0 and True, which compare equal, differ."""
    if isinstance(value, fx.Node):
        return value
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if isinstance(value, list | tuple):
        return tuple([_key(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _key(item)) for name, item in sorted(value.items())])
    return kind, repr(value)


_PLAIN = frozenset({int, bool, str, type(None)})
"""Types whose values are equal if they say the same; zeros of floats differ by their sign."""
