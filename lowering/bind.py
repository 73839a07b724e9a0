"""Binding a Program to one rank: mesh ops become plain functions and functional collectives.

In the bound graph the rank's position is a constant, and every exchange is a real collective
(`torch.ops._c10d_functional`) on the group handle of its axis, followed by its wait.

Invariants:

* The node that holds the result of a Program's node has its name, and `meta["type"]` and
  `meta["origin"]`; nodes added before it have its origin and a name that starts with its name.
* Of values that are moved as one, the wire tensor stands for the mesh op, under its name, and each
  is made of it where the Program takes it out.
* Every rank's bound graph has the same collectives in the same order.
* The symbols of a Program's sizes are integer inputs, after its own inputs and in the order of its
  scope; sizes are nodes computed from them, and no `Dim` is left.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import Argument, Target

from rolemesh.compiler.ir.dialect import (
    BROADCAST_START,
    PLAIN,
    WAIT,
    MeshOp,
    is_bundle,
    is_start,
    moved,
)
from rolemesh.compiler.ir.nodes import add_call, copy_node
from rolemesh.compiler.ir.placement import Shard
from rolemesh.compiler.ir.program import Program, tensor_type
from rolemesh.lowering.chunks import holds
from rolemesh.lowering.mesh_ops import (
    Call,
    Collective,
    Exchange,
    axes_of,
    collective,
    joint_position,
    local_call,
    local_shape,
)
from rolemesh.lowering.routed_ops import routed_ops
from rolemesh.lowering.sizes import SizeNodes
from rolemesh.passes.base import collection_paused

__all__ = ["bind", "make_pool"]


def bind(
    program: Program,
    rank: int,
    groups: Mapping[str, str],
    pool: Mapping[str, torch.Tensor] | None = None,
    *,
    routes: bool = False,
) -> fx.GraphModule:
    """One rank's graph of a partitioned Program.

    Args:
        program: A partitioned Program.
        rank: The rank to bind to, a position of `program.mesh`.
        groups: For each axis name, what functional collectives accept as the group: its name.
        pool: Buffers to receive prefetched weights in, by slot (`make_pool`). Without it every
            prefetched weight gets memory of its own for the time it lives. Programs that never
            run at the same time may share one.
        routes: Whether rows move by their routes; else the plain collectives move all of them.

    Returns:
        A module that takes local tensors and returns a flat tuple of them.
    """
    with collection_paused():
        return _Binding(program, rank, groups, pool or {}, routes).run()


def make_pool(program: Program, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Buffers for the slots of a Program's prefetched weights."""
    pool: dict[str, torch.Tensor] = {}
    for node in program.ops:
        slot = node.kwargs.get("slot")
        if node.target is BROADCAST_START and str(slot) not in pool:
            shape, dtype = local_shape(program, node), tensor_type(node).dtype
            pool[str(slot)] = torch.empty(shape, dtype=dtype, device=device)
    return pool


class _Binding:
    """One run of `bind`: the new graph and where each node is in it."""

    def __init__(
        self,
        program: Program,
        rank: int,
        groups: Mapping[str, str],
        pool: Mapping[str, torch.Tensor],
        routes: bool,
    ) -> None:
        self.program = program
        self.rank = rank
        self.groups = groups
        self.pool = pool
        self.routes = routes
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.started: dict[fx.Node, Collective] = {}
        self.bundles: dict[fx.Node, tuple[Call[torch.Tensor], ...]] = {}
        self.sizes = SizeNodes(self.graph)

    def run(self) -> fx.GraphModule:
        for node in self.program.placeholders:
            self.values[node] = copy_node(self.graph, node, self.values.__getitem__)
        self.sizes.add_inputs(self.program)
        for node in self.program.ops:
            self.values[node] = (
                self._mesh_op(node) if isinstance(node.target, MeshOp) else self._op(node)
            )
        results = [self._output(i, value) for i, value in enumerate(self.program.results)]
        self.graph.output(tuple(results))
        # No target runs this graph as it is, so its code is made only if someone asks.
        return _LazyGraphModule(self.root, self.graph, "Bound")

    def _output(self, index: int, value: object) -> Argument:
        """An output; for the new value of an input that another rank owns, the input as it is."""
        mutates = self.program.outputs[index].mutates
        if mutates is not None:
            node = self.program.placeholders[mutates]
            if not holds(self.program.layout(node), self.program.the_mesh, self.rank):
                return self.values[node]
        return self.values[value] if isinstance(value, fx.Node) else cast(Argument, value)

    def _op(self, node: fx.Node) -> fx.Node:
        if node.target is operator.getitem and node.args[0] in self.bundles:
            return self._unbundled(node)
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        return self._result(node, node.target, args, kwargs)

    def _mesh_op(self, node: fx.Node) -> fx.Node:
        if node.target is BROADCAST_START:
            return self._start_broadcast(node)
        if is_start(node):
            return self._start(node)
        if node.target is WAIT:
            return self._wait(node)
        assert isinstance(node.target, MeshOp)
        if self.routes and node.target in PLAIN:
            return self._routed(node)
        if node.target.communicates:
            return self._collective(node)
        call = local_call(self.program, node, self.rank)
        args = fx.map_arg(node.args, self.values.__getitem__)
        return self._result(node, call.function, args, call.kwargs)

    def _collective(self, node: fx.Node) -> fx.Node:
        parts = collective(self.program, node, self.rank)
        wire = self._pack(node, parts.pack)
        *before, last = parts.exchanges
        for exchange in before:
            wire = self._wait_tensor(node, self._exchange(node, exchange, wire))
        started = self._exchange(node, last, wire)
        if is_bundle(node):
            self.bundles[node] = parts.unpacks
            return self._wait_tensor(node, started, node.name)
        wire = self._wait_tensor(node, started)
        return self._result(node, parts.unpack.function, (wire,), parts.unpack.kwargs)

    def _routed(self, node: fx.Node) -> fx.Node:
        """An op that moves rows by their routes, as one op of torch."""
        assert isinstance(node.target, MeshOp)
        (axis,) = axes_of(node)
        parts, index = joint_position(self.program.the_mesh, (axis,), self.rank)
        shard = node.kwargs["shard"]
        assert isinstance(shard, Shard)
        kwargs = {"shard": [*shard], "size": node.kwargs["size"], "parts": parts, "index": index}
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs["group"] = self.groups[axis]
        return self._result(node, routed_ops()[node.target], args, kwargs)

    def _unbundled(self, node: fx.Node) -> fx.Node:
        """One of the values that a collective moved as one: only it is made of the wire tensor."""
        source, position = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(position, int)
        unpack = self.bundles[source][position]
        return self._result(node, unpack.function, (self.values[source],), unpack.kwargs)

    def _start(self, node: fx.Node) -> fx.Node:
        """Of a collective over several axes, only the last exchange runs behind what follows."""
        parts = self.started[node] = collective(self.program, node, self.rank)
        *before, last = parts.exchanges
        wire = self._pack(node, parts.pack)
        for exchange in before:
            wire = self._wait_tensor(node, self._exchange(node, exchange, wire))
        return self._exchange(node, last, wire, node.name)

    def _start_broadcast(self, node: fx.Node) -> fx.Node:
        parts = collective(self.program, node, self.rank)
        self.started[node] = parts
        (exchange,) = parts.exchanges
        _, index = joint_position(self.program.the_mesh, (exchange.axis,), self.rank)
        buffer = self.pool.get(str(node.kwargs["slot"]))
        if buffer is None:
            return self._exchange(node, exchange, self._pack(node, parts.pack), node.name)
        if index == exchange.owner:
            wire = self._pack(node, parts.pack)  # sent from where it is stored
        else:
            wire = self._buffer(node, buffer)
        target = torch.ops._c10d_functional.broadcast_.default
        args = (wire, exchange.owner, self._group(exchange))
        return self._added(node, node.name, target, args)

    def _wait(self, node: fx.Node) -> fx.Node:
        start = node.args[0]
        assert isinstance(start, fx.Node)
        if is_bundle(start):
            self.bundles[node] = self.started[start].unpacks
            return self._wait_tensor(node, self.values[start], node.name)
        wire = self._wait_tensor(node, self.values[start])
        unpack = self.started[start].unpack
        return self._result(node, unpack.function, (wire,), unpack.kwargs)

    def _pack(self, node: fx.Node, pack: Call[torch.Tensor]) -> fx.Node:
        args = tuple(self.values[move.source] for move in moved(node))
        return self._added(node, f"{node.name}_wire", pack.function, args, pack.kwargs)

    def _buffer(self, node: fx.Node, buffer: torch.Tensor) -> fx.Node:
        name = f"pool_{sum(1 for _ in self.root.buffers())}"
        known = {id(other): key for key, other in self.root.named_buffers()}
        name = known.get(id(buffer), name)
        self.root.register_buffer(name, buffer, persistent=False)
        found = self.graph.get_attr(name)
        found.meta["origin"] = node.meta.get("origin")
        return found

    def _exchange(
        self, node: fx.Node, exchange: Exchange, wire: fx.Node, name: str = ""
    ) -> fx.Node:
        group, ranks = self._group(exchange), exchange.ranks
        blocks = [1] * ranks
        arguments: dict[str, tuple[Argument, ...]] = {
            "all_gather": (wire, ranks, group),
            "reduce_scatter": (wire, exchange.op, ranks, group),
            "all_reduce": (wire, exchange.op, group),
            "all_to_all": (wire, blocks, blocks, group),
            "broadcast": (wire, exchange.owner, group),
        }
        kind = exchange.kind
        return self._added(
            node, name or f"{node.name}_{exchange.axis}", _OPS[kind], arguments[kind]
        )

    def _wait_tensor(self, node: fx.Node, started: fx.Node, name: str = "") -> fx.Node:
        target = torch.ops._c10d_functional.wait_tensor.default
        return self._added(node, name or f"{started.name}_done", target, (started,))

    def _group(self, exchange: Exchange) -> str:
        return self.groups[exchange.axis]

    def _result(
        self,
        node: fx.Node,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: Mapping[str, object],
    ) -> fx.Node:
        new = self._added(node, node.name, target, args, kwargs)
        new.meta.update(node.meta)
        return new

    def _added(
        self,
        node: fx.Node,
        name: str,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: Mapping[str, object] = MappingProxyType({}),
    ) -> fx.Node:
        args, named = self.sizes.filled((args, cast(dict[str, Argument], dict(kwargs))))
        new = add_call(self.graph, target, args, named, name)
        new.meta["origin"] = node.meta.get("origin")
        return new


_OPS: Mapping[str, torch._ops.OpOverload] = {
    "all_gather": torch.ops._c10d_functional.all_gather_into_tensor.default,
    "reduce_scatter": torch.ops._c10d_functional.reduce_scatter_tensor.default,
    "all_reduce": torch.ops._c10d_functional.all_reduce.default,
    "all_to_all": torch.ops._c10d_functional.all_to_all_single.default,
    "broadcast": torch.ops._c10d_functional.broadcast.default,
}
