"""Work on the rows that a mask picks, as work on all rows.

Models that give rows to experts or adapters by hand write

    y[mask] = adapter(x[mask])

where the number of rows depends on data. If every op between treats rows apart, then working on all
rows and keeping those of the mask gives the same: `y = where(mask, adapter(x), y)`. An op treats
rows apart if its sharding rule passes them. The price is the work on rows that are dropped.

Only rows of a floating-point type are taken: what the mask leaves out may be no valid index.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, optimization_hint

from rolemesh.compiler.capture.editing import Editor, argument_list, evaluated, tensor_value
from rolemesh.compiler.ir.layout import REPLICATE, Placement, Shard
from rolemesh.compiler.ir.rule import Choice, Kind, OpCall, Split
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.defaults import default_rules

__all__ = ["rows_of_a_mask"]

aten = torch.ops.aten

_BY_POSITION = frozenset({aten.tril.default, aten.triu.default})
"""Ops that compute each row apart, but from its position too."""

_TAKE_SIZES = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
)
"""Ops to which the number of rows is a size and not a value."""


def rows_of_a_mask(node: fx.Node) -> fx.Node | None:
    """What `index_put(y, [mask], f(x[mask]))` comes to on all rows, if f treats rows apart."""
    base, subscripts, rows, accumulate = (*node.args, False)[:4]
    if accumulate or not isinstance(subscripts, list | tuple) or len(subscripts) != 1:
        return None
    mask = subscripts[0]
    if not isinstance(base, fx.Node) or not isinstance(rows, fx.Node):
        return None
    if not isinstance(mask, fx.Node) or tensor_value(mask).dtype is not torch.bool:
        return None
    between = _between(mask, rows)
    if not between:
        return None
    try:
        return _AllRows(node, mask, rows).rewritten(base, between)
    except (_MixedError, RuntimeError):  # RuntimeError: an op that takes no other number of rows
        return None


def _between(mask: fx.Node, rows: fx.Node) -> list[fx.Node]:
    """What is computed from rows of the mask on the way to `rows`, in order; nothing otherwise."""
    found: set[fx.Node] = set()
    pending = [rows]
    while pending:
        node = pending.pop()
        if node in found or not _depends_on_data(node):
            continue
        if node.op != "call_function":
            return []
        found.add(node)
        if not _picks(node, mask):
            pending += node.all_input_nodes
    return [node for node in rows.graph.nodes if node in found]


def _picks(node: fx.Node, mask: fx.Node) -> bool:
    arguments = argument_list(node, aten.index.Tensor)
    return bool(arguments) and list(arguments[1]) == [mask]


def _depends_on_data(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    sizes = [size for item in values if isinstance(item, Tensor) for size in item.shape]
    numbers = [*sizes, *(item for item in values if isinstance(item, torch.SymInt | torch.SymBool))]
    return any(bool(free_unbacked_symbols(number)) for number in numbers)


class _MixedError(Exception):
    """Some op mixes rows."""


class _AllRows:
    """Emits the same ops on all rows."""

    def __init__(self, before: fx.Node, mask: fx.Node, origin: fx.Node) -> None:
        self._editor = Editor(before, origin)
        self._mask = mask
        self._ndim = tensor_value(mask).ndim
        self._new: dict[fx.Node, object] = {}
        # Of the new nodes: where the rows are in each result.
        self._rows: dict[fx.Node, tuple[Placement, ...]] = {}

    def rewritten(self, base: fx.Node, between: list[fx.Node]) -> fx.Node:
        for node in between:
            self._new[node] = self._emitted(node)
        rows = self._new[between[-1]]
        table = self._flat(base)
        value = tensor_value(rows)
        assert isinstance(rows, fx.Node)
        count = _hints(tensor_value(table))[0]
        if self._rows[rows] != (Shard(0, 1, count),) or value.shape != tensor_value(table).shape:
            raise _MixedError
        keep = self._flat(self._mask)
        for _ in range(value.ndim - 1):
            keep = self._editor.call(aten.unsqueeze.default, keep, -1)
        result = self._editor.call(aten.where.self, keep, rows, table)
        if self._ndim == 1:
            return result
        sizes = [self._editor.number(size) for size in tensor_value(base).shape]
        if None in sizes:
            raise _MixedError
        return self._editor.call(aten.view.default, result, sizes)

    def _flat(self, node: fx.Node) -> fx.Node:
        """A value whose first dims are those of the mask, with one dim for them."""
        if self._ndim == 1:
            return node
        rest = [self._editor.number(size) for size in tensor_value(node).shape[self._ndim :]]
        if None in rest:
            raise _MixedError
        return self._editor.call(aten.reshape.default, node, [-1, *rest])

    def _emitted(self, node: fx.Node) -> object:
        target = node.target
        if _picks(node, self._mask):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            made = self._flat(source)
            if not tensor_value(made).is_floating_point():
                raise _MixedError
            self._rows[made] = (Shard(0, 1, _hints(tensor_value(made))[0]),)
            return made
        args, kwargs = self._renewed(node)
        if not _is_tensor(node):
            number = evaluated(target, args, kwargs)
            if not isinstance(number, torch.SymInt):
                return number
        elif target not in _TAKE_SIZES and not all(map(_is_tensor, node.all_input_nodes)):
            raise _MixedError
        made = self._editor.call(target, *args, **kwargs)
        if target is operator.getitem:
            producer, position = args
            assert isinstance(producer, fx.Node)
            assert isinstance(position, int)
            self._rows[made] = (self._rows[producer][position],)
        elif _is_tensor(made):
            self._rows[made] = self._apart(made)
        return made

    def _renewed(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a node over what stands for them on all rows."""

        def value(operand: fx.Node) -> Any:  # FX's Argument: a node or a number
            return self._new.get(operand, operand)

        return fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)

    def _apart(self, node: fx.Node) -> tuple[Placement, ...]:
        """Where the rows are in each result of an op that treats them apart."""
        rules = default_rules()
        if node.target in _BY_POSITION or not rules.covers(node.target):
            raise _MixedError
        operands: list[fx.Node] = []
        rule = rules.rule(_typed(node, operands))
        places = [self._rows.get(operand, (REPLICATE,))[0] for operand in operands]
        choice: Choice | None = None
        for dims, place in zip(rule.operands, places, strict=True):
            if choice is None and isinstance(place, Shard):
                choice = rule.match(dims, place, ranks=place.size)
        if not isinstance(choice, Split) or rule.kinds[choice.factor] is not Kind.PASS:
            raise _MixedError
        if any(rule.operand_placement(i, choice) not in (place, None)
               for i, place in enumerate(places)):  # fmt: skip
            raise _MixedError
        return tuple([rule.result_placement(i, choice) for i in range(len(rule.results))])


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node is a tensor, or several."""
    return isinstance(node.meta["val"], Tensor | list | tuple)


def _typed(node: fx.Node, operands: list[fx.Node]) -> OpCall:
    """The call that a rule is derived from; appends its tensor operands to `operands`."""

    def convert(value: object) -> object:
        if isinstance(value, list | tuple):
            return tuple([convert(item) for item in value])
        if not isinstance(value, fx.Node):
            return value
        own = value.meta["val"]
        if not isinstance(own, Tensor):
            return _hint(own)
        operands.append(value)
        return _type(own)

    args = tuple([convert(value) for value in node.args])
    kwargs: Mapping[str, object] = {name: convert(value) for name, value in node.kwargs.items()}
    value = node.meta["val"]
    results = value if isinstance(value, list | tuple) else (value,)
    assert isinstance(node.target, torch._ops.OpOverload)
    return OpCall(
        node.target,
        args,
        dict(kwargs),
        tuple([_type(operand.meta["val"]) for operand in operands]),
        tuple([_type(result) for result in results]),
    )


def _type(value: Tensor) -> TensorType:
    return TensorType(_hints(value), value.dtype)


def _hints(value: Tensor) -> tuple[int, ...]:
    return tuple([_hint(size) for size in value.shape])


def _hint(size: int | torch.SymInt) -> int:
    """An example of a symbolic size. Two sizes with one example have one symbol."""
    return optimization_hint(size)
