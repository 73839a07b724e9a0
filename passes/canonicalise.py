"""Canonicalise: fewer op forms for the passes that follow to know, and no op without effect.

* `addmm`, `baddbmm`, `addbmm` become a contraction and scaled sums, so that the rule of the
  contraction is the only place where a partial sum arises and a bias is seen to be added once.
* Fused attention with `is_causal` gets a mask operand: an op that derives the mask from its own
  row numbers would compute another mask on a chunk of the query's rows.
* Reshapes are `aten.reshape`, with explicit sizes: whether a result is a view is a matter of
  strides, which differ on a shard. `expand` has explicit sizes too.
* `copy(x, y)` is `y`, cast and expanded to the type of `x`.
* Rows added into zeros are a sum by ids (`aten.embedding_dense_backward`), which may stay pending.
* Cross entropy is written so that it shards by vocabulary (`rolemesh.passes.loss_forms`).
* Gone are ops that change nothing (aliases, copies of values that nobody writes, full slices,
  casts to the same type), dead ops, assertions, and all but one of several equal ops. Constants
  are not folded: a mask must keep the iotas it was made of, to be cut along with the tokens.

This is a pass and not AOTAutograd's decomposition table because most of it is about what surrounds
an op, and a table would take away the captured form: `history` shows both.

A copy stays where dropping it would make a result of the model share memory with another result or
with an input, and where it sets a memory format that an op other than a reshape relies on.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload

from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.passes.canonical_forms import REWRITES, Emitter, Rewrite, arguments
from rolemesh.passes.loss_forms import LOSS_REWRITES

__all__ = ["Canonicalise"]

aten = torch.ops.aten

_RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten._reshape_alias.default,
        aten.reshape.default,
    }
)
"""Become `aten.reshape.default`."""

_VIEWS_WITHOUT_EFFECT = frozenset(
    {
        *_RESHAPES,
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)
"""Without effect if the result has the operand's type."""

_COPIES_WITHOUT_EFFECT = frozenset(
    {
        aten._to_copy.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.lift_fresh_copy.default,
        aten.repeat.default,
    }
)
"""The same, but the result is memory of its own."""

_NEUTRAL: Mapping[OpOverload, int] = MappingProxyType(
    {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
)
"""Without effect on integers if the second operand is this number; a product or quotient also on
floats. (Adding 0.0 turns -0.0 into 0.0.)"""


@dataclass(frozen=True)
class Canonicalise:
    """The pass; see the module docstring."""

    name = "canonicalise"
    requires = "a captured Program without layouts"
    ensures = "the op forms of the module docstring; no dead, equal or ineffective ops"

    def apply(self, program: Program) -> Program:
        """The program over a graph of canonical ops, with the same inputs and outputs."""
        return program.after(self.name, graph=_Rewriter(program).graph())


_REWRITES: Mapping[str, Rewrite] = MappingProxyType({**REWRITES, **LOSS_REWRITES})


class _Form(NamedTuple):
    """What there is to do about the calls of an op.

    `drops` says that some have no effect, and `resizes` that they are written with explicit sizes.
    """

    drops: bool
    resizes: bool
    rewrite: Rewrite | None


def _form(target: object) -> _Form:
    drops = any(target in ops for ops in (_NEUTRAL, _VIEWS_WITHOUT_EFFECT, _COPIES_WITHOUT_EFFECT))
    rewrite = _REWRITES.get(target._schema.name) if isinstance(target, OpOverload) else None
    return _Form(drops, target in _RESHAPES or target is aten.expand.default, rewrite)


class _Rewriter:
    """Copies a graph op by op; each rewrite emits what an op becomes and returns the new value."""

    def __init__(self, program: Program) -> None:
        self._old = program.graph
        self._escaping = _escaping(program)
        self._emitter = Emitter(program.graph, self._escaping)
        self._values: dict[fx.Node, fx.Node] = {}
        self._results: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._forms: dict[int, _Form] = {}

    def graph(self) -> fx.Graph:
        """The canonical graph."""
        live = _live(self._old)
        for node in self._old.nodes:
            if node.op == "placeholder":
                copy = self._emitter.graph.create_node("placeholder", node.target, name=node.name)
                copy.meta.update(node.meta)
                self._values[node] = copy
            elif node.op == "call_function" and node in live:
                self._emitter.current = node
                found = self._rewrite(node)
                if isinstance(found, tuple):
                    self._results[node] = found
                else:
                    self._values[node] = found
        results = self._old.output_node().args[0]
        self._emitter.graph.output(fx.map_arg(results, self._values.__getitem__))
        live = _live(self._emitter.graph)
        for node in reversed(self._emitter.graph.nodes):
            if node.op == "call_function" and node not in live:
                self._emitter.graph.erase_node(node)
        return self._emitter.graph

    def _rewrite(self, node: fx.Node) -> fx.Node | tuple[fx.Node, ...]:
        target = node.target
        if target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(position, int)
            if source in self._results:
                return self._results[source][position]
        form = self._forms.get(id(target))
        if form is None:
            form = self._forms[id(target)] = _form(target)
        if form.drops and self._is_without_effect(node):
            return self._values[node.all_input_nodes[0]]
        args = fx.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self._values.__getitem__) if node.kwargs else {}
        if form.resizes:
            sizes = list(tensor_type(node).shape)
            reshapes = target in _RESHAPES
            name = "reshape" if reshapes and target is not aten.reshape.default else node.name
            op = aten.reshape.default if reshapes else aten.expand.default
            return self._emitter.emit(op, (args[0], sizes), tensor_type(node), name=name)
        if form.rewrite is not None:
            assert isinstance(target, OpOverload)
            found = form.rewrite(self._emitter, node, arguments(target, args, kwargs))
            if found is not None:
                return found
        assert callable(target)
        return self._emitter.emit(target, args, node.meta["type"], kwargs)

    def _is_without_effect(self, node: fx.Node) -> bool:
        target = node.target
        if target in _NEUTRAL:
            return node not in self._escaping and _is_neutral(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if tensor_type(source) != tensor_type(node):
            return False
        if target in _VIEWS_WITHOUT_EFFECT:
            return True
        if node in self._escaping or node.kwargs.get("device") or node.kwargs.get("layout"):
            return False
        if target is aten.constant_pad_nd.default and _any_nonzero(node.args[1]):
            return False  # elements move
        if node.kwargs.get("memory_format") in (None, torch.preserve_format):
            return True
        # One reshape after the copy makes its own where the strides ask for one.
        return len(node.users) == 1 and next(iter(node.users)).target in _RESHAPES


def _escaping(program: Program) -> frozenset[fx.Node]:
    """Nodes whose memory a result of the model may be; new values of inputs are copied from."""
    pending = [
        value
        for value, output in zip(program.results, program.outputs, strict=True)
        if output.mutates is None and isinstance(value, fx.Node)
    ]
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if _is_view(node):
                pending.extend(node.all_input_nodes)
    return frozenset(found)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem or target in _RESHAPES:
        return True
    return isinstance(target, OpOverload) and any(
        result.alias_info is not None for result in target._schema.returns
    )


def _is_neutral(node: fx.Node) -> bool:
    target, (operand, number, *_) = node.target, node.args
    assert isinstance(target, OpOverload)
    if isinstance(number, fx.Node) or not isinstance(operand, fx.Node):
        return False
    kind = tensor_type(node)
    scales = target in (aten.mul.Tensor, aten.div.Tensor)
    exact = scales or not (kind.dtype.is_floating_point or kind.dtype.is_complex)
    return exact and bool(number == _NEUTRAL[target]) and tensor_type(operand) == kind


def _any_nonzero(values: object) -> bool:
    assert isinstance(values, Sequence)
    return any(value != 0 for value in values)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an output needs."""
    pending = list(graph.output_node().all_input_nodes)
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found
