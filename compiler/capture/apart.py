"""Work on the rows that a mask picks, emitted again as work on all rows.

How many rows a mask picks depends on data. If every op on the way treats rows apart, the same ops
on all rows, in whatever order they are arranged, give those rows and others that nobody asks for.
An op treats rows apart if its sharding rule passes them. Besides, these do:

* a fill (`ones([n, 3])`), whose rows are equal;
* `x[arange(n), j]`, where row i is read from row i of x. Numbers of rows serve for nothing else;
* `cat([f(piece) for piece in x.split(counts.tolist())])`, which is `f(x)`.

The price is the work on rows that are dropped.

Only rows of a floating-point or boolean type are taken: what the mask leaves out may be no valid
index.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from rolemesh.compiler.capture.editing import (
    Editor,
    argument_list,
    depends_on_data,
    evaluated,
    tensor_value,
)
from rolemesh.compiler.ir.placement import REPLICATE, Placement, Shard
from rolemesh.compiler.ir.rule import Choice, Kind, OpCall, Split
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.rules.defaults import default_rules

__all__ = [
    "MixedError",
    "Piece",
    "RowsApart",
    "flat_rows",
    "is_pick",
    "picked_rows",
]

aten = torch.ops.aten

_BY_POSITION = frozenset({aten.tril.default, aten.triu.default})
"""Ops that compute each row apart, but from its position too."""

_FILLS = frozenset({aten.ones.default, aten.zeros.default, aten.full.default})

_TAKE_SIZES = _FILLS | frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
)
"""Ops to which the number of rows is a size and not a value."""

_KEEP_NUMBERS = frozenset({aten.unsqueeze.default, aten.view.default, aten.expand.default})
"""Ops after which the numbers of rows still are those."""

_Args = Sequence[fx.node.Argument]
_Kwargs = Mapping[str, fx.node.Argument]


class MixedError(Exception):
    """Some op mixes rows."""


_SPLIT = aten.split_with_sizes.default

_SIZE_OF_A_PIECE = object()
"""Stands for a number read from a tensor, which may only be the size of a piece."""


class Piece(NamedTuple):
    """What was computed from one of the pieces of a `split_with_sizes`."""

    split: fx.Node
    number: int

    @property
    def counts(self) -> list[fx.Node]:
        """The tensors with the number of rows of each piece of the split."""
        numbers = argument_list(self.split, _SPLIT)[1]
        return [number.args[0] for number in numbers]


def picked_rows(mask: fx.Node, rows: fx.Node) -> list[fx.Node]:
    """What is computed from rows of the mask on the way to `rows`, in order; nothing otherwise."""
    found: set[fx.Node] = set()
    pending = [rows]
    while pending:
        node = pending.pop()
        if node in found or not depends_on_data(node.meta.get("val")):
            continue
        if node.op != "call_function":
            return []
        found.add(node)
        if not is_pick(node, mask):
            pending += node.all_input_nodes
    return [node for node in rows.graph.nodes if node in found]


def is_pick(node: fx.Node, mask: fx.Node) -> bool:
    """Whether a node is `x[mask]`."""
    arguments = argument_list(node, aten.index.Tensor)
    return bool(arguments) and list(arguments[1]) == [mask]


def flat_rows(editor: Editor, node: fx.Node, ndim: int) -> fx.Node:
    """A value with one dim in place of the first `ndim`.

    Raises:
        MixedError: If no node has one of its other sizes.
    """
    if ndim == 1:
        return node
    rest = [editor.number(size) for size in tensor_value(node).shape[ndim:]]
    if None in rest:
        raise MixedError
    return editor.call(aten.reshape.default, node, [-1, *rest])


class RowsApart:
    """Emits the same ops on all rows. Equal calls are emitted once.

    Args:
        editor: Emits them.
        mask: Picks the rows.
        arranged: Gives all rows, of a value whose first dim is the rows, in the wanted order.
    """

    def __init__(
        self, editor: Editor, mask: fx.Node, arranged: Callable[[fx.Node], fx.Node]
    ) -> None:
        self._editor = editor
        self._mask = mask
        self._arranged = arranged
        self._new: dict[fx.Node, object] = {}
        self._pieces: dict[fx.Node, Piece] = {}
        self._made: dict[tuple[object, str, str], fx.Node] = {}
        # Of the new nodes: where the rows are in each result, and which are numbers of rows.
        self._rows: dict[fx.Node, tuple[Placement, ...]] = {}
        self._numbers: set[fx.Node] = set()

    def emit(self, nodes: Sequence[fx.Node]) -> None:
        """Emit what stands for `nodes`.

        Args:
            nodes: Those of `picked_rows`.

        Raises:
            MixedError: If one of them mixes rows.
        """
        for node in nodes:
            self._new[node] = self._emitted(node)

    def all_rows(self, node: fx.Node) -> fx.Node:
        """What stands for a tensor; its first dim is the rows, or starts with them.

        Raises:
            MixedError: If the rows are elsewhere in it.
        """
        made = self._new[node]
        if not isinstance(made, fx.Node) or self._rows.get(made) != (self._in_front(made),):
            raise MixedError
        return made

    def piece(self, node: fx.Node) -> Piece | None:
        """The piece that a node was computed from, unless it was from all picked rows."""
        return self._pieces.get(node)

    def unit(self, made: fx.Node) -> int:
        """How long a row is in the first dim of what `all_rows` gave."""
        return _hint(tensor_value(made).shape[0]) // self.count

    @property
    def count(self) -> int:
        """An example of the number of all rows."""
        return math.prod(_hints(tensor_value(self._mask)))

    def _in_front(self, made: fx.Node) -> Placement:
        return Shard(0, 1, self.count) if tensor_value(made).ndim else REPLICATE

    def _emitted(self, node: fx.Node) -> object:
        target = node.target
        if is_pick(node, self._mask):
            return self._picked(node)
        if target is aten._local_scalar_dense.default:
            return _SIZE_OF_A_PIECE
        if target is _SPLIT:
            return self._split(node)
        if target is aten.cat.default and self._pieces.keys() & set(node.all_input_nodes):
            return self._joined(node)
        if target is operator.getitem and argument_list(node.args[0], _SPLIT):
            split, index = node.args
            assert isinstance(split, fx.Node)
            assert isinstance(index, int)
            self._pieces[node] = Piece(split, index)
            return self._new[split]
        return self._computed(node)

    def _picked(self, node: fx.Node) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        value = tensor_value(source)
        if not value.is_floating_point() and value.dtype is not torch.bool:
            raise MixedError
        made = self._arranged(flat_rows(self._editor, source, tensor_value(self._mask).ndim))
        self._rows[made] = (self._in_front(made),)
        return made

    def _split(self, node: fx.Node) -> fx.Node:
        """All rows, for all pieces of them."""
        source, sizes, dim = (*node.args, 0)[:3]
        assert isinstance(source, fx.Node)
        assert isinstance(sizes, list | tuple)
        known = [self._new.get(size) for size in sizes if isinstance(size, fx.Node)]
        if dim != 0 or source in self._pieces or known != [_SIZE_OF_A_PIECE] * len(sizes):
            raise MixedError
        made = self.all_rows(source)
        if _hint(tensor_value(made).shape[0]) != self.count:
            raise MixedError
        return made

    def _joined(self, node: fx.Node) -> fx.Node:
        """The value of a `cat` of what was computed alike from each piece, in order."""
        parts, dim = (*node.args, 0)[:2]
        assert isinstance(parts, list | tuple)
        pieces = [self._pieces.get(part) for part in parts]
        split = pieces[0].split if pieces[0] else None
        whole = argument_list(split, _SPLIT)
        made = self.all_rows(parts[0])
        if (
            dim != 0
            or split is None
            or pieces != [Piece(split, number) for number in range(len(whole[1]))]
            or any(self._new[part] is not made for part in parts)
        ):
            raise MixedError
        return made

    def _computed(self, node: fx.Node) -> object:
        """The same op on what stands for its operands."""
        target = node.target
        self._follow_piece(node)

        def value(operand: fx.Node) -> Any:  # FX's Argument: a node or a number
            return self._new.get(operand, operand)

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if not _is_tensor(node):
            number = evaluated(target, args, kwargs)
            if not isinstance(number, torch.SymInt):
                return number
            return self._call(node, args, kwargs)
        if target is aten.arange.default:
            return self._numbered(node, args, kwargs)
        if target not in _TAKE_SIZES and not all(map(_is_tensor, node.all_input_nodes)):
            raise MixedError
        made = self._call(node, args, kwargs)
        if target is operator.getitem:
            producer, position = args
            assert isinstance(producer, fx.Node)
            assert isinstance(position, int)
            self._rows[made] = (self._rows[producer][position],)
        elif target in _FILLS:
            self._rows[made] = (self._filled(node),)
        elif target is aten.index.Tensor:
            self._rows[made] = (self._indexed(made),)
        else:
            if self._numbers.intersection(made.all_input_nodes):
                if target not in _KEEP_NUMBERS:
                    raise MixedError
                self._numbers.add(made)
            self._rows[made] = self._apart(made)
        return made

    def _follow_piece(self, node: fx.Node) -> None:
        """Note of which piece an op works on the rows: of the same in all operands, if of any."""
        operands = [operand for operand in node.all_input_nodes if operand in self._new]
        pieces = {self._pieces.get(operand) for operand in operands}
        if len(pieces) > 1 or any(self._new[o] is _SIZE_OF_A_PIECE for o in operands):
            raise MixedError
        piece = pieces.pop() if pieces else None
        if piece is not None:
            self._pieces[node] = piece

    def _call(self, node: fx.Node, args: _Args, kwargs: _Kwargs) -> fx.Node:
        key = node.target, repr(args), repr(kwargs)
        if key not in self._made:
            self._made[key] = self._editor.call(node.target, *args, **kwargs)
        return self._made[key]

    def _numbered(self, node: fx.Node, args: _Args, kwargs: _Kwargs) -> fx.Node:
        """The numbers of the rows."""
        made = self._call(node, args, kwargs)
        if len(args) != 1 or _hints(tensor_value(made)) != (self.count,):
            raise MixedError
        self._rows[made] = (Shard(0, 1, self.count),)
        self._numbers.add(made)
        return made

    def _filled(self, node: fx.Node) -> Placement:
        """Where the rows are in a tensor of equal values: in the dim whose size is theirs."""
        sizes = node.args[0]
        assert isinstance(sizes, list | tuple)
        dims = [
            dim
            for dim, size in enumerate(sizes)
            if isinstance(size, fx.Node) and depends_on_data(size.meta.get("val"))
        ]
        if len(dims) != 1 or any(isinstance(value, fx.Node) for value in node.args[1:]):
            raise MixedError
        return Shard(dims[0], 1, self.count)

    def _indexed(self, made: fx.Node) -> Placement:
        """Where the rows are in a read of each row at its own number."""
        source, subscripts = made.args
        assert isinstance(subscripts, list | tuple)
        number, *others = subscripts
        if (
            not isinstance(source, fx.Node)
            or self._rows.get(source) != (self._in_front(source),)
            or _hints(tensor_value(source))[0] != self.count
            or not isinstance(number, fx.Node)
            or number not in self._numbers
            or any(other in self._rows for other in others)
        ):
            raise MixedError
        (place,) = self._rows[number]
        assert isinstance(place, Shard)
        # The dims of subscripts come first in the result, since the first of them is of dim 0.
        ndims = [tensor_value(entry).ndim for entry in subscripts if entry is not None]
        return place._replace(dim=place.dim + max(ndims) - ndims[0])

    def _apart(self, node: fx.Node) -> tuple[Placement, ...]:
        """Where the rows are in each result of an op that treats them apart."""
        rules = default_rules()
        if node.target in _BY_POSITION or not rules.covers(node.target):
            raise MixedError
        operands: list[fx.Node] = []
        rule = rules.rule(_typed(node, operands))
        places = [self._rows.get(operand, (REPLICATE,))[0] for operand in operands]
        choice: Choice | None = None
        for dims, place in zip(rule.operands, places, strict=True):
            if choice is None and isinstance(place, Shard):
                choice = rule.match(dims, place, ranks=place.size)
        if not isinstance(choice, Split) or rule.kinds[choice.factor] is not Kind.PASS:
            raise MixedError
        if any(rule.operand_placement(i, choice) not in (place, None)
               for i, place in enumerate(places)):  # fmt: skip
            raise MixedError
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
    kwargs = {name: convert(value) for name, value in node.kwargs.items()}
    value = node.meta["val"]
    results = value if isinstance(value, list | tuple) else (value,)
    assert isinstance(node.target, torch._ops.OpOverload)
    return OpCall(
        node.target,
        args,
        kwargs,
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
