"""How the values of a Program are written: which have a line of their own, and what it says.

A line is about the size of a line of model code. A value that is used once and short to write is
folded into its user's expression. Views never take a line that says nothing: a reshape is written
only where the shape in between matters (`x.reshape(8, 16, 24).transpose(1, 2)`), slices and the
pieces of a split are written as indexing, casts as `i32(x)`, numbers as themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.compiler.ir.dialect import MeshOp
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.placement import Segmented, Shard
from rolemesh.compiler.ir.program import Program, origin, tensor_types
from rolemesh.compiler.ir.tensor import dtype_name

__all__ = ["Expressions", "Text", "block_of"]

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "bitwise_and": "&",
    "bitwise_or": "|", "le": "<=", "lt": "<", "ge": ">=", "gt": ">", "eq": "==", "ne": "!=",
}  # fmt: skip
_BINDING = {"+": 2, "-": 2, "*": 3, "/": 3, "**": 5}
_PREFIX_BINDING = 4
_PREFIX = {"neg": "-", "bitwise_not": "~", "logical_not": "~"}
_CONTRACTIONS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
_POINTWISE = frozenset(
    {"where", "masked_fill", "relu", "silu", "gelu", "sigmoid", "tanh", "exp", "log", "sqrt",
     "rsqrt", "cos", "sin", "clamp", "abs", "reciprocal", "_to_copy", "copy", *_INFIX, *_PREFIX}
)  # fmt: skip
_RELABELS = frozenset(
    {
        "view",
        "_unsafe_view",
        "reshape",
        "unsqueeze",
        "squeeze",
        "expand",
        "alias",
        "detach",
        "clone",
    }
)
_TRANSPOSES = frozenset({"t", "transpose", "permute"})
_RESHAPED = _RELABELS | _TRANSPOSES
_SHAPE_BLIND = _CONTRACTIONS | _POINTWISE | _RELABELS | {"native_layer_norm"}
_SPLITS = frozenset({"split_with_sizes", "split", "chunk"})
_CREATIONS = {"new_empty": "empty", "new_zeros": "zeros", "new_ones": "ones", "empty": "empty",
              "zeros": "zeros", "ones": "ones", "empty_like": "empty", "zeros_like": "zeros",
              "ones_like": "ones"}  # fmt: skip
_LITERALS = frozenset({"scalar_tensor", "full"})
_LANDMARKS = frozenset(
    {"topk", "sort", "_softmax", "_safe_softmax", "embedding", "index_copy", "index_put", "scatter",
     "native_layer_norm", "grouped_mm_fallback", "_grouped_mm", *_CONTRACTIONS}
)  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin"})
_IGNORED = frozenset({"device", "pin_memory", "layout", "memory_format", "implicit"})

_MAX_FOLDED = 80
_MAX_OPERAND = 48
_MAX_LINE = 90
_MAX_REPEATED = 30


class Text(NamedTuple):
    """An expression and how tightly its outermost operator binds."""

    text: str
    binding: int = 9

    def within(self, binding: int) -> str:
        """The text as an operand of an operator that binds as tightly as `binding`."""
        return self.text if self.binding >= binding else f"({self.text})"

    @property
    def tight(self) -> str:
        """The text where an index or a method call follows."""
        return self.within(9)


class Expressions:
    """The expressions of one page.

    Attributes:
        shown: The ops of the page, in order.
        outside: Values of other modules that the page reads, once `line` has seen its ops.
    """

    def __init__(self, program: Program, module: str | None, fold: bool) -> None:
        self.program = program
        self.module = module
        self.fold = fold
        self.inputs = dict(zip(program.placeholders, program.inputs, strict=True))
        self.shown = [node for node in program.ops if self._wanted(node)]
        self.stored = {
            value: program.inputs[output.mutates].name
            for value, output in zip(program.results, program.outputs, strict=True)
            if output.mutates is not None and isinstance(value, fx.Node)
        }
        self.uses: dict[fx.Node, int] = {}
        for node in reversed(list(program.graph.nodes)):
            self.uses[node] = sum(
                self.uses[user] if self._is_view(user) else 1 for user in node.users
            )
        self.folded: dict[fx.Node, int] = {}
        self.texts: dict[fx.Node, Text] = {}
        self.slices: dict[fx.Node, tuple[str, int, slice]] = {}
        self.outside: dict[fx.Node, None] = {}

    def line(self, node: fx.Node) -> Text | None:
        """The expression of a value's line; None if its uses say it all. Call it in graph order."""
        if node.target is operator.getitem:
            self._getitem(node)
            return None
        if self.fold and _op_name(node) in _SPLITS:
            return None
        text = self._expression(node)
        if self._folds(node, text):
            self.texts[node] = text
            return None
        if self.fold and _op_name(node) in _RELABELS:
            return self.argument(node.args[0], blind=True)  # the type says the last shape
        return text

    def kind(self, node: fx.Node, only: int | None = None) -> str:
        """The types of a value's results with their layouts, or of one of them."""
        types = tensor_types(node)
        layouts: Sequence[Layout | None] = self.program.layouts.get(node) or [None] * len(types)
        mesh = self.program.mesh
        texts = [
            str(value) if layout is None or mesh is None else layout.text(value, mesh)
            for value, layout in zip(types, layouts, strict=True)
        ]
        if only is not None:
            return texts[only]
        return texts[0] if len(texts) == 1 else f"({', '.join(texts)})"

    def short(self, name: str) -> str:
        """A weight's name relative to the printed module."""
        return name.removeprefix(f"{self.module}.") if self.module else name

    def on_page(self, node: fx.Node) -> fx.Node:
        """The value whose line contains this one."""
        while node in self.texts and node.users:
            node = next(iter(node.users))
        return node

    def only_result(self, node: fx.Node) -> int | None:
        """The one result of several that is used."""
        if len(tensor_types(node)) < 2:
            return None
        used = {user.args[1] for user in node.users if user.target is operator.getitem}
        only = next(iter(used), None)
        return only if len(used) == 1 and isinstance(only, int) else None

    # ---- what folds --------------------------------------------------------------------------

    def _wanted(self, node: fx.Node) -> bool:
        path = origin(node).module
        return self.module is None or path == self.module or path.startswith(self.module + ".")

    def _is_view(self, node: fx.Node) -> bool:
        """Whether a node is written as part of each of its uses."""
        name = _op_name(node)
        if not self.fold or _feeds_collective(node) or node in self.stored:
            return False
        if name in _SPLITS or name == "slice":
            return True
        if node.target is operator.getitem:
            return _op_name(_source(node)) in _SPLITS
        if name in _RELABELS:
            return self._shaped_uses(node) < 2 or _is_input(_source(node))
        if name in _TRANSPOSES:
            return self.uses.get(node, 0) < 2 or _is_input(_source(node))
        return False

    def _shaped_uses(self, node: fx.Node) -> int:
        """Uses of a reshaped value for which its shape has to be known."""
        count = 0
        for user in node.users:
            if not _shape_blind(user) and not (_keeps_last(node) and _slices_last(user)):
                count += self.uses[user] if self._is_view(user) else 1
        return count

    def _folds(self, node: fx.Node, text: Text) -> bool:
        if not self.fold:
            return False
        if self._is_view(node) or _is_literal(node):
            return True
        if isinstance(node.target, MeshOp) or len(tensor_types(node)) != 1 or node in self.stored:
            return False
        if _feeds_collective(node) or not self.uses[node]:
            return False
        if _op_name(node) == "_to_copy" and len(text.text) <= _MAX_REPEATED:
            return True
        return self.uses[node] == 1 and self._fits(node, text)

    def _fits(self, node: fx.Node, text: Text) -> bool:
        """Whether a value used once can be read within its user's line."""
        (user,) = node.users
        while self._is_view(user):
            (user,) = user.users
        if user.op == "output" or not self._wanted(user):
            return False
        if block_of(origin(user).module) != block_of(origin(node).module):
            return False
        if _op_name(user) in _RESHAPED and len(text.text) <= _MAX_LINE:
            return True  # that line is this op's result in the shape its users want
        if _op_name(node) in _LANDMARKS:
            return False
        short = _op_name(user) in _LANDMARKS or _op_name(user) == "cat"
        length = self.folded.get(user, 0) + len(text.text)
        if len(text.text) > (_MAX_OPERAND if short else _MAX_FOLDED) or length > _MAX_LINE:
            return False
        self.folded[user] = length
        return True

    # ---- expressions -------------------------------------------------------------------------

    def _expression(self, node: fx.Node) -> Text:
        name = _op_name(node)
        args = list(node.args)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in _IGNORED}
        if self.fold:
            if name in _CREATIONS:
                return Text(f"{_CREATIONS[name]}({self.kind(node)})")
            if _is_literal(node) and name in _LITERALS:
                return self.argument(args[-1])
            if name == "slice":
                return self._slice(node)
            if name in _RELABELS:
                return self._relabel(node)
            if name == "slice_scatter":
                into, value = (self.argument(arg).text for arg in args[:2])
                return Text(f"slice_scatter({into}, {value}, {_index(node, *args[2:])})")
        if name in _TRANSPOSES:
            return self._transpose(node, name)
        if name in _INFIX and len(args) == 2 and not kwargs:
            sign = _INFIX[name]
            binding = _BINDING.get(sign, 1)
            left, right = (self.argument(arg, blind=True) for arg in args)
            first = binding + 1 if binding in (1, 5) else binding
            operands = left.within(first), right.within(binding + 1)
            return Text(f" {sign} ".join(operands), binding)
        if name in _PREFIX:
            operand = self.argument(args[0], blind=True).within(_PREFIX_BINDING)
            return Text(f"{_PREFIX[name]}{operand}", _PREFIX_BINDING)
        if name in ("_to_copy", "copy") and isinstance(kwargs.get("dtype"), torch.dtype):
            return Text(f"{_shown(kwargs['dtype'])}({self.argument(args[0], blind=True).text})")
        if name in _REDUCTIONS and self.fold:
            args = [arg[0] if isinstance(arg, list) and len(arg) == 1 else arg for arg in args[:2]]
        blind = _shape_blind(node)
        parts = [self.argument(arg, blind).text for arg in args]
        parts += [text for key, value in kwargs.items() for text in self._keyword(key, value)]
        return Text(f"{name}({', '.join(parts)})")

    def _keyword(self, key: str, value: object) -> Iterator[str]:
        if isinstance(value, Shard | Segmented):
            yield f"{'dim' if key == 'shard' else key}={_cut(value)}"
        elif isinstance(value, tuple) and value and isinstance(value[0], Shard | Segmented):
            yield f"{'dim' if key == 'shard' else key}=[{', '.join(map(_cut, value))}]"
        elif key == "axes" and isinstance(value, tuple):
            yield f"axis={'/'.join(map(str, value))}"
        else:
            yield f"{key}={self.argument(value).text}"

    def _relabel(self, node: fx.Node) -> Text:
        """A reshape, written out for a user that depends on the shape."""
        source = self.argument(node.args[0], blind=True)
        kind = tensor_types(node)[0]
        if kind.shape == tensor_types(_source(node))[0].shape:
            return source
        return Text(f"{source.tight}.reshape({', '.join(map(str, kind.shape))})")

    def _transpose(self, node: fx.Node, name: str) -> Text:
        source = self.argument(node.args[0]).tight
        listed = (arg if isinstance(arg, list) else [arg] for arg in node.args[1:])
        dims = [dim for dims in listed for dim in dims if isinstance(dim, int)]
        ndim = tensor_types(node)[0].ndim
        if name == "t" or (
            name == "transpose" and {d % ndim for d in dims} == {ndim - 1, ndim - 2}
        ):
            return Text(f"{source}.T")
        return Text(f"{source}.{name}({', '.join(map(str, dims))})")

    def _getitem(self, node: fx.Node) -> None:
        """One result of an op: a piece of a split is a slice of what is split."""
        source, position = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(position, int)
        if _op_name(source) not in _SPLITS or not self.fold:
            return
        dim = source.args[2] if len(source.args) > 2 else source.kwargs.get("dim", 0)
        assert isinstance(dim, int)
        extents = [kind.shape[dim] for kind in tensor_types(source)]
        start = sum(extents[:position])
        stop = start + extents[position]
        self.texts[node] = self._sliced(node, _source(source), dim, start, stop, 1)

    def _slice(self, node: fx.Node) -> Text:
        given = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
        dim, start, stop, step = given[0], given[1], given[2], given[3]
        return self._sliced(node, _source(node), dim, start, stop, step)

    def _sliced(
        self, node: fx.Node, source: fx.Node, dim: object, start: object, stop: object, step: object
    ) -> Text:
        """Indexing; slices of a slice in one dim become one."""
        shape = tensor_types(source)[0].shape
        assert isinstance(dim, int)
        assert isinstance(step, int)
        stride: int = step
        dim %= len(shape)
        last_dim = dim == len(shape) - 1
        first = start if isinstance(start, int) else 0
        last = min(stop, shape[dim]) if isinstance(stop, int) else shape[dim]
        while last_dim and _keeps_last(source) and source in self.texts:
            source = _source(source)
        base = self.argument(source).tight
        inner, inner_dim, outer = self.slices.get(source, ("", -1, slice(0)))
        if inner_dim == (tensor_types(source)[0].ndim - 1 if last_dim else dim):
            base = inner
            first, last = outer.start + first * outer.step, outer.start + last * outer.step
            stride *= outer.step
        self.slices[node] = (base, dim, slice(first, last, stride))
        return Text(f"{base}{_brackets(dim, len(shape), first, last, stride)}")

    def argument(self, arg: object, blind: bool = False) -> Text:
        """How an argument is written; `blind` as in `_refer`."""
        if isinstance(arg, fx.Node):
            return self._refer(arg, blind)
        if isinstance(arg, list | tuple):
            return Text(f"[{', '.join(self.argument(item, blind).text for item in arg)}]")
        return Text(_shown(arg))

    def _refer(self, node: fx.Node, blind: bool = False) -> Text:
        """How a use of a value is written.

        Args:
            node: The value.
            blind: Whether the user works the same on any shape with these elements.
        """
        if node in self.inputs:
            return Text(self.short(self.inputs[node].name))
        if not self._wanted(node) and node not in self.texts:
            self._refer_outside(node)
        if blind and node in self.texts and _op_name(node) in _RELABELS:
            return self._refer(_source(node), blind)
        if node in self.texts:
            return self.texts[node]
        if node.target is operator.getitem:
            return Text(f"{self._refer(_source(node)).text}.{node.args[1]}")
        return Text(f"%{node.name}")

    def _refer_outside(self, node: fx.Node) -> None:
        """A value of another module: numbers and views are written out, others listed as read."""
        if node.target is operator.getitem:
            self._getitem(node)
        elif self.fold and (_is_literal(node) or _op_name(node) in _RELABELS | {"slice"}):
            self.texts[node] = self._expression(node)
        else:
            self.outside[node] = None


def block_of(path: str) -> str:
    """The module a value is listed under: one level below a numbered layer, else two levels."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 2])
    return ".".join(parts[:2])


def _op_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._overloadpacket.__name__
    return str(target) if isinstance(target, MeshOp) else getattr(target, "__name__", str(target))


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder"


def _is_literal(node: fx.Node) -> bool:
    """Whether a value is written out wherever it is used: a number, or a plain range."""
    if node.all_input_nodes:
        return False
    name = _op_name(node)
    return (name in _LITERALS and tensor_types(node)[0].ndim == 0) or name == "arange"


def _feeds_collective(node: fx.Node) -> bool:
    """Whether a collective moves the value; its type before and after should both be seen."""
    return any(isinstance(u.target, MeshOp) and u.target.communicates for u in node.users)


def _shape_blind(node: fx.Node) -> bool:
    """Whether a reshaped operand reads as well without its shape."""
    return _op_name(node) in _SHAPE_BLIND


def _keeps_last(node: fx.Node) -> bool:
    """Whether a reshape leaves the last dim as it is."""
    if _op_name(node) not in _RELABELS:
        return False
    before, after = (tensor_types(n)[0].shape for n in (_source(node), node))
    return before[-1:] == after[-1:]


def _slices_last(node: fx.Node) -> bool:
    """Whether a node takes parts of the last dim."""
    name = _op_name(node)
    if name != "slice" and name not in _SPLITS:
        return False
    position = 1 if name == "slice" else 2
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    return isinstance(dim, int) and dim in (-1, tensor_types(_source(node))[0].ndim - 1)


def _index(
    node: fx.Node, dim: object = 0, start: object = 0, stop: object = None, step: object = 1
) -> str:
    shape = tensor_types(node)[0].shape
    assert isinstance(dim, int)
    assert isinstance(step, int)
    first = start if isinstance(start, int) else 0
    last = min(stop, shape[dim]) if isinstance(stop, int) else shape[dim]
    return _brackets(dim % len(shape), len(shape), first, last, step)


def _brackets(dim: int, ndim: int, first: int, last: int, step: int) -> str:
    """A slice of one dim as indexing: `[..., 0:8:2]`."""
    stride = "" if step == 1 else f":{step}"
    before = "..., " if dim == ndim - 1 and ndim > 1 else ":, " * dim
    return f"[{before}{first}:{last}{stride}]"


def _cut(value: Shard | Segmented) -> str:
    """What a shard cuts: the dim, with its factor or its segments."""
    if isinstance(value, Segmented):
        return f"{value.dim}:{'+'.join(map(str, value.lengths))}"
    return str(value.dim) if value.outer == 1 else f"{value.dim}:{value.outer}x{value.size}"


def _shown(value: object) -> str:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
