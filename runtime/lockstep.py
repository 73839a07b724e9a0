"""Running all ranks of a Program in this process, node by node.

Every rank runs the same node before any rank runs the next one, so a collective has all its inputs
at hand. Ops and wire formats are those of real execution (`lowering.mesh_ops`); only the exchange
is done here, in rank order.

Invariants: no input is mutated; no two ranks' outputs share storage; a value is freed after its
last use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import fx

from rolemesh.compiler.ir.dialect import (
    ALL_TO_ALL,
    BROADCAST_START,
    COMBINE,
    PLAIN,
    REDUCE_SCATTER,
    SHARD,
    STARTS,
    TAKE,
    MeshOp,
    is_bundle,
    moved,
)
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.placement import Segmented, Shard
from rolemesh.compiler.ir.program import Program, tensor_type, tensor_types
from rolemesh.lowering import chunks
from rolemesh.lowering.mesh_ops import (
    Exchange,
    axes_of,
    collective,
    joint_position,
    local_call,
    owned_rows,
)
from rolemesh.lowering.provenance import add_note, describe
from rolemesh.lowering.routes import (
    Routes,
    combine_pack,
    combine_unpack,
    dispatch_pack,
    dispatch_unpack,
    routes_of,
)

__all__ = ["Ledger", "Observer", "assemble_outputs", "run_lockstep", "scatter_inputs"]

Ledger = Callable[[fx.Node, tuple[int, ...], int], None]
"""Called for each exchange of a group: the node, the group's ranks, bytes of one rank's wire; where
rows move by their routes, for each rank of it: the node, the rank alone, bytes that it receives."""

Observer = Callable[[fx.Node, Sequence[object]], None]
"""Called with each value once all ranks have it: the node, and for each rank its tensor, or the
tuple of an op with several results. A later one may be received into a prefetched one's memory.
"""


def run_lockstep(
    program: Program,
    inputs: Sequence[Sequence[torch.Tensor]],
    *,
    poison: bool = False,
    check: bool = False,
    ledger: Ledger | None = None,
    observe: Observer | None = None,
) -> list[list[torch.Tensor | None]]:
    """Run every rank of a partitioned Program.

    Args:
        program: The Program.
        inputs: For each placeholder, the local tensor of each rank.
        poison: Fill with NaN whatever an op must not read: float pads that a mesh op makes, and
            looked-up rows of table entries on other ranks.
        check: Compare every local shape and dtype with the Program's layouts.
        ledger: Observer of the traffic.
        observe: Observer of the values.

    Returns:
        For each output, the local tensor of each rank (None for an output that is None).

    Raises:
        RolemeshError: RM020 if `inputs` has another form than the Program's inputs, RM016 if
            `check` finds a value that its layout does not describe.
    """
    return _Run(program, poison, check, ledger, observe).run(inputs)


def scatter_inputs(
    program: Program, tensors: Sequence[torch.Tensor], *, poison: bool = False
) -> list[list[torch.Tensor]]:
    """Each rank's local tensor of every input.

    Ranks that do not own a value with an `Owner` placement get NaN (or the largest integer, or
    True), so that a program that reads it there gives a wrong result.

    Args:
        program: A Program with layouts.
        tensors: The whole tensors, one per placeholder.
        poison: Fill float pads with NaN.
    """
    mesh = program.the_mesh
    scattered = []
    for node, tensor in zip(program.placeholders, tensors, strict=True):
        layout = program.layout(node)
        locals_ = chunks.scatter(tensor, layout, mesh)
        if poison:
            locals_ = chunks.poison_pads(locals_, layout, mesh)
        scattered.append(
            [
                local if chunks.holds(layout, mesh, rank) else _unreadable(local)
                for rank, local in enumerate(locals_)
            ]
        )
    return scattered


def assemble_outputs(
    program: Program, outputs: Sequence[Sequence[torch.Tensor | None]]
) -> list[torch.Tensor | None]:
    """The whole tensor of every output; pending reductions are performed."""
    whole: list[torch.Tensor | None] = []
    for value, locals_ in zip(program.results, outputs, strict=True):
        tensors = [local for local in locals_ if local is not None]
        if not isinstance(value, fx.Node) or not tensors:
            whole.append(None)
            continue
        layout = program.layout(value)
        shape = tensor_type(value).shape
        whole.append(chunks.assemble(tensors, layout, shape, program.the_mesh))
    return whole


class _Run:
    """One run: the values alive, per node and rank."""

    def __init__(
        self,
        program: Program,
        poison: bool,
        check: bool,
        ledger: Ledger | None,
        observe: Observer | None,
    ) -> None:
        self.program = program
        self.mesh = program.the_mesh
        self.poison = poison
        self.check = check
        self.ledger = ledger
        self.observe = observe
        self.values: dict[fx.Node, list[object]] = {}
        self.pool: dict[tuple[str, int], torch.Tensor] = {}

    @torch.no_grad()
    def run(self, inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor | None]]:
        self._place_inputs(inputs)
        last = _last_uses(self.program.graph)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.values[node] = self._node(node)
            if self.check and node.op in ("placeholder", "call_function"):
                self._check(node)
            if self.observe is not None and node.op in ("placeholder", "call_function"):
                self.observe(node, self.values[node])
            if node.op != "output":
                for dead in last.get(node, ()):
                    del self.values[dead]
        return [self._output(value) for value in self.program.results]

    def _place_inputs(self, inputs: Sequence[Sequence[torch.Tensor]]) -> None:
        placeholders = self.program.placeholders
        counts = {len(ranks) for ranks in inputs}
        if len(inputs) != len(placeholders) or counts - {self.mesh.size}:
            raise RolemeshError(
                "RM020",
                what=f"{len(inputs)} inputs for {sorted(counts)} ranks do not fit the program",
                where=f"program {self.program.name}",
                why=f"it takes {len(placeholders)} inputs on {self.mesh.size} ranks",
                fix="pass, for each input, one local tensor per rank (see scatter_inputs)",
            )
        for node, locals_ in zip(placeholders, inputs, strict=True):
            self.values[node] = list(locals_)

    def _node(self, node: fx.Node) -> list[object]:
        if isinstance(node.target, MeshOp) and node.target.communicates:
            try:
                return self._routed(node) if node.target in PLAIN else self._collective(node)
            except Exception as error:
                add_note(error, node)
                raise
        results = []
        for rank in range(self.mesh.size):
            try:
                results.append(self._local(node, rank))
            except Exception as error:
                add_note(error, node, rank)
                raise
        return results

    def _local(self, node: fx.Node, rank: int) -> object:
        def value(argument: fx.Node) -> object:
            return self.values[argument][rank]

        args = [_filled(argument, value) for argument in node.args]
        if not isinstance(node.target, MeshOp):
            kwargs = {name: _filled(argument, value) for name, argument in node.kwargs.items()}
            assert callable(node.target)
            return node.target(*args, **kwargs)
        call = local_call(self.program, node, rank)
        result = call.function(*args, **call.kwargs)
        if not (self.poison and isinstance(result, torch.Tensor)):
            return result
        if node.target is SHARD:
            return self._poison_pads(node, result, node.kwargs["shard"], rank)
        if node.target is TAKE and not call.kwargs.get("fill_zero") and result.is_floating_point():
            ids = args[1]
            assert isinstance(ids, torch.Tensor)
            return _poison_rows(result, ids, call.kwargs)
        return result

    def _collective(self, node: fx.Node) -> list[object]:
        ranks = range(self.mesh.size)
        moves = moved(node)
        parts = [collective(self.program, node, rank) for rank in ranks]
        wires = []
        for rank in ranks:
            values = [self.values[move.source][rank] for move in moves]
            pack = parts[rank].pack
            wires.append(pack.function(*cast("list[torch.Tensor]", values), **pack.kwargs))
        for exchange in parts[0].exchanges:
            wires = self._exchange(node, exchange, wires)
        results: list[object] = []
        for rank in ranks:
            found = []
            for unpack, move in zip(parts[rank].unpacks, moves, strict=True):
                result = unpack.function(wires[rank], **unpack.kwargs)
                if node.target is BROADCAST_START:
                    result = self._receive(node, rank, parts[rank].exchanges[0], result)
                elif self.poison and node.target in _SCATTERS:
                    result = self._poison_pads(node, result, move.kwargs["shard"], rank)
                elif self.poison and node.target in _EXCHANGES:
                    result = self._poison_pads(node, result, move.kwargs["split"], rank)
                found.append(result)
            results.append(tuple(found) if is_bundle(node) else found[0])
        return results

    def _routed(self, node: fx.Node) -> list[object]:
        """Rows between tokens and experts; those that nobody needs stay where they are."""
        x, ids = (self.values[operand] for operand in node.all_input_nodes)
        combines = node.target is COMBINE
        shard, size = node.kwargs["shard"], node.kwargs["size"]
        assert isinstance(shard, Shard)
        assert isinstance(size, int)
        (axis,) = axes_of(node)
        results: list[object] = [None] * self.mesh.size
        for group in {self.mesh.group(axis, rank) for rank in range(self.mesh.size)}:
            values = [cast(torch.Tensor, x[rank]) for rank in group]
            picks = [cast(torch.Tensor, ids[rank]) for rank in group]
            found = [
                routes_of(
                    picks[index],
                    value.shape[:-1] if combines else picks[index].shape[:1],
                    shard=shard,
                    size=size,
                    parts=len(group),
                    index=index,
                )
                for index, value in enumerate(values)
            ]
            pairs = list(zip(values, found, strict=True))
            wires = [
                combine_pack(value, routes).split(routes.whole_counts)
                if combines
                else dispatch_pack(value, routes).split(routes.own_counts)
                for value, routes in pairs
            ]
            for index, (rank, routes) in enumerate(zip(group, found, strict=True)):
                received = torch.cat([wire[index] for wire in wires])
                if self.ledger is not None:
                    rows = routes.received(index, combines=combines)
                    self.ledger(node, (rank,), rows * received.shape[1] * received.itemsize)
                results[rank] = self._received(node, rank, received, routes)
        return results

    def _received(
        self, node: fx.Node, rank: int, received: torch.Tensor, routes: Routes
    ) -> torch.Tensor:
        shape = self.program.layout(node).local_shape(tensor_type(node).shape, self.mesh)
        if node.target is COMBINE:
            value = combine_unpack(received, routes, shape=shape)
            shard = node.kwargs["shard"]
            return self._poison_pads(node, value, shard, rank) if self.poison else value
        fill = math.nan if self.poison and received.is_floating_point() else 0
        return dispatch_unpack(received, routes, tokens=shape[0], fill=fill)

    def _exchange(
        self, node: fx.Node, exchange: Exchange, wires: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        received = list(wires)
        for first in range(self.mesh.size):
            group = self.mesh.group(exchange.axis, first)
            if group[0] != first:
                continue
            members = [wires[rank] for rank in group]
            if len({(x.shape, x.dtype) for x in members}) > 1:
                shapes = [list(x.shape) for x in members]
                raise ValueError(f"ranks {group} put different shapes on the wire: {shapes}")
            if self.ledger is not None:
                self.ledger(node, group, members[0].nbytes)
            for rank, wire in zip(group, _exchanged(exchange, members), strict=True):
                received[rank] = wire
        return received

    def _receive(
        self, node: fx.Node, rank: int, exchange: Exchange, value: torch.Tensor
    ) -> torch.Tensor:
        """Put a prefetched weight where real execution does, so that a reuse too early shows."""
        _, index = joint_position(self.mesh, (exchange.axis,), rank)
        if index == exchange.owner:
            return value
        slot = (str(node.kwargs["slot"]), rank)
        if slot not in self.pool:
            self.pool[slot] = torch.empty_like(value)
        return self.pool[slot].copy_(value)

    def _poison_pads(
        self, node: fx.Node, result: torch.Tensor, shard: object, rank: int
    ) -> torch.Tensor:
        if not result.is_floating_point():
            return result
        assert isinstance(shard, Shard | Segmented)
        parts, index = joint_position(self.mesh, axes_of(node), rank)
        return chunks.fill_pads(result, shard, parts, index, math.nan)

    def _check(self, node: fx.Node) -> None:
        layouts = self.program.layouts.get(node)
        if not layouts:
            return
        for rank in range(self.mesh.size):
            value = self.values[node][rank]
            found = value if isinstance(value, tuple | list) else (value,)
            for tensor, kind, layout in zip(found, tensor_types(node), layouts, strict=True):
                assert isinstance(tensor, torch.Tensor)
                want = layout.local_shape(kind.shape, self.mesh)
                if tuple(tensor.shape) != want or tensor.dtype != kind.dtype:
                    raise RolemeshError(
                        "RM016",
                        what=f"%{node.name} is {tensor.dtype} {list(tensor.shape)} on rank {rank}, "
                        f"not {kind.dtype} {list(want)}",
                        where=describe(node),
                        why=f"its layout is {layout.text(kind, self.mesh)}",
                        fix="the op's rule, or the pass that made the node, is wrong",
                    )

    def _output(self, value: object) -> list[torch.Tensor | None]:
        if not isinstance(value, fx.Node):
            return [None] * self.mesh.size
        seen: set[int] = set()
        outputs: list[torch.Tensor | None] = []
        for tensor in self.values[value]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage().data_ptr()
                outputs.append(tensor.clone() if storage in seen else tensor)
                seen.add(storage)
            else:
                outputs.append(None)
        return outputs


_SCATTERS = (REDUCE_SCATTER, STARTS[REDUCE_SCATTER])
_EXCHANGES = (ALL_TO_ALL, STARTS[ALL_TO_ALL])


def _filled(argument: object, value: Callable[[fx.Node], object]) -> object:
    """A node's argument with values in place of nodes."""
    if isinstance(argument, fx.Node):
        return value(argument)
    if isinstance(argument, list):
        return [_filled(item, value) for item in argument]
    if type(argument) is tuple:
        return tuple(_filled(item, value) for item in argument)
    return argument


def _exchanged(exchange: Exchange, wires: list[torch.Tensor]) -> list[torch.Tensor]:
    """What each member of a group has after an exchange; they may share memory."""
    count = len(wires)
    match exchange.kind:
        case "all_gather":
            return [torch.cat(wires)] * count
        case "all_reduce":
            return [chunks.reduce_values(wires, exchange.op)] * count
        case "broadcast":
            return [wires[exchange.owner]] * count
        case "reduce_scatter":
            total = chunks.reduce_values(wires, exchange.op)
            rows = total.shape[0] // count
            return [total.narrow(0, index * rows, rows) for index in range(count)]
        case "all_to_all":
            return [torch.stack([wire[index] for wire in wires]) for index in range(count)]
    raise ValueError(f"unknown exchange {exchange.kind}")


def _poison_rows(
    result: torch.Tensor, ids: torch.Tensor, kwargs: Mapping[str, object]
) -> torch.Tensor:
    """Fill the looked-up rows of table entries on other ranks with NaN."""
    options = {name: kwargs[name] for name in ("size", "parts", "index")}
    owned = owned_rows(ids.reshape(-1), by="ids", rows=ids.numel(), **options)  # type: ignore[arg-type]
    trailing = result.ndim - int(str(kwargs["dim"])) - ids.ndim
    return result.masked_fill(~owned.reshape(*ids.shape, *[1] * trailing), math.nan)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that no later node uses."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for operand in node.all_input_nodes:
            last[operand] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, end in last.items():
        if value.op != "output":
            ends.setdefault(end, []).append(value)
    return ends


def _unreadable(x: torch.Tensor) -> torch.Tensor:
    if x.is_floating_point():
        return torch.full_like(x, math.nan)
    largest = True if x.dtype is torch.bool else torch.iinfo(x.dtype).max
    return torch.full_like(x, largest)
