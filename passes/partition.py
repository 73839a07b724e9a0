"""Partition: rewrite a decided Program into one that runs on local tensors.

The only pass that inserts collectives, and only through `passes.reshard.steps`. For every op it
brings operands to the layouts the op's choices need (once per value and layout, shared by all
users), fills the pads of a factor that is about to be reduced, and gives the op its local
arguments. Each inserted node records why.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import fx

from rolemesh.compiler.ir import dialect
from rolemesh.compiler.ir.layout import Layout
from rolemesh.compiler.ir.mesh import Mesh
from rolemesh.compiler.ir.nodes import add_call
from rolemesh.compiler.ir.placement import REPLICATE, Placement, Routed, Shard
from rolemesh.compiler.ir.program import (
    Decision,
    Origin,
    Program,
    operand_nodes,
    origin,
    tensor_type,
)
from rolemesh.compiler.ir.rule import Choice, Kind, Split, Whole
from rolemesh.compiler.ir.tensor import TensorType
from rolemesh.passes.constraints import constraint_of
from rolemesh.passes.naming import op_label, stored_names
from rolemesh.passes.push_back import EARLY
from rolemesh.passes.reshard import Step, steps
from rolemesh.passes.rules import default_rules
from rolemesh.passes.rules.registry import LocalCall, Rules

__all__ = ["Partition", "Rewrite", "pad_filling"]


@dataclass(frozen=True)
class Partition:
    """The pass; see the module docstring."""

    rules: Rules = field(default_factory=default_rules)
    name = "partition"
    requires = "a decision per op"
    ensures = "a graph on local tensors; every output in the layout it must have"

    def apply(self, program: Program) -> Program:
        """The partitioned program."""
        return Rewrite(program, self.rules).run(self.name)


class _Form(NamedTuple):
    """What equal calls with equal choices need.

    Attributes:
        layouts: The layout of each operand; None where any will do.
        localizes: Whether a rule gives the call on local tensors.
        cut: Whether operands are chunks.
        reduces: Axes that split a factor which the op reduces.
    """

    layouts: tuple[Layout | None, ...]
    localizes: bool
    cut: bool
    reduces: tuple[int, ...]


class Rewrite:
    """One run of the pass: the new graph and where each old value is in it."""

    def __init__(self, program: Program, rules: Rules) -> None:
        self.program = program
        self.rules = rules
        self.mesh: Mesh = program.the_mesh
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, tuple[Layout, ...]] = {}
        self.converted: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self.masks: dict[tuple[str, int, Layout], fx.Node] = {}
        self.by_name: dict[str, fx.Node] = {}
        self.forms: dict[tuple[int, tuple[Choice, ...]], _Form] = {}
        self.names = stored_names(program)

    def run(self, pass_name: str) -> Program:
        """The partitioned program."""
        program = self.program
        for node in program.graph.nodes:
            self.by_name[node.name] = node
            if node.op == "placeholder":
                new = self.graph.placeholder(node.name)  # a target may be no Python name
                self._define(node, new)
            elif node.op == "call_function":
                if node.target is operator.getitem:
                    self._getitem(node)
                else:
                    self._op(node, program.decisions[node])
        results = [self._output(i, value) for i, value in enumerate(program.results)]
        self.graph.output(tuple(results))  # type: ignore[arg-type]
        return program.after(
            pass_name, graph=self.graph, layouts=self.layouts, decisions={}, seeds={}
        )

    def _define(self, node: fx.Node, new: fx.Node) -> None:
        new.meta.update(node.meta)
        self.values[node] = new
        self.layouts[new] = self.program.layouts[node]

    def _getitem(self, node: fx.Node) -> None:
        source, position = node.args
        assert isinstance(source, fx.Node)
        args = (self.values[source], position)
        self._define(node, self._call(operator.getitem, args, {}, node.name))

    def _op(self, node: fx.Node, decision: Decision) -> None:
        form = self._form(decision)
        layouts = form.layouts
        position = 0

        def substitute(arg: object) -> object:
            nonlocal position
            if isinstance(arg, fx.Node):
                if not isinstance(arg.meta.get("type"), TensorType):
                    return self.values[arg]
                need = layouts[position]
                value = self._operand(node, decision, position, arg, need)
                if form.reduces and need is not None:
                    value = self._filled(value, need, form.reduces, arg, node, decision)
                position += 1
                return value
            if isinstance(arg, list | tuple):
                return [substitute(item) for item in arg]
            return arg

        if constraint_of(node) is not None:  # its operand is where it must be
            self.values[node] = self._operand(node, decision, 0, operand_nodes(node)[0], layouts[0])
            return
        args = tuple([substitute(arg) for arg in node.args])
        kwargs = {name: substitute(arg) for name, arg in node.kwargs.items()}
        if form.localizes:
            target, args, kwargs = self.rules.localize(
                LocalCall(
                    decision.call,
                    decision.rule,
                    decision.choices,
                    self.mesh,
                    args,
                    kwargs,
                    layouts,
                    self.program.layouts[node],
                )
            )
        else:
            target = node.target  # type: ignore[assignment]
            if (
                not form.cut and target in _VIEWS
            ):  # a gathered value is contiguous, whatever the traced one was
                target = torch.ops.aten.reshape.default
        self._define(node, self._call(target, args, kwargs, node.name))

    def _call(
        self,
        target: Callable[..., object],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        name: str | None = None,
    ) -> fx.Node:
        return add_call(self.graph, target, args, kwargs, name)

    def _form(self, decision: Decision) -> _Form:
        key = (id(decision.call), decision.choices)
        form = self.forms.get(key)
        if form is None:
            form = self.forms[key] = self._formed(decision)
        return form

    def _formed(self, decision: Decision) -> _Form:
        call, rule = decision.call, decision.rule
        found: list[Layout | None] = []
        for position in range(len(call.operands)):
            placements = [rule.operand_placement(position, choice) for choice in decision.choices]
            if any(placement is None for placement in placements):
                found.append(None)
            else:
                found.append(Layout(tuple(p for p in placements if p is not None)))
        # An operand that is not read arrives cut even where the op itself is whole.
        cut = bool(rule.unread) or any(not isinstance(c, Whole) for c in decision.choices)
        reduces = tuple(
            index
            for index, choice in enumerate(decision.choices)
            if isinstance(choice, Split) and rule.kinds[choice.factor] is Kind.REDUCE
        )
        return _Form(tuple(found), cut and self.rules.localizes(call.target), cut, reduces)

    def _operand(
        self,
        user: fx.Node,
        decision: Decision,
        position: int,
        operand: fx.Node,
        need: Layout | None,
    ) -> fx.Node:
        if need is None:
            return self.values[operand]
        return self._convert(operand, need, user, decision)

    def _filled(
        self,
        value: fx.Node,
        need: Layout,
        reduces: Sequence[int],
        operand: fx.Node,
        user: fx.Node,
        decision: Decision,
    ) -> fx.Node:
        """An operand with pads that do not count in the reductions over these axes."""
        for index in reduces:
            if isinstance(need.placements[index], Shard):
                canonical = need.canonical(self.mesh)
                axes = canonical.joint_axes(index)
                if axes[0] == index:
                    value = self._mask_pad(value, canonical, axes, operand, user, decision)
        return value

    def _mask_pad(
        self,
        value: fx.Node,
        layout: Layout,
        axes: tuple[int, ...],
        old: fx.Node,
        user: fx.Node,
        decision: Decision,
    ) -> fx.Node:
        reduction = decision.rule.reduction
        filled = pad_filling(layout, axes, self.mesh, reduction, tensor_type(value).dtype)
        if filled is None:
            return value
        new = self._call(dialect.MASK_PAD, (value,), filled)
        new.meta["type"] = value.meta["type"]
        cause = f"pads must not count in the {reduction}"
        new.meta["origin"] = _inserted(value, cause, old, user)
        self.layouts[new] = self.layouts[value]
        return new

    def _convert(
        self, old: fx.Node, target: Layout, user: fx.Node, decision: Decision | None
    ) -> fx.Node:
        """The value of an old node in `target` layout."""
        source = self.program.layouts[old][0]
        if source == target:
            return self.values[old]
        key = (old, target)
        found = self.converted.get(key)
        if found is not None:
            return found
        value = self.values[old]
        kind = tensor_type(old)
        for step in steps(source, target, kind.shape, self.mesh):
            if step.op is dialect.SHARD:
                cause = f"{op_label(user, self.names)} takes a chunk"
            else:
                cause = self._cause(user, decision, source, target)
            value = self._emit(old, value, step, _inserted(_place(old, user), cause, old, user))
        self.converted[key] = value
        return value

    def _cause(
        self, user: fx.Node, decision: Decision | None, source: Layout, target: Layout
    ) -> str:
        """Why a value is brought from `source` to `target` for `user`, for people."""
        if user.op == "output":
            return (
                "every rank returns the whole output" if target.is_replicated else "output layout"
            )
        name = op_label(user, self.names)
        if decision is None:
            return f"marks rows of {name}"
        for axis, (have, want) in enumerate(zip(source.placements, target.placements, strict=True)):
            if have != want:
                reason = decision.reasons[axis]
                if reason.startswith(EARLY):
                    return reason.removeprefix(EARLY)
                return f"{name} {_need(want)}" + (f": {reason}" if reason else "")
        return name

    def _emit(self, old: fx.Node, value: fx.Node, step: Step, where: Origin) -> fx.Node:
        layout = step.layout
        if step.op is None:
            return value
        args: tuple[fx.Node, ...] = (value,)
        if step.routed is not None:
            index, routed = step.routed
            args = (value, self._owned(routed, index, layout, old))
        new = self._call(step.op, args, step.kwargs)
        new.meta["type"] = old.meta["type"]
        new.meta["origin"] = where
        self.layouts[new] = (layout,)
        return new

    def _owned(self, routed: Routed, index: int, layout: Layout, old: fx.Node) -> fx.Node:
        """The node that marks this rank's rows of a routed value."""
        by, name, size = routed.key.split(":")
        picks = self.by_name[name]
        cut = Layout(tuple([_rows_cut(p, routed) for p in layout.placements]))
        need = cut if by == "ids" else Layout.replicated(self.mesh)
        key = (routed.key, index, cut)
        found = self.masks.get(key)
        if found is None:
            value = self._convert(picks, need, old, None)
            rows = need.local_shape((routed.size,), self.mesh)[0]
            found = self._call(
                dialect.OWNED_ROWS,
                (value,),
                {"by": by, "rows": rows, "size": int(size), "axes": (self.mesh.names[index],)},
            )
            found.meta["type"] = TensorType((routed.size,), torch.bool)
            found.meta["origin"] = _inserted(
                picks, "marks the rows whose table entry is here", picks, old
            )
            marks = Routed(routed.key, 0, 1, routed.size)
            self.layouts[found] = (need.replace(index, marks),)
            for step in steps(
                need.replace(index, marks), cut.replace(index, marks), (routed.size,), self.mesh
            ):
                where = _inserted(picks, "marks the rows of this rank's chunk", picks, old)
                found = self._emit(found, found, step, where)
            self.masks[key] = found
        return found

    def _output(self, index: int, value: object) -> object:
        if not isinstance(value, fx.Node):
            return value
        target = self.program.output_layout(index)
        return self._convert(value, target, self.program.graph.output_node(), None)


def pad_filling(
    layout: Layout, axes: tuple[int, ...], mesh: Mesh, reduction: str, dtype: torch.dtype
) -> dict[str, object] | None:
    """What `mesh.mask_pad` does before a dim that axes split is reduced; None without pads.

    Args:
        layout: Layout of the value, canonical.
        axes: Indices of the axes, major to minor.
        mesh: The mesh.
        reduction: `sum`, `max` or `min`.
        dtype: Of the value.
    """
    placement = layout.placements[axes[0]]
    assert isinstance(placement, Shard)
    if placement.size % math.prod(mesh.sizes[axis] for axis in axes) == 0:
        return None
    local = layout.local_shard(axes[0], mesh)
    assert isinstance(local, Shard)
    return {
        "shard": Shard(local.dim, local.outer, placement.size),
        "axes": tuple(mesh.names[axis] for axis in axes),
        "value": _identity(reduction, dtype),
    }


_VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default})


def _rows_cut(placement: Placement, routed: Routed) -> Placement:
    """How an axis cuts the rows of a routed value, as a placement of a tensor of these rows."""
    if not isinstance(placement, Shard) or placement.dim != routed.dim:
        return REPLICATE
    rows, rest = divmod(routed.outer * routed.size, placement.outer)
    if placement.outer < routed.outer or rest or rows <= 1:
        return REPLICATE  # it cuts what is outside the rows, or within one
    units = placement.size if rows % placement.size == 0 else rows
    return Shard(0, placement.outer // routed.outer, units)


def _place(value: fx.Node, user: fx.Node) -> fx.Node:
    """The node that says where a mesh op belongs: an input belongs where it is used."""
    return user if value.op == "placeholder" and user.op != "output" else value


def _inserted(place: fx.Node, reason: str, value: fx.Node, user: fx.Node) -> Origin:
    """The origin of a node inserted at a place, to bring a value where its user needs it."""
    return replace(origin(place), reason=reason, value=value.name, user=user.name)


def _need(want: Placement) -> str:
    if isinstance(want, Shard):
        return f"takes a chunk of dim {want.dim}"
    return "needs all of it" if want == REPLICATE else f"takes {want}"


def _identity(reduction: str, dtype: torch.dtype) -> float:
    if reduction in ("max", "min"):
        info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        return info.min if reduction == "max" else info.max
    return 0
