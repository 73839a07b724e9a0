"""The form of a fusion, and what fusions read graphs with.

A fusion looks at one node at a time, as the last of a pattern. Where the pattern is there, it says
which nodes it gives the values of, which nodes nothing else may need, and how to make the fused op.
`rewrite` does the rest.

Invariants of a rewritten graph:

* Each output has the same shape and dtype, and the same value but for rounding.
* Nothing is computed twice: a pattern with an inner value that another op needs is left alone.
* No sizes that are symbols have been compared in a way that would fix them.
* A new node has `meta["val"]`, and the `meta["origin"]` of the output it stands for, with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from rolemesh.compiler.ir.program import origin
from rolemesh.passes.canonical_forms import arguments

__all__ = [
    "Emitter",
    "Found",
    "Fusion",
    "Setting",
    "Size",
    "argument",
    "cast_source",
    "dtype_of",
    "factors",
    "halves",
    "is_call",
    "known_above",
    "number",
    "rewrite",
    "same",
    "same_shape",
    "shape_of",
    "sliced",
    "users_of",
]

aten = torch.ops.aten

Size = int | torch.SymInt
"""A size of a dim."""


@dataclass(frozen=True)
class Setting:
    """What fusions of one graph go by.

    Attributes:
        group_name: The name of a communicator, as ops of GE take it, by the group's name in
            torch.distributed.
        within_limits: Leave a pattern alone whose sizes are not among those that the fused op's
            documentation gives. Dtypes must be among them always.
    """

    group_name: Callable[[str], str]
    within_limits: bool = True


class Emitter:
    """Adds nodes with values before one node.

    Args:
        graph: The graph.
        anchor: The node that new ones go before, and whose origin they take.
        reason: Why they are there.
    """

    def __init__(self, graph: fx.Graph, anchor: fx.Node, reason: str) -> None:
        self.graph = graph
        self.anchor = anchor
        self.origin = replace(origin(anchor), reason=reason)

    def __call__(self, target: OpOverload, *args: object, **kwargs: object) -> fx.Node:
        """A call of an op; its arguments may be nodes."""
        return self._node(target, args, kwargs, target._schema.name.partition("::")[2])

    def part(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results of a new node."""
        return self._node(operator.getitem, (node, index), {}, f"{node.name}_{index}")

    def shared(self, operand: fx.Node, target: OpOverload, *args: object) -> fx.Node:
        """A call that other places may share: right after its operand, or one that is there.

        Args:
            operand: The operand.
            target: The op.
            *args: All arguments, the operand among them.
        """
        for user in operand.users:
            same_call = is_call(user, target) and user.args == args and not user.kwargs
            if same_call and user < self.anchor:
                return user
        name = target._schema.name.partition("::")[2]
        inputs = self.graph.find_nodes(op="placeholder")
        return self._node(target, args, {}, name, after=max(operand, *inputs))

    def _node(
        self,
        target: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        name: str,
        after: fx.Node | None = None,
    ) -> fx.Node:
        graph = self.graph
        place = graph.inserting_after(after) if after else graph.inserting_before(self.anchor)
        with place:
            node = graph.create_node("call_function", target, args, dict(kwargs), name)  # type: ignore[arg-type]
        values, options = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        with _fake_mode(self.anchor):
            node.meta["val"] = target(*values, **options)
        node.meta["origin"] = self.origin
        return node


@dataclass(frozen=True)
class Found:
    """A place where a fused op can stand.

    Attributes:
        outputs: The nodes whose values the op gives, in the order of the graph. Everything that the
            op needs comes before the first.
        inner: Nodes that only these outputs need. Nodes that would be dead afterwards anyway need
            not be named.
        emit: Makes the op: one node for each output.
    """

    outputs: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]
    emit: Callable[[Emitter], Sequence[fx.Node]]


@dataclass(frozen=True)
class Fusion:
    """A pass over one rank's flat graph.

    Attributes:
        op: The fused op that it makes.
        ends: Targets of the last node of its patterns.
        find: Tells whether a node is the last of a pattern.
    """

    op: OpOverload
    ends: frozenset[object]
    find: Callable[[fx.Node, Setting], Found | None]

    @property
    def name(self) -> str:
        """The name of the op, without its namespace."""
        return str(self.op._schema.name).partition("::")[2]


def rewrite(graph: fx.Graph, fusion: Fusion, setting: Setting) -> int:
    """Fuse wherever the pattern is.

    Args:
        graph: A flat graph whose nodes have `meta["val"]`; changed.
        fusion: What to fuse.
        setting: What to go by.

    Returns:
        The number of rewrites.
    """
    done = 0
    for node in list(graph.nodes):
        if node._erased or not is_call(node, *fusion.ends):
            continue
        found = fusion.find(node, setting)
        if found is None or not _is_closed(found):
            continue
        made = found.emit(Emitter(graph, found.outputs[0], f"fused {fusion.name}"))
        for old, new in zip(found.outputs, made, strict=True):
            old.replace_all_uses_with(new)
        _erase_dead(graph, found.outputs)
        done += 1
    return done


def _is_closed(found: Found) -> bool:
    within = {*found.outputs, *found.inner}
    return all(within.issuperset(users_of(node)) for node in found.inner)


def _erase_dead(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that nothing needs, and what only they needed."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node._erased or node.op != "call_function" or users_of(node):
            continue
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            continue
        for unused in list(node.users):
            graph.erase_node(unused)
        pending.extend(node.all_input_nodes)
        graph.erase_node(node)


def users_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that need a node. A result of several that was taken and not used is none."""
    return [user for user in node.users if user.users or user.target is not operator.getitem]


def is_call(value: object, *targets: object) -> bool:
    """Whether a value is a node that calls one of these."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def argument(node: fx.Node, name: str) -> object:
    """An argument of an op by its name in the schema; its default if it is not given."""
    assert isinstance(node.target, OpOverload)
    return arguments(node.target, node.args, node.kwargs)[name]


def shape_of(node: fx.Node) -> Sequence[Size]:
    """The sizes of a node's tensor."""
    return _tensor(node).shape


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    return _tensor(node).dtype


def same(left: Size, right: Size) -> bool:
    """Whether two sizes are equal whatever symbols stand for."""
    return bool(statically_known_true(left == right))


def same_shape(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are equal whatever symbols stand for."""
    return len(left) == len(right) and all(map(same, left, right))


def known_above(size: Size, limit: int) -> bool:
    """Whether a size exceeds a limit; one that depends on a symbol does not."""
    return bool(statically_known_true(size > limit))


def number(value: object) -> float | None:
    """A plain number; None for anything else, a constant tensor of a graph among it."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain else None  # type: ignore[arg-type]


def factors(value: object) -> list[tuple[fx.Node, fx.Node]]:
    """The two operands of a product, in both orders; nothing for another value."""
    if not is_call(value, aten.mul.Tensor):
        return []
    assert isinstance(value, fx.Node)
    left, right = value.args
    both = isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return [(left, right), (right, left)] if both else []  # type: ignore[list-item]


def cast_source(value: object) -> fx.Node | None:
    """What a cast casts; None for any other node."""
    if not is_call(value, aten._to_copy.default):
        return None
    assert isinstance(value, fx.Node)
    source = value.args[0]
    assert isinstance(source, fx.Node)
    moves = _tensor(source).device != _tensor(value).device
    return None if moves else source


def sliced(value: object) -> tuple[fx.Node, int, Size, Size, int] | None:
    """A node as a slice of another.

    Returns:
        The source, the dim from the front, the first position, the extent and the step. A part of
        a split is a slice as well. None for any other node, and for bounds that are nodes.
    """
    if is_call(value, aten.slice.Tensor):
        assert isinstance(value, fx.Node)
        source, dim, start, step = (argument(value, n) for n in ("self", "dim", "start", "step"))
        if not isinstance(start, int | None) or not isinstance(step, int):
            return None
        assert isinstance(source, fx.Node)
        assert isinstance(dim, int)
        extents = shape_of(source)
        dim = dim % len(extents)
        first: Size = start or 0
        first = first + extents[dim] if start is not None and start < 0 else first
        return source, dim, first, shape_of(value)[dim], step
    if is_call(value, operator.getitem):
        assert isinstance(value, fx.Node)
        return _split_part(value)
    return None


def halves(first: object, second: object, step: int = 1) -> tuple[fx.Node, int] | None:
    """The tensor and the dim that two values are the halves of; None if they are not.

    Args:
        first: A value.
        second: Another one.
        step: 1 for the first and the second half, 2 for even and odd elements.
    """
    left, right = sliced(first), sliced(second)
    if left is None or right is None:
        return None
    x, dim, start, extent, stride = left
    if (right[0], right[1], right[4]) != (x, dim, stride) or stride != step:
        return None
    ends = same(extent * 2, shape_of(x)[dim]) and same(right[3], extent)
    begins = same(start, 0) and same(right[2], extent if step == 1 else 1)
    return (x, dim) if ends and begins else None


def _split_part(value: fx.Node) -> tuple[fx.Node, int, Size, Size, int] | None:
    split, index = value.args
    if not is_call(split, aten.split_with_sizes.default, aten.split.Tensor):
        return None
    assert isinstance(split, fx.Node)
    assert isinstance(index, int)
    source, dim = split.args[0], argument(split, "dim")
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    dim = dim % len(shape_of(source))
    extents = [part.shape[dim] for part in split.meta["val"]]
    return source, dim, sum(extents[:index]), extents[index], 1


def _tensor(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _fake_mode(node: fx.Node) -> torch._subclasses.FakeTensorMode:
    value = node.meta["val"]
    return (value[0] if isinstance(value, tuple | list) else value).fake_mode
